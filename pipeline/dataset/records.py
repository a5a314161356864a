"""Records of finished steps. A step stores a record with a key next to its files.

The key is a digest of the package's code, the step's settings and its input files. A step is skipped if its
key and its files are unchanged, also if an earlier step has run again and written the same rows.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.dataset.directory import DatasetDir
from pipeline.digests import digest, file_digest, state_of
from pipeline.errors import SynthError
from pipeline.install import ROOT, installed_version, needed_packages
from pipeline.storage.files import open_table, read_json, write_json
from pipeline.storage.object_store import is_remote

DONE, PREPARED = "done", "prepared"
# Only the step that writes these tables reads them.
INTERNAL_FILES = ("prepared", "compared")
CODE = {"pipeline": (".py", ".gz", ".toml"), "prompts": (".j2", ".yaml")}


def step_key(name: str, settings: Any, files: Sequence[Path], inputs: Sequence[str]) -> str:
    """Return the key of a step from its settings, the content of `files`, and the digests `inputs`."""
    digests = [file_digest(path) if path.is_file() else None for path in files]
    return digest([code_digest(), name, described(settings), digests, list(inputs)])


def described(value: Any) -> Any:
    """Return settings as JSON values. Objects with a method `describe` are replaced by its return value."""
    if hasattr(value, "describe"):
        return json.loads(json.dumps(value.describe(), default=str))
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def is_done(shard: DatasetDir, step: str, key: str, which: str = DONE) -> bool:
    """Return whether a step has a record with this key, and its files still match the record."""
    record = read_record(shard, step, which)
    if record.get("key") != key:
        return False
    return all(_is_unchanged(shard.step_file(step, name), entry) for name, entry in record["files"].items())


def write_record(shard: DatasetDir, step: str, key: str, which: str = DONE, **facts: Any) -> None:
    """Write the record of a step, with `facts` for later steps. The key "" marks an incomplete step."""
    paths = [shard.step_file(step, which)]
    if which == DONE:
        paths = [path for path in paths[0].parent.glob("*.parquet") if path.stem not in INTERNAL_FILES]
    files = {path.stem: _describe_file(path) for path in sorted(paths, key=str)}
    write_json(_record_path(shard, step, which), {"key": key, "files": files, **facts})


def read_record(shard: DatasetDir, step: str, which: str = DONE) -> dict[str, Any]:
    """Return the record of a step, or {} if it is missing or damaged."""
    try:
        values = read_json(_record_path(shard, step, which))
    except (OSError, ValueError, RecursionError, SynthError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("files"), dict) else {}


def count_rows(shard: DatasetDir, step: str) -> tuple[int, dict[str, int]]:
    """Return the number of rows that a step kept, and the number of rejected rows by reason."""
    kept = open_table(shard.step_file(step)).metadata.num_rows
    reasons = open_table(shard.step_file(step, "rejected"), "reason").read(["reason"])["reason"]
    return kept, dict(Counter(reasons.to_pylist()).most_common())


def output_digest(shard: DatasetDir, step: str, name: str = "kept") -> str:
    """Return the digest of a step's file, as recorded when it was written."""
    record = read_record(shard, step, PREPARED if name == "prepared" else DONE)
    return str(record["files"][name]["sha256"])


def _describe_file(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path)} | ({} if is_remote(path) else {"state": state_of(path.stat()).hex()})


def _is_unchanged(path: Path, recorded: dict[str, Any]) -> bool:
    if is_remote(path):
        return path.exists()
    if not path.is_file():
        return False
    return state_of(path.stat()).hex() == recorded.get("state") or file_digest(path) == recorded.get("sha256")


def _record_path(shard: DatasetDir, step: str, which: str) -> Path:
    return shard.step_file(step, which).with_suffix(".json")


@cache
def code_digest() -> str:
    """Return a digest of the code and word lists of this package, and of the versions of its dependencies."""
    files = [
        path for folder in CODE for path in sorted((ROOT / folder).rglob("*")) if path.suffix in CODE[folder]
    ]
    contents = [[str(path.relative_to(ROOT)), file_digest(path)] for path in files]
    return digest([installed_version(), needed_packages(), contents])
