"""Read the images and texts of untrusted tar and zip files in memory, by `tarfile` and `zipfile`.

Links, devices, encrypted entries, names that lead out of the archive and entries that are too large are rejected, each with a
reason. A damaged archive, or one that unpacks to far more bytes than it has, is an error.
"""

import bz2
import gzip
import lzma
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

from pipeline.errors import SourceError, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.sources.local_files import UNREAD_SUFFIXES
from pipeline.sources.references import METADATA_FILES
from pipeline.storage.untrusted import is_hidden

TEXT_SUFFIXES = (".txt", ".json")
MAX_TEXT_BYTES = 1_000_000  # bytes of one text file
MAX_HEADER_BYTES = 1_000_000  # bytes of one long name in a tar file
MAX_MEMBERS = 3_000_000  # members of one archive
MAX_DIRECTORY_BYTES = 300_000_000  # bytes of the directory of a zip file, which zipfile reads as a whole
MAX_UNPACK_RATIO, FREE_UNPACKED_BYTES = 200, 100_000_000  # an archive may unpack to RATIO times its size, plus FREE bytes
BLOCK_BYTES = 1 << 20
MAGIC_BYTES = 6
_DRIVE = re.compile(r"[A-Za-z]:")
# Decoders by the first bytes of a file. Each reads several streams in a row, and returns no more bytes than are asked for.
_DECODERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": lambda file: bz2.BZ2File(file, "rb"),
    b"\xfd7zXZ": lambda file: lzma.LZMAFile(file, "rb"),  # noqa: SIM115  # closed with the file below it
}
# Of other methods, zipfile unpacks all at once, whatever size the directory states.
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGES = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    MemoryError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
)
REASONS = {
    "outside_archive": "its name leads out of the archive",
    "not_a_file": "a link, a pipe or a device, not a regular file",
    "file_too_large": f"more than {MAX_IMAGE_BYTES:,} bytes",
    "encrypted": "it is encrypted",
    "unreadable_entry": "it is damaged, or packed by another method than deflate",
    "unsupported_format": "files of this kind are not read: convert them to JPEG or PNG",
}
Wanted = Literal["texts", "images", "both"]  # the entries to read; with "texts", images and tables are listed without data


@dataclass(frozen=True, slots=True)
class Entry:
    """An image or a text file of an archive; without `data` it is rejected for a reason."""

    name: str
    data: bytes | None
    reason: str = ""

    @property
    def stem(self) -> str:
        """Return the name without its suffix."""
        return posixpath.splitext(self.name)[0]


def read_entries(file: BinaryIO, name: str, wanted: Wanted = "both") -> Iterator[Entry]:
    """Yield the images and texts of an archive. Raise SourceError if it is damaged, or a bomb."""
    try:
        magic = file.read(MAGIC_BYTES)
        file.seek(0)
        if magic.startswith(b"PK"):
            yield from _read_zip(file, name, wanted)
        else:
            packed = _CountedFile(file)
            decode = next((decoder for start, decoder in _DECODERS.items() if magic.startswith(start)), lambda stream: stream)
            unpacked = _CountedFile(decode(packed), lambda count: _require_no_bomb(name, count, packed.num_bytes))
            yield from _read_tar(unpacked, name, wanted)
    except OSError as error:
        if error.errno is not None:  # an error of the disk; those of decoders have no number
            raise
        raise _damage_error(name, error) from None
    except _DAMAGES as error:
        raise _damage_error(name, error) from None


class _CountedFile:
    """A file that counts the bytes that were read, and checks their number after each read."""

    def __init__(self, file: Any, check: Callable[[int], None] = lambda _: None) -> None:
        self._file, self._check, self.num_bytes = file, check, 0

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        data = cast(bytes, self._file.read(size))
        self.num_bytes += len(data)
        self._check(self.num_bytes)
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """A header of a tar file that bounds long names, refuses sparse files, and raises ValueError if it is damaged.

    tarfile reads names and maps of sparse files into memory, however long they are, and takes a damaged header for the end.
    """

    _LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_StrictTarInfo":
        """Return the next header. Raise ValueError for a damaged header, or for an end without the blocks that mark it."""
        try:
            return super().fromtarfile(tarfile)
        except _BAD_HEADERS as error:
            raise ValueError(str(error) if str(error) != "empty header" else "its end is missing") from None

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:
        if self.type in self._LONG and self.size > MAX_HEADER_BYTES:
            raise ValueError(f"a header has {self.size:,} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]  # it is not in the stubs

    def _refuse_sparse(self, *_: Any) -> None:
        raise ValueError(f"{self.name} is a sparse file: pack it without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


_BAD_HEADERS = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError)  # type: ignore[attr-defined]


def _read_tar(stream: _CountedFile, name: str, wanted: Wanted) -> Iterator[Entry]:
    """Yield the entries of a tar file in its order."""
    with tarfile.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_StrictTarInfo) as tar:
        for number, member in enumerate(tar, 1):
            tar.members = []  # type: ignore[attr-defined]  # which would keep every header
            _require_few_members(name, number)
            content = tar.extractfile(member) if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES else None
            if _is_wanted(member.name, wanted):
                if content is None or not member.isreg():
                    yield Entry(_as_text(member.name), None, "not_a_file")
                elif _has_data(member.name, wanted):
                    yield _read_entry(member.name, member.size, content.read)
                else:
                    yield Entry(_as_text(member.name), b"")
            while content is not None and content.read(BLOCK_BYTES):  # tarfile would skip a size that the file does not have
                pass
        if tar.fileobj.read(BLOCK_BYTES).strip(b"\0"):
            message = f"{name} goes on after its end, as several archives do that `cat` has joined"
            raise SourceError(message, hint="unpack it with tar --ignore-zeros, and read it as a folder")


