"""Write files atomically, on disk or in an object store, and report disk errors as StoreError.

A file is written under a temporary name, flushed and renamed. If the old file has the same content, it is not
replaced, so that repeating a command writes nothing.
"""

import errno
import filecmp
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StoreError, SynthError
from pipeline.storage.object_store import (
    arrow_location,
    filesystem_of,
    is_remote,
    key_of,
    translate_store_errors,
    upload,
)
from pipeline.storage.untrusted import read_regular
from pipeline.tables import PIXELS

log = logging.getLogger(__name__)
_RESUME = "then run the same command: it resumes"
_OTHER_FOLDER = "choose another folder: --out DIR"
_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", f"free some space, {_RESUME}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space, {_RESUME}"),
    errno.EROFS: ("the file system is read-only", _OTHER_FOLDER),
    errno.EACCES: ("no permission", "choose another folder, or change its permissions"),
    errno.ENOTDIR: ("a file exists where a folder should be", _OTHER_FOLDER),
    errno.ENOENT: ("it does not exist and cannot be created", "restore it, or choose another folder"),
    errno.EMFILE: ("too many files are open", f"raise the limit (`ulimit -n 4096`), {_RESUME}"),
    errno.EIO: ("the disk has errors", "check the kernel log (`dmesg`), and copy the folder to another disk"),
    errno.EEXIST: ("a file exists where a folder should be", _OTHER_FOLDER),
    errno.EBUSY: ("another program is using the file", f"close it, {_RESUME}"),
    errno.ENOTEMPTY: ("a folder that is not a version has this name", f"move it away, {_RESUME}"),
}
# Object stores never raise these errors, so the cause is a full or read-only temporary folder.
DISK_ONLY_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_ERRNO_OF_SQLITE_CODE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    # On a full disk, SQLite fails to extend its shared-memory file.
    sqlite3.SQLITE_IOERR: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
}
BATCH_ROWS = 16_384
SCRATCH = ".next"
TEMPORARY_FILES = ".*.tmp"
MAX_JSON_BYTES = 100_000_000
_REMAKE = "run `synth generate` again to make the file"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary local path. It replaces `path` on success and is removed on failure."""
    if is_remote(path):
        with TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            upload(temporary, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut the name, since file systems allow at most 255 bytes, and the name of a photo may be as long.
    temporary = path.with_name(os.fsdecode(os.fsencode(f".{path.name}")[:250]) + ".tmp")
    # The temporary file may be left from a killed run, or be a link to another file.
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        # `filecmp` caches results by size and time, which may be equal for two successive writes.
        filecmp.clear_cache()
        if path.exists() and not path.is_symlink() and filecmp.cmp(path, temporary, shallow=False):
            return
        flush_file(temporary)
        temporary.replace(path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a value as indented JSON that ends with a line break."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UnsafeFileError if `path` is too large or not a regular file."""
    return cast(dict[str, Any], json.loads(read_file(path, MAX_JSON_BYTES)))


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file or object. Raises UnsafeFileError if it is too large or not regular."""
    return path.read_bytes() if is_remote(path) else read_regular(path, max_bytes=max_bytes)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file. With `columns`, only the byte ranges of these columns are read."""
    return pq.read_table(**arrow_location(path), columns=columns, page_checksum_verification=True)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file and read its metadata."""
    return pq.ParquetFile(**arrow_location(path), page_checksum_verification=True)


def open_table(path: Path, *columns: str) -> pq.ParquetFile:
    """Open a Parquet file that a step wrote.

    Raises StoreError if it is missing or damaged, or lacks one of `columns`.
    """
    try:
        file = open_parquet(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing", hint=_REMAKE) from None
    except pa.ArrowInvalid as error:
        raise StoreError(f"{path} is damaged: {error}", hint=_REMAKE) from None
    if missing := set(columns) - set(file.schema_arrow.names):
        raise StoreError(f"{path} has no column {min(missing)}", hint=_REMAKE)
    return file


def write_table(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write tables to one Parquet file atomically. Only one table is in memory at a time."""
    with atomic_write(path) as temporary, open_writer(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table.select(schema.names).cast(schema))


def open_writer(
    target: Path | pa.NativeFile, schema: pa.Schema, *, by_content: bool = False
) -> pq.ParquetWriter:
    """Return a Parquet writer. Pixel columns are written without compression, dictionary and statistics.

    With `by_content`, page boundaries depend on the content, so inserted rows leave most pages unchanged.
    """
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    leaves = [columns.column(n).path for n in range(len(columns))]
    # Versions have the columns PIXELS. The image store and exports have `images`.
    pixels = (*PIXELS, "images")
    texts = [path for path in leaves if path.split(".")[0] not in pixels]
    return pq.ParquetWriter(
        target.absolute() if isinstance(target, Path) else target,
        schema,
        compression={path: "zstd" if path in texts else "none" for path in leaves},
        use_dictionary=texts,
        write_statistics=texts,
        write_page_checksum=True,
        use_content_defined_chunking=by_content,
    )


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of a step file in batches. For an empty file, yield one empty table."""
    file = open_table(path, *(columns or ()))
    names = file.schema_arrow.names if columns is None else [*columns]
    is_empty = True
    for batch in file.iter_batches(BATCH_ROWS, columns=names):
        is_empty = False
        yield pa.Table.from_batches([batch]).select(names)
    if is_empty:
        yield file.schema_arrow.empty_table().select(names)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty temporary folder in `parent`. It is removed on exit with all files left in it."""
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
        with suppress(FileNotFoundError):
            filesystem_of(folder).rm(key_of(folder), recursive=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("cannot remove the whole folder %s", folder)


def move(files: list[tuple[Path, Path]]) -> None:
    """Rename files, given as (old, new). Both must be on the same file system or in the same store."""
    if files and is_remote(files[0][0]):  # one call copies all files in parallel
        fs = filesystem_of(files[0][0])
        fs.copy([key_of(old) for old, _ in files], [key_of(new) for _, new in files])
        fs.rm([key_of(old) for old, _ in files])
        return
    for old, new in files:
        old.rename(new)


def flush_file(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush a folder to disk, so that renames in it survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn errors from the disk or object store that holds a dataset folder into StoreError."""
    folder = gettempdir() if is_remote(path) else path
    with translate_store_errors(path) if is_remote(path) else nullcontext():
        try:
            yield
        except SynthError:
            raise
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
            damage = (f"the journal is damaged: {error}", f"run `synth check {path}`")
            problem, hint = _DISK_ERRORS.get(_ERRNO_OF_SQLITE_CODE.get(code, 0), damage)
            raise StoreError(f"{folder}: {problem}", hint=hint) from None
        except OSError as error:
            # Arrow raises a plain OSError for a wrong checksum or a page that cannot be decompressed.
            if type(error) is OSError and error.errno is None:
                hint = f"find the file with `synth check {folder}`"
                raise StoreError(f"{folder}: a file is damaged: {error}", hint=hint) from None
            is_local = not is_remote(path) or Path(str(error.filename)).is_absolute()
            is_of_file = is_local and error.filename is not None
            if not (is_of_file or error.errno in (_DISK_ERRORS if is_local else DISK_ONLY_ERRORS)):
                raise
            problem, hint = _DISK_ERRORS.get(error.errno or 0, (str(error.strerror), f"solve it, {_RESUME}"))
            # The rename failed because its target is a folder with files, so report the target.
            target = error.filename2 if error.errno == errno.ENOTEMPTY else None
            raise StoreError(f"{target or error.filename or folder}: {problem}", hint=hint) from None
