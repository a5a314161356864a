"""Read settings from files, join them with those of options, and report the first invalid key or value.

The manifest of a version may be a stranger's: it decides which rows a version has, and nothing of where or how.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.config.sections import (
    AT_SERVER,
    BASE_URL,
    PATTERNS,
    AnySection,
    TaskConfig,
    address_of,
    judge_address,
    task_names,
)
from pipeline.errors import ConfigError, did_you_mean, one_line

# Of a manifest: what decides which rows a version has, and nothing of where or how. Sources and models by public names.
MANIFEST_KEYS = frozenset(
    ("source", "source_split", "allow_partial", "columns", "drop_context", "limit", "images", "frame_seconds", "seed",
     "exclude", "human_texts", "tasks", "own_tasks", "engine", "model", "generate", "filter", "verify", "select", "dedupe",
     "balance", "split")
)  # fmt: skip
# Settings that no manifest decides: they name places and servers of a user, or say what the user may pass on.
OWN_KEYS = frozenset(("license", "title", "allow_urls", "follow_links", "split_list", "captions", "base_url", "server"))
# Sources that name a place of a user's own behind a colon.
LOCAL_SOURCES = ("folder", "archive", "list", "parquet", "pdf", "pdf-pages", "video")
PUBLIC_SOURCE = re.compile(
    rf"(?!(?:{'|'.join(LOCAL_SOURCES)})(?::|$))[a-z0-9-]+(:[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?)?"
)
PUBLIC_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_SHOWN_CHARACTERS = 80
SECRET_KEYS = frozenset(("key_env", "headers"))  # their values are not shown: by mistake they may be keys of servers
WANTED = {  # by the kind of pydantic's errors; the other kinds have its messages
    "bool_for_number": "a number, such as 10",
    "dict": "keys and values",
    "float": "a number",
    "greater_than_equal": "{ge} or more",
    "int": "a whole number",
    "int_from_float": "a whole number",
    "literal_error": "one of {expected}",
    "model": "keys and values, indented below it",
    "string": "a text",
    "tuple": "a list, such as [a, b]",
}


# --- files of settings


def resolve(config_file: Path | None = None, **flags: Any) -> Config:
    """Merge defaults, the file and the flags that are not None, in this order. Raises ConfigError for a bad key or value."""
    values, is_manifest = _settings_of_file(config_file) if config_file else ({}, False)
    if config_file and is_manifest:
        refuse_foreign_files(config_file, values, flags)
        values = public_settings(values)
    elif isinstance(values.get("own_tasks"), list):  # a manifest holds its tasks in full, and names no files
        values["own_tasks"] = [_whole_task(task) for task in values["own_tasks"]]
    if flags.get("base_url") is not None and isinstance(values.get("server"), dict):
        judge = [section.get("judge") for section in (flags.get("verify"), values.get("verify")) if isinstance(section, dict)]
        values["server"] = _of_servers(values["server"], flags["base_url"], str(next(filter(None, judge), "")))
    if (given := flags.pop("own_tasks", None)) is not None:
        values["own_tasks"] = _with_others(given, values.get("own_tasks"))
    for name, value in flags.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] |= value  # a section: keys that it does not name stay as in the file
        elif value is not None:
            values[name] = value
    if "source" not in values and values.keys() <= {*Config.model_fields}:
        raise ConfigError("no source given", hint="pass --source folder:PATH; `synth doctor --sources` lists all sources")
    return validate(Config, values)


def _of_servers(server: dict[str, Any], base_url: Any, judge: str) -> dict[str, Any]:
    """Return the section `server` of a file without what it says of servers that --base-url has left out."""
    endpoints = server.get("endpoints")
    used = [*map(str, base_url), *filter(None, [judge_address(judge)])]
    if not isinstance(endpoints, dict) or not all(re.match(BASE_URL, str(url)) for url in (*endpoints, *used)):
        return server  # an error of its own
    kept = {url: of for url, of in endpoints.items() if address_of(url) in map(address_of, used)}
    return server | {"endpoints": kept}


def _with_others(given: Any, of_file: Any) -> Any:
    """Return own tasks of a file of settings with those of options, which replace others of the same name."""
    if not isinstance(given, list | tuple):
        return given  # an error of its own
    added = [_whole_task(task) for task in given]
    names = task_names(added)
    known = of_file if isinstance(of_file, list) else []
    return [*(task for task in known if not (isinstance(task, dict) and task.get("name") in names)), *added]


def _whole_task(task: Any) -> Any:
    """Return a task in full, with the texts of the files that it names, from its file if it is a path."""
    return read_task(Path(task)) if isinstance(task, str | Path) else _with_texts(task, Path())


def read_task(path: Path) -> dict[str, Any]:
    """Read a task of one's own from its file. Raises ConfigError if the file, or one that it names, cannot be read."""
    return validate(
        TaskConfig, _with_texts(read_yaml(path, "a line such as `kind: caption`"), path.parent), f"{path}: "
    ).model_dump(exclude_unset=True)


