"""The dataset folder: where everything lies, how it is written, and how a version is read.

Files appear whole or not at all: they are written aside, flushed to the disk and renamed. A file that would not change is
left alone, so that a second run of the same command touches nothing. The folder of a run on a cluster may lie in an object
store (objects.py): there, files are made on a disk, and put.
"""

import errno
import fcntl
import filecmp
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import total_ordering
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, StoreError, SynthError
from pipeline.objects import explained, is_object, lease, move_all, remove_folder, upload, where
from pipeline.tables import SPLITS, TABLE_VERSION

DATA = Path("data")
LEDGER_FILE = "ledger.parquet"
MANIFEST = "manifest.json"
CARD_FILE = "README.md"
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet")
_VERSION_NAME = re.compile(r"v(\d+)\.(\d+)\.(\d+)")


@total_ordering
@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a dataset: a folder with Parquet shards, a manifest and a card."""

    path: Path
    manifest: dict[str, Any]
    repo: str | None = None  # of the Hub that it came from; its files lie in a cache then

    @property
    def name(self) -> str:
        """Return the semantic version with a leading v."""
        return str(self.manifest["version"])

    @property
    def number(self) -> tuple[int, ...]:
        """Return (major, minor, patch)."""
        return parse_version(self.name)

    @property
    def dataset(self) -> Path:
        """Return the folder for what is made of this version: the dataset folder that holds it, or its own parent."""
        if self.repo:
            return dataset_folder(self.repo)
        home = home_of(self.path.resolve())
        return Path(os.path.relpath(home)) if not self.path.is_absolute() else home

    @property
    def images(self) -> int:
        """Return how many rows there are in all splits."""
        return sum(self.manifest["rows"].values())

    def summary(self) -> dict[str, Any]:
        """Return what a list of versions shows. The date is that of the manifest's file: rows and manifest hold no clock."""
        written = datetime.fromtimestamp((self.path / MANIFEST).stat().st_mtime, UTC)
        kept = {name: self.manifest[name] for name in ("version", "parent", "digest", "rows")}
        size = sum(about["bytes"] for about in self.manifest["files"].values())
        return kept | {"bytes": size, "date": written.strftime("%Y-%m-%d %H:%M")}

    def __lt__(self, other: "Version") -> bool:
        return self.number < other.number

    def shards(self, split: str) -> list[Path]:
        """Return the Parquet files of a split, in order."""
        return [self.path / name for name in sorted(self.manifest["files"]) if name.startswith(f"{split}-")]

    def batches(
        self, columns: list[str], rows: int = 1024, splits: Iterable[str] = SPLITS
    ) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield all rows with the split that they are in, a batch at a time. Raises StoreError where a shard is damaged."""
        for split in splits:
            for shard in self.shards(split):
                try:
                    for batch in open_parquet(shard).iter_batches(batch_size=rows, columns=columns):
                        yield split, batch
                except (OSError, pa.ArrowInvalid) as error:
                    raise self.damaged(error) from None

    def read(self, split: str, columns: list[str] | None = None) -> pa.Table:
        """Read the rows of a split. Raises StoreError where the version has none."""
        shards = self.shards(split)
        if not shards:
            raise StoreError(f"{self.name} has no rows in its {split} split", hint="make more samples, or choose another split")
        try:
            return pa.concat_tables([read_table(shard, columns) for shard in shards])
        except (OSError, pa.ArrowInvalid) as error:
            raise self.damaged(error) from None

    def damaged(self, error: Exception) -> StoreError:
        """Return the error to raise where a file of this version cannot be read."""
        return StoreError(f"{self.path} is damaged: {error}", hint="a version never changes: generate it again")


def home_of(version: Path) -> Path:
    """Return the dataset folder that holds a version's folder, or where there is none what the version lies in."""
    return version.parent.parent if version.parent.name == "versions" else version.parent