def _read_zip(file: BinaryIO, name: str, wanted: Wanted) -> Iterator[Entry]:
    """Yield the entries of a zip file; a name counts once."""
    size = file.seek(0, 2)
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
        raise _size_error(f"the directory of {name} has more than {MAX_DIRECTORY_BYTES:,} bytes")
    with zipfile.ZipFile(file) as archive:
        _require_few_members(name, len(archive.infolist()))
        infos = {i.filename: i for i in archive.infolist() if not i.is_dir() and _is_wanted(i.filename, wanted)}
        _require_no_bomb(name, sum(info.file_size for info in infos.values()), size)
        for info in infos.values():
            if _has_data(info.filename, wanted):
                yield _read_zip_entry(archive, info)
            else:
                yield Entry(_as_text(info.filename), b"")


def _read_zip_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        return Entry(_as_text(info.filename), None, "not_a_file")
    if info.flag_bits & 1:
        return Entry(_as_text(info.filename), None, "encrypted")
    if info.compress_type not in _ZIP_METHODS:
        return Entry(_as_text(info.filename), None, "unreadable_entry")

    def read(most_bytes: int) -> bytes:
        with archive.open(info) as content:
            return content.read(most_bytes)

    try:
        return _read_entry(info.filename, info.file_size, read)
    except _DAMAGES:
        return Entry(_as_text(info.filename), None, "unreadable_entry")


def _read_entry(name: str, size: int, read: Callable[[int], bytes]) -> Entry:
    shown = _as_text(name)
    if shown.startswith("/") or ".." in shown.split("/") or _DRIVE.match(shown):
        return Entry(shown, None, "outside_archive")
    if _has_suffix(name, UNREAD_SUFFIXES):
        return Entry(shown, None, "unsupported_format")
    most_bytes = MAX_TEXT_BYTES if is_text(name) else MAX_IMAGE_BYTES
    data = read(most_bytes + 1) if size <= most_bytes else b""
    if size > most_bytes or len(data) > most_bytes:
        return Entry(shown, None, "file_too_large")
    return Entry(shown, data)


def _require_few_members(name: str, number: int) -> None:
    if number > MAX_MEMBERS:
        raise _size_error(f"{name} has more than {MAX_MEMBERS:,} members")


def _require_no_bomb(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    if unpacked_bytes > MAX_UNPACK_RATIO * packed_bytes + FREE_UNPACKED_BYTES:
        raise _size_error(f"{name} unpacks to over {unpacked_bytes:,} bytes from {packed_bytes:,}")


def _size_error(message: str) -> SourceError:
    return SourceError(message, hint="it may be made to fill memory: unpack it yourself, and read it as a folder")


def _damage_error(name: str, error: Exception) -> SourceError:
    return SourceError(f"{name} is damaged: {one_line(error)}", hint="fetch it again, or take it out of the folder")


def _has_suffix(name: str, suffixes: Sequence[str] | frozenset[str]) -> bool:
    text = _as_text(name)
    return not is_hidden(text) and posixpath.splitext(text)[1].lower() in suffixes


def is_text(name: str) -> bool:
    """Return whether an entry is a text by its name."""
    return _has_suffix(name, TEXT_SUFFIXES)


def is_metadata(name: str) -> bool:
    """Return whether an entry has rows about several images, by its name."""
    return posixpath.basename(_as_text(name)) in METADATA_FILES


def _is_wanted(name: str, wanted: Wanted) -> bool:
    if _has_suffix(name, IMAGE_SUFFIXES | UNREAD_SUFFIXES):
        return True
    return (wanted != "images" and is_text(name)) or (wanted == "texts" and is_metadata(name))


def _has_data(name: str, wanted: Wanted) -> bool:
    return wanted != "texts" or is_text(name)


def _as_text(name: str) -> str:
    """Return the name of an entry with slashes between folders, as text that UTF-8 can hold."""
    return name.replace("\\", "/").encode("utf-8", "backslashreplace").decode().removeprefix("./")