def _with_texts(task: Any, folder: Path) -> Any:
    """Return a task with the texts of the template and the schema that it names as files."""
    if not isinstance(task, dict):
        return task
    texts = {}
    for key, suffix in (("prompt", ".j2"), ("output", ".json")):
        name = task.get(key)
        if isinstance(name, str) and name.endswith(suffix) and len(name.split()) == 1:
            try:
                text = (folder / name).read_text(encoding="utf-8")
                texts[key] = json.loads(text) if suffix == ".json" else text
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot read {folder / name}: {error}", hint=f"the {key} of a task names it") from None
    return task | texts


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Read a file of settings; the only reader of YAML. Raises ConfigError if it does not hold keys and values."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        values = None if node is None else yaml.constructor.SafeConstructor().construct_document(_without_twice(path, node))
    except (OSError, UnicodeDecodeError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(
            f"cannot read config file {path}: {problem}", hint=f"pass a YAML file; it may hold {example}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {one_line(error, 1000)}", hint=f"it may hold {example}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config file {path} must hold keys and values", hint=f"it may hold {example}")
    return values or {}


def _without_twice(path: Path, node: yaml.Node) -> yaml.Node:
    """Return the node of a file. Raises ConfigError if a key stands twice in it: YAML would take the last, without a word."""
    waiting, seen = [node], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or not isinstance(one, yaml.CollectionNode):  # an anchor may be named many times
            continue
        seen.add(id(one))
        keys = set[tuple[str, str]]()
        for item in one.value:
            key, *values = item if isinstance(item, tuple) else (None, item)
            waiting += values
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    problem = f"{path}, line {key.start_mark.line + 1}: the key {key.value} stands twice"
                    raise ConfigError(problem, hint="remove one of them")
                keys.add((key.tag, key.value))
    return node


def describe_settings(config: Config, file: Path | None, options: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    """Return (key, value, origin) of every setting; an origin is an option, the file, or `default`."""
    values = config.model_dump(mode="json")
    in_file = _settings_of_file(file)[0] if file else {}
    rows = []
    for key in keys_of(Config):
        section, _, name = key.partition(".")
        value = values[section][name] if name else values[section]
        is_in_file = name in (in_file.get(section) or {}) if name else section in in_file
        origin = options.get(key) or (str(file) if is_in_file else "default")
        rows.append((key, value, origin))
    return rows


def as_yaml(value: Any) -> str:
    """Return a value on one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _settings_of_file(file: Path) -> tuple[dict[str, Any], bool]:
    """Return the settings in a file, and whether it is the manifest of a version."""
    values = read_yaml(file, "a line such as `limit: 100`")
    if isinstance(values.get("config"), dict) and "version" in values:
        return values["config"], True
    if file.name == "manifest.json":  # cards print a command that names it: it must not be any other file of settings
        raise ConfigError(
            f"{file} is not a manifest of a version", hint="a file of settings has another name, such as synth.yaml"
        )
    return values, False


# --- manifests of strangers


def refuse_foreign_files(file: Path, settings: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for what a manifest must not decide, or cannot bring along: servers, and files that its rows need."""
    hint = "copy the settings that you want to a file of your own, and name your files and servers there"
    if foreign := [key for key in ("base_url", "server") if settings.get(key)]:
        raise ConfigError(f"the manifest {file} names {foreign[0]}, which would get your images and your key", hint=hint)
    used = [key for key in ("split_list", "captions") if settings.get(key) and not flags.get(key)]
    for section, key in (("generate", "prompt_dir"), ("balance", "entries")):
        values = settings.get(section)
        used += [f"{section}.{key}"] if isinstance(values, dict) and values.get(key) else []
    own_tasks = settings.get("own_tasks")
    for task in own_tasks if isinstance(own_tasks, list) else ():
        if not isinstance(task, dict) or isinstance(task.get("output"), str):
            raise ConfigError(f"the manifest {file} names Python code as the output of a task", hint=hint)
    verify = settings.get("verify")
    if isinstance(verify, dict) and AT_SERVER in str(verify.get("judge")):
        raise ConfigError(f"the manifest {file} names a judge's server, which would get your images and your key", hint=hint)
    if used:
        raise ConfigError(f"the version of {file} was made with a file of its maker: {used[0]}", hint=hint)


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a manifest that decide which rows its version has: a manifest may be a stranger's.

    What says where or how is left out, and has to be given anew: places, permissions, names that are a path here.
    """
    kept = {key: value for key, value in settings.items() if key in MANIFEST_KEYS and value is not None}
    if isinstance(kept.get("exclude"), list):
        kept["exclude"] = [name for name in kept["exclude"] if PUBLIC_SOURCE.fullmatch(str(name).partition("#")[0])]
    verify = kept.get("verify")
    if isinstance(verify, dict) and not _is_public_model(verify.get("clip_model", "auto")):
        kept["verify"] = {key: value for key, value in verify.items() if key != "clip_model"}
    if "model" in kept and not _is_public_model(kept["model"]):
        del kept["model"]
    if not PUBLIC_SOURCE.fullmatch(str(kept.get("source", ""))):
        kept.pop("source", None)
    return kept


def _is_public_model(name: Any) -> bool:
    """Return whether a name is a model of the Hub or a keyword (tiny, auto), and no path that exists here."""
    text = str(name)
    return bool(PUBLIC_MODEL.fullmatch(text)) and not ("/" in text and Path(text).exists())


# --- keys and values


def validate(section: type[AnySection], values: dict[str, Any], where: str = "") -> AnySection:
    """Return settings from keys and values. Raises ConfigError that names the first invalid key or value, after `where`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # A missing key may be an unknown one that lost a letter: the unknown one is reported.
        first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
        key, known = ".".join(str(part) for part in first["loc"]), keys_of(section)
        page = "docs/own-tasks.md" if section is TaskConfig else "docs/settings.md"
        if first["type"] == "extra_forbidden":
            near = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = did_you_mean(key, known) or f"known keys: {', '.join(near or known)}"
            raise ConfigError(f"{where}unknown config key: {key}", hint=hint) from None
        key = re.sub(r"(\.(\d+|int|float|str))+$", "", key)  # of an item of a list, or one of several types
        if not key:
            problem = first["msg"].removeprefix("Value error, ")
        else:
            problem = f"{key} is missing" if first["type"] == "missing" else f"bad value for {key}: {_flaw(first)}"
        all_shown = "`synth generate --print-config` shows all settings; " if section is Config else ""
        raise ConfigError(where + problem, hint=f"{all_shown}{page} explains {key or 'each setting'}") from None


def _flaw(error: "ErrorDetails") -> str:
    """Return what is wrong with a value; it is shown unless it may hold keys of servers, as a section may."""
    value, context, kind = error["input"], error.get("ctx", {}), error["type"]
    is_secret = not SECRET_KEYS.isdisjoint(error["loc"]) or isinstance(value, dict | BaseModel)
    # A password of an address is left out, whatever is in it.
    shown = "it" if is_secret else re.sub(r"://.*@", "://***@", repr(value))[:MAX_SHOWN_CHARACTERS]
    wanted = WANTED.get(re.sub("_(type|parsing|attributes_type)$", "", kind))
    if kind == "string_pattern_mismatch":
        wanted = PATTERNS.get(str(context["pattern"]), f"a text that matches {context['pattern']}")
    if wanted is None:
        message = error["msg"].removeprefix("Value error, ")
        return message if is_secret else f"{message} ({shown})"
    is_text_meant = isinstance(value, bool) and kind != "bool_for_number"
    quotes = "; YAML reads yes, no, on and off as true and false: put a text in quotes" if is_text_meant else ""
    return f"{shown} is not {wanted if kind == 'string_pattern_mismatch' else wanted.format(**context)}{quotes}"


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of all settings: those of a section as `section.name`."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += keys_of(inner, f"{name}.")
        else:
            names.append(prefix + name)
    return names
