"""Records of finished steps: next to its files, each step writes a key, a digest of everything that they were computed from.

The key covers the name of the step, the code of the whole package, the settings that the step reads, and its input files. A
step with the same key and unchanged files is skipped. A key contains the digests of input files and not the keys of earlier
steps: if a step runs again and writes the same rows, the steps after it are skipped.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.dataset.directory import OUTPUTS, DatasetDir
from pipeline.digests import digest, file_digest, state_of
from pipeline.errors import SynthError
from pipeline.install import ROOT, installed_version, needed_packages
from pipeline.storage.files import read_json, write_json
from pipeline.storage.object_store import is_remote

DONE, PREPARED = "done", "prepared"  # names of records
FILES = {DONE: OUTPUTS, PREPARED: ("prepared",)}  # the files that each record describes
CODE = {"pipeline": (".py", ".gz"), "prompts": (".j2", ".yaml")}  # folders of code, and the suffixes of its files


def step_key(name: str, settings: Any, files: Sequence[Path], inputs: Sequence[str]) -> str:
    """Return the key of a step from its settings, the `files` that it reads, and the digests of its `inputs`."""
    read = [file_digest(path) if path.is_file() else None for path in files]
    return digest([code_digest(), name, described(settings), read, list(inputs)])


def described(value: Any) -> Any:
    """Return settings as JSON values; those of an object with a method `describe` are what this returns."""
    if hasattr(value, "describe"):
        return json.loads(json.dumps(value.describe(), default=str))
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value):
        return {field.name: described(getattr(value, field.name)) for field in fields(value) if field.compare}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def is_done(shard: DatasetDir, step: str, key: str, which: str = DONE) -> bool:
    """Return whether a step has written its files for this key, and the files have not changed."""
    record = read_record(shard, step, which)
    return record.get("key") == key and all(
        _is_as_recorded(shard.step_file(step, name), record["files"].get(name)) for name in FILES[which]
    )


def write_record(shard: DatasetDir, step: str, key: str, which: str = DONE, **facts: Any) -> None:
    """Write the record of a step, with `facts` that later steps read. The key "" marks an incomplete step, which runs again."""
    files = {name: _describe_file(path) for name in FILES[which] if (path := shard.step_file(step, name)).exists()}
    write_json(_path(shard, step, which), {"key": key, "files": files, **facts})


def read_record(shard: DatasetDir, step: str, which: str = DONE) -> dict[str, Any]:
    """Return the record of a step; an empty one if it is missing or damaged."""
    try:
        values = read_json(_path(shard, step, which))
    except (OSError, ValueError, RecursionError, SynthError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("files"), dict) else {}


def output_digest(shard: DatasetDir, step: str, name: str = "kept") -> str:
    """Return the recorded digest of a file of a step."""
    record = read_record(shard, step, PREPARED if name == "prepared" else DONE)
    return str(record["files"][name]["sha256"])


def _describe_file(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path)} | ({} if is_remote(path) else {"state": state_of(path.stat()).hex()})


def _is_as_recorded(path: Path, recorded: dict[str, Any] | None) -> bool:
    """Return whether a file is unchanged; it is hashed only if its size, inode or times have changed."""
    if recorded is None or not path.exists():
        return recorded is None and not path.exists()
    if is_remote(path):
        return True
    return path.is_file() and (
        state_of(path.stat()).hex() == recorded.get("state") or file_digest(path) == recorded.get("sha256")
    )


def _path(shard: DatasetDir, step: str, which: str) -> Path:
    return shard.step_file(step, which).with_suffix(".json")


@cache
def code_digest() -> str:
    """Return a digest of the code and the word lists of this package, and of the versions of the packages that it needs."""
    files = [path for name, kinds in CODE.items() for path in sorted((ROOT / name).rglob("*")) if path.suffix in kinds]
    contents = [[str(path.relative_to(ROOT)), file_digest(path)] for path in files]
    return digest([installed_version(), needed_packages(), contents])