def parse_version(name: str) -> tuple[int, ...]:
    """Return the numbers of a name such as v1.2.3. Raises ConfigError where it is none."""
    found = _VERSION_NAME.fullmatch(name)
    if not found:
        raise ConfigError(f"not a version: {name}", hint="versions are named like v1.0.0; `synth versions` lists them")
    return tuple(int(part) for part in found.groups())


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths within one dataset folder."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The resolved config."""
        return self.path / "run.json"

    @property
    def journal(self) -> Path:
        """Raw replies of the one writer on this machine."""
        return self.path / "journal" / "local.sqlite"

    @property
    def server_log(self) -> Path:
        """What a vLLM server that we started has printed."""
        return self.path / "vllm.log"

    def stage(self, name: str, which: str = "kept") -> Path:
        """Rows that a stage kept or rejected."""
        return self.path / "stages" / name / f"{which}.parquet"

    def stage_files(self, name: str, which: str = "kept") -> list[Path]:
        """Return the files of rows that a stage kept or rejected: one, or one of each shard of a run on a cluster."""
        own = self.stage(name, which)
        below = "*/*" if is_object(self.path) else "*"
        return [own] if own.exists() else sorted(self.path.glob(f"shards/{below}/stages/{name}/{which}.parquet"), key=str)

    @property
    def finished(self) -> Path:
        """What a run on a cluster leaves when all shards are done; without it they may be of several runs."""
        return self.path / "shards" / "finished.json"

    def made_by(self, stage: str) -> Path:
        """Which source or model a stage had: what starts after it must not name another one."""
        return self.path / "stages" / stage / "made_by.json"

    @property
    def marks(self) -> Path:
        """What people said of texts, by `synth review apply`."""
        return self.path / "review" / "marks.jsonl"

    @property
    def cost(self) -> Path:
        """What asking has taken so far."""
        return self.path / "stages" / "generate" / "cost.json"

    @property
    def push_file(self) -> Path:
        """Which version was pushed where."""
        return self.path / "pushed.json"

    def pushed(self) -> list[dict[str, str]]:
        """Return every push from here: version, repo and commit."""
        return list(read_json(self.push_file)["pushed"]) if self.push_file.exists() else []

    def note_push(self, version: str, repo: str, commit: str) -> None:
        """Remember a push; the same one twice is noted once."""
        push = {"version": version, "repo": repo, "commit": commit}
        write_json(self.push_file, {"pushed": [*(known for known in self.pushed() if known != push), push]})

    def versions(self) -> list[Version]:
        """Return all finished versions, oldest first."""
        folders = (self.path / "versions").glob("v*")
        return sorted(read_version(folder) for folder in folders if (folder / MANIFEST).exists())

    def version(self, name: str | None = None) -> Version:
        """Return the version of that name, or the newest. Raises StoreError where there is none."""
        found = [version for version in self.versions() if name in (None, version.name)]
        if not found:
            known = ", ".join(version.name for version in self.versions()) or "none"
            raise StoreError(
                f"{self.path} has no version {name or ''}".rstrip(), hint=f"versions here: {known}; `synth generate` makes one"
            )
        return found[-1]

    @contextmanager
    def lock(self, *, wait: bool = False, say: Callable[[str], None] = lambda text: None) -> Iterator[Callable[[], None]]:
        """Be the only writer of this folder. Raises StoreError where another process is, unless told to wait for it.

        In an object store a killed one is waited for, and `say` told of it; what is yielded raises StoreError where we were
        taken for dead ourselves.
        """
        if is_object(self.path):
            with lease(self.path / ".lock", say=say) as check:
                yield check
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise StoreError(
                    f"another process is writing to {self.path}", hint="wait for it, or choose another --out"
                ) from None
            yield lambda: None


