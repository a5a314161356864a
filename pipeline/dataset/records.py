"""Records of finished steps: next to its files, each step writes a key, a digest of everything that they were computed from.

The key covers the name of the step, the code of the whole package, the settings that the step reads, and its input files. A
step with the same key and unchanged files is skipped. A key contains the digests of input files and not the keys of earlier
steps: if a step runs again and writes the same rows, the steps after it are skipped.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.dataset.directory import DatasetDir, require_file
from pipeline.digests import digest, file_digest, state_of
from pipeline.errors import SynthError
from pipeline.install import ROOT, installed_version, needed_packages
from pipeline.storage.files import open_table, read_json, read_table, write_json
from pipeline.storage.object_store import is_remote

DONE, PREPARED = "done", "prepared"  # names of records; each describes other files of the folder of a step
NOT_OUTPUTS = ("prepared", "compared")  # files that a step makes for itself
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
        return {field.name: described(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def is_done(shard: DatasetDir, step: str, key: str, which: str = DONE) -> bool:
    """Return whether a step has written its files for this key, and the files have not changed."""
    record = read_record(shard, step, which)
    return record.get("key") == key and all(
        _is_as_recorded(shard.step_file(step, name), recorded) for name, recorded in record["files"].items()
    )


def write_record(shard: DatasetDir, step: str, key: str, which: str = DONE, **facts: Any) -> None:
    """Write the record of a step, with `facts` that later steps read. The key "" marks an incomplete step, which runs again."""
    paths = [shard.step_file(step, which)]
    if which == DONE:
        paths = [path for path in paths[0].parent.glob("*.parquet") if path.stem not in NOT_OUTPUTS]
    files = {path.stem: _describe_file(path) for path in sorted(paths, key=str)}
    write_json(_path(shard, step, which), {"key": key, "files": files, **facts})


def read_record(shard: DatasetDir, step: str, which: str = DONE) -> dict[str, Any]:
    """Return the record of a step; an empty one if it is missing or damaged."""
    try:
        values = read_json(_path(shard, step, which))
    except (OSError, ValueError, RecursionError, SynthError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("files"), dict) else {}


def count_rows(shard: DatasetDir, step: str) -> tuple[int, dict[str, int]]:
    """Return the number of rows that a step kept, and of those that it rejected by reason."""
    kept = open_table(require_file(shard.step_file(step))).metadata.num_rows
    reasons = read_table(require_file(shard.step_file(step, "rejected")), columns=["reason"])["reason"]
    counts = Counter({row["values"]: row["counts"] for row in reasons.value_counts().to_pylist()})
    return kept, dict(counts.most_common())


def output_digest(shard: DatasetDir, step: str, name: str = "kept") -> str:
    """Return the recorded digest of a file of a step."""
    record = read_record(shard, step, PREPARED if name == "prepared" else DONE)
    return str(record["files"][name]["sha256"])


def _describe_file(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path)} | ({} if is_remote(path) else {"state": state_of(path.stat()).hex()})


def _is_as_recorded(path: Path, recorded: dict[str, Any]) -> bool:
    """Return whether a file is unchanged; it is hashed only if its size, inode or times have changed."""
    if is_remote(path):
        return path.exists()
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
