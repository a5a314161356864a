"""What a manifest may decide: it may be a stranger's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.addresses import AT_SERVER
from pipeline.errors import ConfigError

# Of a manifest: what decides which rows a version has, and nothing of where or how. Sources and models by public names.
MANIFEST_KEYS = frozenset(
    ("source", "source_split", "allow_partial", "columns", "drop_context", "limit", "images", "frame_seconds", "seed",
     "exclude", "human_texts", "tasks", "own_tasks", "engine", "model", "generate", "filter", "verify", "select", "dedupe",
     "balance", "split")
)  # fmt: skip
# Sources that name a place of a user's own behind a colon.
LOCAL_SOURCES = ("folder", "archive", "list", "parquet", "pdf", "pdf-pages", "video")
PUBLIC_SOURCE = re.compile(rf"(?!{'|'.join(LOCAL_SOURCES)})[a-z0-9-]+(:[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?)?")
PUBLIC_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
