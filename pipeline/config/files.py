"""Read settings from files, merge them with options, and report the first invalid key or value."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.config.sections import PATTERNS, AnySection, TaskConfig, task_names
from pipeline.errors import ConfigError, did_you_mean, one_line

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_SHOWN_CHARACTERS = 80
SECRET_KEYS = frozenset(("key_env", "headers"))  # users may write API keys in these settings by mistake


# --- files of settings


def resolve(config_file: Path | None = None, **options: Any) -> Config:
    """Merge defaults, the file and the options that are not None, in this order. Raises ConfigError."""
    values: dict[str, Any] = {}
    if config_file:
        content = read_yaml(config_file, "it needs lines such as `limit: 100`")
        # YAML returns null for a section whose lines are all comments.
        values = {key: value for key, value in content.items() if value is not None}
    if isinstance(values.get("custom_tasks"), list):
        values["custom_tasks"] = [_complete_task(task) for task in values["custom_tasks"]]
    if (custom_tasks := options.pop("custom_tasks", None)) is not None:
        values["custom_tasks"] = _merge_tasks(custom_tasks, values.get("custom_tasks"))
    for name, value in options.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] |= value
        elif value is not None:
            values[name] = value
    if "source" not in values and values.keys() <= {*Config.model_fields}:
        hint = "pass --source folder:PATH; `synth doctor --sources` lists all sources"
        raise ConfigError("no source given", hint=hint)
    return validate(Config, values)


def _merge_tasks(option_tasks: Any, file_tasks: Any) -> Any:
    """Merge custom tasks from a file and from options. Options replace tasks with the same name."""
    if not isinstance(option_tasks, list | tuple):
        return option_tasks  # validation reports the invalid type
    added = [_complete_task(task) for task in option_tasks]
    names, others = task_names(added), file_tasks if isinstance(file_tasks, list) else []
    return [*(task for task in others if not (isinstance(task, dict) and task.get("name") in names)), *added]


def _complete_task(task: Any) -> Any:
    """Return a task with the content of the files it names. `task` is a path, or keys and values."""
    return read_task(Path(task)) if isinstance(task, str | Path) else _with_texts(task, Path())


def read_task(path: Path) -> dict[str, Any]:
    """Read a custom task from its file. Raises ConfigError for an unreadable file or an invalid value."""
    values = _with_texts(read_yaml(path, "a line such as `kind: caption`"), path.parent)
    return validate(TaskConfig, values, f"{path}: ").model_dump(exclude_unset=True)


def _with_texts(task: Any, folder: Path) -> Any:
    """Replace the file names of a task's template and schema with the content of these files."""
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
                problem = f"cannot read {folder / name}: {error}"
                raise ConfigError(problem, hint=f"correct `{key}` of the task or the file") from None
    return task | texts


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001
        """Refuse a key that appears twice: YAML would use the last one."""
        seen = set[tuple[str, str]]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                place = f"{key.start_mark.name}, line {key.start_mark.line + 1}"
                raise ConfigError(f"{place}: the key {key.value} appears twice", hint="remove one of them")
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Read a file of settings, as JSON if its name ends with .json, else as YAML.

    Raises ConfigError if it does not contain keys and values.
    """
    try:
        with path.open(encoding="utf-8") as file:
            is_json = path.suffix == ".json"
            values = (json.load(file) if is_json else yaml.load(file, _UniqueKeyLoader)) or {}  # noqa: S506
    except (yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
        kind = "JSON" if is_json else "YAML"
        problem = f"config file {path} is not {kind}: {one_line(error, 1000)}"
        raise ConfigError(problem, hint=example) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = f"pass a YAML file; {example}"
        raise ConfigError(f"cannot read config file {path}: {problem}", hint=hint) from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must contain keys and values", hint=example)
    return values


# --- keys and values


def validate(section: type[AnySection], values: dict[str, Any], where: str = "") -> AnySection:
    """Return settings from keys and values. Raises ConfigError about the first flaw, prefixed by `where`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # Report an unknown key first, because it may be a misspelling of a missing key.
        flaw = next((flaw for flaw in error.errors() if flaw["type"] == "extra_forbidden"), error.errors()[0])
        key, known = ".".join(str(part) for part in flaw["loc"]), keys_of(section)
        if flaw["type"] == "extra_forbidden":
            near = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            hint = did_you_mean(key, known) or f"known keys: {', '.join(near or known)}"
            raise ConfigError(f"{where}unknown config key: {key}", hint=hint) from None
        key = re.sub(r"(\.(\d+|int|float|str))+$", "", key)  # remove list indexes and type names
        if not key:
            problem = flaw["msg"].removeprefix("Value error, ")
        elif flaw["type"] == "missing":
            problem = f"{key} is missing"
        else:
            problem = f"bad value for {key}: {_describe_flaw(flaw)}"
        page = "docs/custom-tasks.md" if section is TaskConfig else "docs/settings.md"
        raise ConfigError(where + problem, hint=f"{page} explains {key or 'each setting'}") from None


def _describe_flaw(flaw: "ErrorDetails") -> str:
    """Describe the problem with a value. The value is shown unless it may contain server keys."""
    value, context = flaw["input"], flaw.get("ctx", {})
    is_secret = not SECRET_KEYS.isdisjoint(flaw["loc"]) or isinstance(value, dict | BaseModel)
    shown = "it" if is_secret else re.sub(r"://.*@", "://***@", repr(value))[:MAX_SHOWN_CHARACTERS]
    if flaw["type"] == "string_pattern_mismatch":
        pattern = str(context["pattern"])
        return f"{shown} is not {PATTERNS.get(pattern, f'a text that matches {pattern}')}"
    message = flaw["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    close = did_you_mean(str(value), re.findall("'([^']+)'", str(context.get("expected", ""))))
    if isinstance(value, bool):
        shown += "; YAML reads yes, no, on and off as true and false: put a string in quotes"
    elif close:
        shown += f"; {close}"
    return message if is_secret else f"{message} ({shown})"


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of all settings, with the form `section.name` for settings in a section."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += keys_of(inner, f"{name}.")
        else:
            names.append(prefix + name)
    return names
