"""Reads settings from files and joins them with those of options."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.config.addresses import address_of, judge_address
from pipeline.config.flaws import keys_of, validate
from pipeline.config.manifests import public_settings, refuse_foreign_files
from pipeline.config.section import BASE_URL
from pipeline.config.sections import TaskConfig, task_names
from pipeline.errors import ConfigError, one_line


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