def read_version(folder: Path) -> Version:
    """Open a version folder. Raises StoreError where it is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        parse_version(manifest["version"])
        newer = manifest["table_version"] > TABLE_VERSION
        strange = [name for name in manifest["files"] if not _SHARD_NAME.fullmatch(name)]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise StoreError(f"not a version: {folder} ({error})", hint="pass a dataset folder or one of its versions") from None
    if newer:
        raise StoreError(f"{folder} was made by a newer synth", hint="upgrade synth")
    if strange:  # a manifest from elsewhere must not make us read, or publish, any other file
        raise StoreError(f"the manifest of {folder} names files that are no shards: {strange[0]!r}", hint="do not use it")
    return Version(folder, manifest)


def open_dataset(path: Path | None, version: str | None = None) -> Version:
    """Return a version by a dataset folder, a version folder, or the last one made under `data/`.

    Raises:
        StoreError: there is no such dataset or version.
    """
    if path is None:
        path = last_made()
    if (path / MANIFEST).exists():
        found = read_version(path)
        if version not in (None, found.name):
            raise StoreError(f"{path} is {found.name}, not {version}", hint="name the dataset folder instead")
        return found
    if not is_object(path) and not path.is_dir():
        raise StoreError(f"no dataset at {path}", hint="`synth generate --source scenes` makes one")
    return Folder(path).version(version)


def last_made() -> Path:
    """Return the dataset folder under `data/` whose newest version was written last."""
    manifests = sorted(DATA.glob("*/versions/v*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    if not manifests:
        raise StoreError(f"no dataset under {DATA}/", hint="make one: `synth generate --source scenes`, or name its folder")
    return manifests[-1].parents[2]


def dataset_folder(source: str) -> Path:
    """Return where the dataset of a source lies unless told: its name, as letters, digits, dots and dashes."""
    return DATA / (safe_name(source) or "dataset")


def safe_name(text: str) -> str:
    """Return a text as a name of a folder: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a path on this machine to write to; it takes the place of `path` when all went well, and is removed when not."""
    if is_object(path):
        with TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        if path.exists() and filecmp.cmp(path, temporary, shallow=False):
            return
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people can read and diff."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns; of an object, only the ranges where they lie."""
    return pq.read_table(**where(path), columns=columns)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file: its metadata is read, and nothing else."""
    return pq.ParquetFile(**where(path))


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables one after another to a Parquet file, whole or not at all; memory holds one of them."""
    with aside(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.select(schema.names).cast(schema))


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder beside the finished ones of `parent`; what was not published is removed."""
    temporary = parent / ".next"
    remove(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    finally:
        remove(temporary)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if is_object(folder):
        remove_folder(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move(files: list[tuple[Path, Path]]) -> None:
    """Give files other names in their file system, or store."""
    if files and is_object(files[0][0]):
        move_all(files)
        return
    for old, new in files:
        old.rename(new)


def publish(temporary: Path, final: Path) -> None:
    """Flush a scratch folder to the disk and give it its name: readers see all of it or nothing.

    In an object store the shards lie there already (cluster/version.py), and the manifest is moved last: a version is one that
    has it.
    """
    if is_object(final):
        for names in ((LEDGER_FILE, CARD_FILE), (MANIFEST,)):
            move([(temporary / name, final / name) for name in names])
        return
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    temporary.rename(final)
    _flush_folder(final.parent)


def _flush_folder(path: Path) -> None:
    """Make a rename last: the name is in the folder, not in the file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command: it goes on where it stopped"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the same command: it goes on where it stopped"),
    errno.EROFS: ("the folder cannot be written: the file system is read-only", "choose another folder: --out DIR"),
    errno.EACCES: ("no permission", "choose another folder, or change its permissions"),
    errno.EPERM: ("no permission", "choose another folder, or change its permissions"),
    errno.ENOTDIR: ("a file is where a folder should be", "choose another folder: --out DIR"),
    errno.ENOTEMPTY: ("a folder is in the way that is no version", "move it away, then run the same command"),
    errno.EEXIST: ("a file is where a folder should be", "choose another folder: --out DIR"),
}

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # which no object store says

_SQLITE_ERRORS = {  # by primary result code
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.ENOSPC,  # what a full disk looks like when the shared-memory file cannot grow
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


def open_table(path: Path, *columns: str) -> pq.ParquetFile:
    """Open a Parquet file that a stage has left. Raises StoreError where it is damaged or lacks a column."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise StoreError(f"{path} is damaged: {error}", hint="run `synth generate` again, without --from-stage") from None
    if missing := set(columns) - set(file.schema_arrow.names):
        raise StoreError(f"{path} has no column {min(missing)}", hint="run `synth generate` again, without --from-stage")
    return file


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk, or an object store, refuses into one StoreError that names the folder and a way out."""
    with explained(path) if is_object(path) else nullcontext():
        try:
            yield
        except SynthError:
            raise
        except sqlite3.DatabaseError as error:
            damaged = (f"the journal is damaged: {error}", "move the folder `journal` away to ask everything again")
            what, hint = _DISK_ERRORS.get(_SQLITE_ERRORS.get(error.sqlite_errorcode & 0xFF, 0), damaged)
            raise StoreError(f"{gettempdir() if is_object(path) else path}: {what}", hint=hint) from None
        except OSError as error:
            of_disk = not is_object(path) or error.errno in _OF_DISKS or Path(str(error.filename)).is_absolute()
            if error.errno not in _DISK_ERRORS or not of_disk:
                raise
            what, hint = _DISK_ERRORS[error.errno]
            disk = error.filename or (gettempdir() if is_object(path) else path)
            raise StoreError(f"{disk}: {what}", hint=hint) from None
