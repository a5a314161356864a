"""Atomic file writes, on a disk or in an object store, and disk errors as StoreError.

A file is written under a temporary name, flushed and renamed. A file whose content would not change is not replaced, so that a
second run of the same command writes nothing.
"""

import errno
import filecmp
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import StoreError, SynthError, TableError
from pipeline.storage.object_store import arrow_location, is_remote, move_all, remove_folder, translate_store_errors, upload
from pipeline.storage.untrusted import read_regular
from pipeline.tables import PIXELS

log = logging.getLogger(__name__)
_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command: it goes on where it stopped"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the same command: it goes on where it stopped"),
    errno.EFBIG: ("a file may not grow this large here", "raise the limit (`ulimit -f`), then run the same command"),
    errno.EROFS: (
        "the folder cannot be written: the file system is read-only",
        "choose a folder on another disk (--out DIR), or a copy of this one",
    ),
    errno.EACCES: ("no permission", "choose another folder, or change its permissions"),
    errno.EPERM: ("no permission", "choose another folder, or change its permissions"),
    errno.ENOENT: ("it is not there, and cannot be made", "choose another folder, or bring back what was removed"),
    errno.ENOTDIR: ("a file is where a folder should be", "choose another folder: --out DIR"),
    errno.ENOTEMPTY: ("a folder is in the way that is not a version", "move it away, then run the same command"),
    errno.EEXIST: ("a file is where a folder should be", "choose another folder: --out DIR"),
    errno.EIO: ("the disk fails to read or write", "look at its log (`dmesg`), and copy the folder to another disk"),
    errno.ESTALE: ("the network file system has lost the file", "mount it again, then run the same command"),
    errno.EMFILE: ("too many files are open", "raise the limit (`ulimit -n 4096`), then run the same command"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs, then run the same command"),
    errno.EBUSY: ("another program holds the file", "close it, then run the same command"),
    errno.ENAMETOOLONG: ("the name is too long", "choose another folder: --out DIR"),
    errno.EXDEV: ("it lies on two file systems", "copy the dataset folder, and use the copy"),
    errno.ELOOP: ("a link leads to itself", "remove it"),
}
_DISK_ONLY_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # that no object store raises
_SQLITE_ERRORS = {  # by primary result code
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.ENOSPC,  # raised on a full disk if the shared-memory file cannot grow
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
}
BATCH_ROWS = 16_384  # read at once
SCRATCH = ".next"  # the name of scratch folders
TEMPORARY_FILES = ".*.tmp"  # a pattern of the names of files that are being written
MAX_JSON_BYTES = 100_000_000  # of a file of our own, such as a manifest


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary local path; it replaces `path` on success, and is removed on failure."""
    if is_remote(path):
        with TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)  # of a killed run, or a link that leads elsewhere
    try:
        yield temporary
        filecmp.clear_cache()  # which knows files by size and time: two may be written within one tick of the clock
        if path.exists() and not path.is_symlink() and filecmp.cmp(path, temporary, shallow=False):
            return
        flush_file(temporary)
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return the name under which a file is written before it gets its own."""
    return path.with_name(f".{path.name}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people can read and diff."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a value as JSON that people can read and diff."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` wrote. Raise UnsafeFileError if it is not a file, or too large for one."""
    return cast(dict[str, Any], json.loads(read_file(path, MAX_JSON_BYTES)))


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file or an object. Raise UnsafeFileError if it is not a regular file, or too large."""
    return path.read_bytes() if is_remote(path) else read_regular(path, max_bytes=max_bytes)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns; of an object, only their byte ranges."""
    return pq.read_table(**arrow_location(path), columns=columns, page_checksum_verification=True)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; only its metadata is read."""
    return pq.ParquetFile(**arrow_location(path), page_checksum_verification=True)


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables one after another to a Parquet file, atomically; one table is in memory at a time."""
    with atomic_write(path) as temporary, open_writer(temporary, schema) as writer:
        for table in tables:
            writer.write_table(_cast(table, schema))


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast a table to a schema. Raises TableError that names a column with a value of another type."""
    columns = []
    for field in schema:
        try:
            columns.append(table[field.name].cast(field.type))
        except pa.ArrowInvalid as error:
            problem = f"the column {field.name} has a value that is not of type {field.type}: {error}"
            raise TableError(problem, hint=f"write values of type {field.type}, or null") from None
    return pa.Table.from_arrays(columns, schema=schema)


def open_writer(target: Path | pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of Parquet to a local file, with options by column: see `writer_options`."""
    return pq.ParquetWriter(target.absolute() if isinstance(target, Path) else target, schema, **writer_options(schema))


def writer_options(schema: pa.Schema) -> dict[str, Any]:
    """Return the Parquet options of the columns: all but pixels are compressed, and have dictionaries and statistics."""
    leaves = [path for field in schema for path in _leaves(field.name, field.type)]
    pixels = (*PIXELS, "images")  # the columns of a version, and the one of steps and exports
    texts = [path for path in leaves if path.split(".")[0] not in pixels]
    return {
        "compression": {path: "zstd" if path in texts else "none" for path in leaves},
        "use_dictionary": texts,
        "write_statistics": texts,
        "write_page_checksum": True,  # readers of ours notice a rotten bit
    }


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """Return the names that Parquet gives to the columns of a nested type."""
    if pa.types.is_struct(kind):
        return [leaf for n in range(kind.num_fields) for leaf in _leaves(f"{path}.{kind.field(n).name}", kind.field(n).type)]
    if pa.types.is_map(kind):
        key, value = f"{path}.key_value.key", f"{path}.key_value.value"
        return [*_leaves(key, kind.key_type), *_leaves(value, kind.item_type)]
    return _leaves(f"{path}.list.element", kind.value_type) if pa.types.is_list(kind) else [path]


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of a step's file in batches; at least one table, which may be empty."""
    file = open_table(path)
    stored = file.schema_arrow.names
    names = stored if columns is None else [*columns]
    if missing := sorted(set(names) - set(stored)):
        raise TableError(f"{path} lacks {', '.join(missing)}", hint="run `synth generate` again: it makes the file")
    is_empty = True
    for batch in file.iter_batches(BATCH_ROWS, columns=names):
        is_empty = False
        yield pa.Table.from_batches([batch]).select(names)
    if is_empty:
        yield file.schema_arrow.empty_table().select(names)


def find_rows(file: pq.ParquetFile, columns: Sequence[str], sample_ids: Collection[str]) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file that are about some samples; of row groups that have none, only ids are read."""
    is_wanted = pc.is_in(file.read(["sample_id"])["sample_id"], pa.array(sample_ids, pa.string()))
    start = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        of_group = is_wanted.slice(start, num_rows)
        if pc.any(of_group).as_py():
            yield file.read_row_group(group, list(columns)).filter(of_group)
        start += num_rows


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty temporary folder in `parent`; whatever is not moved out of it is removed."""
    temporary = parent / SCRATCH
    remove(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
    finally:
        remove(temporary)


def remove(folder: Path) -> None:
    """Remove a folder with its content, if it exists."""
    if is_remote(folder):
        remove_folder(folder)
        return
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s is left behind: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)


def move(files: list[tuple[Path, Path]]) -> None:
    """Rename files within their file system or store."""
    if files and is_remote(files[0][0]):
        move_all(files)
        return
    for old, new in files:
        old.rename(new)


def flush_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_table(path: Path, *columns: str) -> pq.ParquetFile:
    """Open a Parquet file that a step wrote. Raise StoreError if it is damaged or lacks a column."""
    hint = "run `synth generate` again: it makes the file"
    try:
        file = open_parquet(path)
    except pa.ArrowInvalid as error:
        raise StoreError(f"{path} is damaged: {error}", hint=hint) from None
    if missing := set(columns) - set(file.schema_arrow.names):
        raise StoreError(f"{path} has no column {min(missing)}", hint=hint)
    return file


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of a disk or an object store into StoreError, with the folder and a hint."""
    folder = gettempdir() if is_remote(path) else path
    with translate_store_errors(path) if is_remote(path) else nullcontext():
        try:
            yield
        except SynthError:
            raise
        except sqlite3.DatabaseError as error:
            repair = f"`synth check {path} --repair` keeps every reply that can be read; the next run asks the others again"
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # of SQLite, not of its Python module
            damaged = (f"the journal is damaged: {error}", repair)
            problem, hint = _DISK_ERRORS.get(_SQLITE_ERRORS.get(code, 0), damaged)
            raise StoreError(f"{folder}: {problem}", hint=hint) from None
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # Arrow's: a page has another checksum, or cannot be inflated
                raise StoreError(f"{folder}: a file is damaged: {error}", hint=f"`synth check {folder}` says which") from None
            is_disk_error = not is_remote(path) or error.errno in _DISK_ONLY_ERRORS or Path(str(error.filename)).is_absolute()
            if error.errno not in _DISK_ERRORS or not is_disk_error:
                raise
            problem, hint = _DISK_ERRORS[error.errno]
            in_the_way = error.filename2 if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else None  # the target of a move
            raise StoreError(f"{in_the_way or error.filename or folder}: {problem}", hint=hint) from None
