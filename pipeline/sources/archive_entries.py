"""Read the images and texts of tar and zip files of strangers, unpacked in memory alone.

Links, devices, encrypted entries, names that lead out of the archive and entries that are too large are refused, each for a
reason. An archive that is damaged, or unpacks to very much more than its size, is an error.
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
from copy import copy
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, Literal, cast

from pipeline.errors import SourceError, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.sources.base import MAX_METADATA_BYTES
from pipeline.sources.local_files import UNREAD_SUFFIXES
from pipeline.sources.metadata_files import METADATA_FILES
from pipeline.storage.untrusted import is_hidden

TEXT_SUFFIXES = (".txt", ".json")
MAX_TEXT_BYTES = 1_000_000  # of a file beside an image
MAX_HEADER_BYTES = 1_000_000  # of a long name in a tar file
MAX_UNPACK_RATIO, FREE_UNPACKED_BYTES = 200, 100_000_000  # to how many times its size an archive may unpack, beyond the first
MAX_SPARSE_BLOCKS, MAX_ZERO_BLOCKS = 10_000, 20_000  # of the map of a sparse file, and behind the end of an archive
BLOCK_BYTES = 1 << 20
MAX_DECODER_BYTES = 300_000_000  # of the dictionary of LZMA; its strongest usual setting takes 65 MB
MAGIC_BYTES = 6
_DRIVE = re.compile(r"[A-Za-z]:")
_DECODERS: dict[bytes, Callable[[Any], Any]] = {  # by how a file begins; each reads several streams, and gives little at once
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": lambda file: bz2.BZ2File(file, "rb"),
    b"\xfd7zXZ": lambda file: lzma.LZMAFile(file, "rb"),  # noqa: SIM115  # closed with the file below it
}
_DAMAGES = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    MemoryError,
    struct.error,
    NotImplementedError,
    ValueError,
    LookupError,
)
REASONS = {
    "outside_archive": "its name leads out of the archive",
    "not_a_file": "a link, a pipe or a device, not a regular file",
    "file_too_large": f"more than {MAX_IMAGE_BYTES:,} bytes",
    "encrypted": "it is encrypted",
    "unreadable_entry": "it is damaged, or packed by a method that is not known here",
    "unsupported_format": "files of this kind are not read: convert them to JPEG or PNG",
}
# What is read of an archive. Images have no data where texts are wanted; rows about several images are among the texts alone.
Wanted = Literal["texts", "images", "both"]


@dataclass(frozen=True, slots=True)
class Entry:
    """An image or a text file of an archive; without `data` it is refused, for a reason."""

    name: str
    data: bytes | None
    reason: str = ""

    @property
    def stem(self) -> str:
        """Return the name without its suffix."""
        return posixpath.splitext(self.name)[0]


def read_entries(file: BinaryIO, name: str, wanted: Wanted = "both") -> Iterator[Entry]:
    """Yield the images and texts of an archive.

    Raise SourceError if it is damaged, or a bomb.
    """
    try:
        magic = file.read(MAGIC_BYTES)
        file.seek(0)
        if magic.startswith(b"PK"):
            yield from _read_zip(file, name, wanted)
        else:
            packed = _CountedFile(file)
            decode = next((decoder for start, decoder in _DECODERS.items() if magic.startswith(start)), lambda stream: stream)
            yield from _read_tar(decode(packed), packed, name, wanted)
    except OSError as error:
        if error.errno is not None:  # of the disk; decoders raise others
            raise
        raise _damage_error(name, error) from None
    except (*_DAMAGES, RuntimeError) as error:
        raise _damage_error(name, error) from None


class _StrictTarInfo(tarfile.TarInfo):
    """A header of a stranger: long names are bounded, maps of sparse files are not read, and a damaged one raises.

    tarfile reads names and maps into memory, however long they are, and takes a damaged header for the end of the archive.
    """

    _LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> "_StrictTarInfo":
        """Return the next header. Raise ValueError for a damaged one, or none, before the blocks that end an archive."""
        try:
            header = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.zero_blocks = getattr(tarfile_, "zero_blocks", 0) + 1  # another archive may follow, as after `cat`
            if tarfile_.zero_blocks > MAX_ZERO_BLOCKS:
                raise tarfile.EmptyHeaderError("nothing but zeros") from None  # type: ignore[attr-defined]
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # type: ignore[attr-defined]
            if not getattr(tarfile_, "zero_blocks", 0):
                raise ValueError(str(error) if str(error) != "empty header" else "its end is missing") from None
            raise tarfile.EmptyHeaderError("after the end") from None  # type: ignore[attr-defined]
        tarfile_.zero_blocks = 0
        return header

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:
        if self.type in self._LONG and self.size > MAX_HEADER_BYTES:
            raise ValueError(f"a header has {self.size:,} bytes")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]  # it is not in the stubs

    def _proc_sparse(self, tar: Any) -> tarfile.TarInfo:
        """Skip the map of a sparse file of GNU's old form."""
        _, is_extended, _ = self._sparse_structs  # type: ignore[attr-defined]
        for _ in range(MAX_SPARSE_BLOCKS):
            if not is_extended:
                break
            is_extended = bool(tar.fileobj.read(tarfile.BLOCKSIZE)[504:505].strip(b"\0"))
        else:
            raise ValueError("the map of a sparse file has no end")
        self.sparse = []  # type: ignore[assignment]
        self.offset_data = tar.fileobj.tell()
        tar.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self

    def _proc_gnusparse_00(self, following: tarfile.TarInfo, *_: Any) -> None:
        following.sparse = []  # type: ignore[assignment]  # it is refused

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


class _CountedFile:
    """A file that counts the bytes that were read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.num_bytes = file, 0

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        data = self._file.read(size)
        self.num_bytes += len(data)
        return data


def _read_tar(stream: Any, packed: _CountedFile, name: str, wanted: Wanted) -> Iterator[Entry]:
    """Yield the entries of a tar file in its order; `packed` counts what was read for the stream."""
    unpacked_bytes = 0
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo, ignore_zeros=True) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which would keep every header
            is_wanted = _is_wanted(member.name, wanted)
            is_file = member.isreg() and not member.issparse()
            if not is_file and is_wanted:
                yield Entry(_as_text(member.name), None, "unreadable_entry" if member.isreg() else "not_a_file")
            if not is_file and member.type in tarfile.SUPPORTED_TYPES:
                continue
            content = tar.extractfile(member)  # also of an unknown type, which has data as well
            assert content is not None
            is_wanted = is_wanted and is_file
            if is_wanted and _has_data(member.name, wanted):
                entry = _read_entry(member.name, member.size, content.read)
                unpacked_bytes += len(entry.data or b"")
                yield entry
            elif is_wanted:
                yield Entry(_as_text(member.name), b"")
            while block := content.read(BLOCK_BYTES):  # it has to be unpacked to find the next entry
                unpacked_bytes += len(block)
                _require_no_bomb(name, unpacked_bytes, packed.num_bytes)
            _require_no_bomb(name, unpacked_bytes, packed.num_bytes)


def _read_zip(file: BinaryIO, name: str, wanted: Wanted) -> Iterator[Entry]:
    """Yield the entries of a zip file; a name counts once."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
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

    def read(most_bytes: int) -> bytes:
        if info.compress_type in _BOUNDED_DECODERS:
            return _decode_bounded(archive, info, most_bytes)
        with archive.open(info) as content:
            return content.read(most_bytes)

    try:
        return _read_entry(info.filename, info.file_size, read)
    except _DAMAGES:
        return Entry(_as_text(info.filename), None, "unreadable_entry")
    except OSError as error:
        if error.errno is None:  # of bz2, for damaged data; else the disk fails
            return Entry(_as_text(info.filename), None, "unreadable_entry")
        raise


def _decode_bounded(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytes:
    """Return an entry that is packed by bzip2 or LZMA, of which zipfile decodes all at once, whatever the directory says.

    Raise ValueError if it is longer than the directory says, or another content.
    """
    packed = copy(info)
    packed.compress_type, packed.file_size, packed.CRC = zipfile.ZIP_STORED, info.compress_size, None  # type: ignore[assignment]
    data, longest = bytearray(), min(most_bytes, info.file_size + 1)
    with archive.open(packed) as content:
        decoder = _BOUNDED_DECODERS[info.compress_type](content, info)
        while len(data) < longest and not decoder.eof and (block := content.read(BLOCK_BYTES) if decoder.needs_input else b"x"):
            data += decoder.decompress(block if decoder.needs_input else b"", longest - len(data))
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise ValueError("it is not what the directory says")
    return bytes(data)


def _lzma_decoder(content: IO[bytes], info: zipfile.ZipInfo) -> lzma.LZMADecompressor:
    """Return a decoder of the rest of an LZMA entry, whose own header becomes that of a .lzma file."""
    _, _, size = struct.unpack("<BBH", content.read(4))  # two parts of a version, and how long the properties are
    decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_DECODER_BYTES)
    has_end_mark = info.flag_bits & 2
    decoder.decompress(content.read(size) + (b"\xff" * 8 if has_end_mark else struct.pack("<Q", info.file_size)), 0)
    return decoder


_BOUNDED_DECODERS: dict[int, Callable[[IO[bytes], zipfile.ZipInfo], Any]] = {
    zipfile.ZIP_BZIP2: lambda *_: bz2.BZ2Decompressor(),
    zipfile.ZIP_LZMA: _lzma_decoder,
}


def _read_entry(name: str, size: int, read: Callable[[int], bytes]) -> Entry:
    shown = _as_text(name)
    if shown.startswith("/") or ".." in shown.split("/") or _DRIVE.match(shown):
        return Entry(shown, None, "outside_archive")
    if _has_suffix(name, UNREAD_SUFFIXES):
        return Entry(shown, None, "unsupported_format")
    most_bytes = MAX_METADATA_BYTES if is_metadata(name) else MAX_TEXT_BYTES if is_text(name) else MAX_IMAGE_BYTES
    data = read(most_bytes + 1) if size <= most_bytes else b""
    if size > most_bytes or len(data) > most_bytes:
        return Entry(shown, None, "file_too_large")
    return Entry(shown, data)


def _require_no_bomb(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    if unpacked_bytes > MAX_UNPACK_RATIO * packed_bytes + FREE_UNPACKED_BYTES:
        message = f"{name} unpacks to over {unpacked_bytes:,} bytes from {packed_bytes:,}"
        raise SourceError(message, hint="it may be made to fill memory: unpack it yourself, and read it as a folder")


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
    is_image = _has_suffix(name, IMAGE_SUFFIXES | UNREAD_SUFFIXES)
    return is_image or (wanted != "images" and is_text(name)) or (wanted == "texts" and is_metadata(name))


def _has_data(name: str, wanted: Wanted) -> bool:
    return wanted != "texts" or is_text(name) or is_metadata(name)


def _as_text(name: str) -> str:
    """Return the name of an entry with slashes between folders, as text that UTF-8 can hold."""
    return name.replace("\\", "/").encode("utf-8", "backslashreplace").decode().removeprefix("./")
