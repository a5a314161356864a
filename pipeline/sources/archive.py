"""Source: images in archives (`archive:PATH`): tar files, WebDataset's among them, and zip files.

Nothing is unpacked to a disk. What lies beside an image under its name is about it: the lines of `NAME.txt` are captions, and
`NAME.json` may hold captions, questions, a split, and columns for the context of prompts. Texts are read first, wherever they
stand; of a tar file in a store, which is read once, those that stand next to their image. Links, devices, encrypted entries,
odd names and entries that are too large are rejected; an archive that is damaged, or unpacks to very much more than its size,
is an error.
"""

import bz2
import gzip
import json
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from pipeline.config import Config
from pipeline.dataset.licenses import UNKNOWN
from pipeline.digests import digest, open_file_digest
from pipeline.errors import SourceError, one_line
from pipeline.images.decode import APPLE_DOUBLE, IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import SourceSpec, as_text, check_samples, refuse_roles
from pipeline.sources.captions import SPLIT, decode_text, read_question, read_split, read_texts
from pipeline.sources.columns import stored_split
from pipeline.sources.folder import OF_EVERY_IMAGE, REFERENCE_NAMES, UNREAD_SUFFIXES
from pipeline.sources.parquet import split_of_path
from pipeline.storage.untrusted import UnsafeFileError, open_regular
from pipeline.types import ALL, RawSample, ReferenceQA, Rejected, Source, SourceSlice

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
TEXT_SUFFIXES = (".txt", ".json")
QA = "qa"  # a list of questions in a JSON file
MAX_TEXT_BYTES = 1_000_000  # of a file beside an image
MAX_HEADER_BYTES = 1_000_000  # of a long name in a tar file
MAX_UNPACK_RATIO, FREE_UNPACKED_BYTES = 200, 100_000_000  # to how many times its size an archive may unpack, beyond the first
MAX_GROUP_ENTRIES, MAX_GROUP_BYTES = 64, 64_000_000  # of one key in a tar file that are held at once
MAX_ARCHIVE_TEXT_BYTES = 256_000_000  # of all texts of an archive
MAX_SPARSE_BLOCKS, MAX_ZERO_BLOCKS = 10_000, 20_000  # of the map of a sparse file, and behind the end of an archive
COLUMN_IMAGES = 20  # beside which columns of the context are looked for
BLOCK_BYTES = 1 << 20
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
    NotImplementedError,
    ValueError,
    LookupError,
)
_REASONS = {
    "outside_archive": "its name leads out of the archive",
    "not_a_file": "a link, a pipe or a device, not a regular file",
    "file_too_large": f"more than {MAX_IMAGE_BYTES:,} bytes",
    "encrypted": "it is encrypted",
    "unreadable_entry": "it is damaged, or packed by a method that is not known here",
    "unsupported_format": "files of this kind are not read: convert them to JPEG or PNG",
}


@dataclass(frozen=True, slots=True)
class Archives:
    """Archives by name, with a digest of their contents."""

    names: list[str]
    revision: str
    open: Callable[[str], BinaryIO]
    translate_errors: Callable[[], AbstractContextManager[None]]  # of a disk or a store, into SourceError
    is_local: bool = False


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


@dataclass(slots=True)
class TextIndex:
    """The texts of an archive, or of neighboring entries, by key; and how many images have each key."""

    texts: dict[str, list[Entry]] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        """Add a text, or count an image."""
        if _is_text(entry.name):
            self.texts.setdefault(key_of(entry.name), []).append(entry)
        else:
            self.images[key_of(entry.name)] += 1

    def of(self, image: Entry) -> list[Entry]:
        """Return the texts that have the name of an image; of the only image of a key all texts of the key."""
        key = key_of(image.name)
        return [text for text in self.texts.get(key, ()) if text.stem == image.stem or self.images[key] == 1]


IndexOf = Callable[[str], TextIndex]  # of an archive, by its name
Wanted = Literal["texts", "images", "both"]  # what is read of an archive; images have no data where texts are wanted


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


def pair_neighbors(entries: Iterator[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Yield each image with the texts of its key beside it, as WebDataset groups them; a group that grows too large is cut."""
    for group in _group_neighbors(entries):
        index = TextIndex()
        for entry in group:
            index.add(entry)
        yield from ((entry, index.of(entry)) for entry in group if not _is_text(entry.name))


def _group_neighbors(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    num_bytes = 0
    for entry in entries:
        is_full = len(group) >= MAX_GROUP_ENTRIES or num_bytes >= MAX_GROUP_BYTES
        if group and (key_of(entry.name) != key_of(group[0].name) or is_full):
            yield group
            group, num_bytes = [], 0
        group.append(entry)
        num_bytes += len(entry.data or b"")
    if group:
        yield group


def key_of(name: str) -> str:
    """Return the name up to the first dot of its last part: by WebDataset's rule, entries of one key are one sample."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


class _StrictTarInfo(tarfile.TarInfo):
    """A header of a stranger: long names are bounded, maps of sparse files are not read, and damage is no end.

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
            if not member.isreg() or member.issparse():
                if is_wanted:
                    yield Entry(_as_text(member.name), None, "unreadable_entry" if member.isreg() else "not_a_file")
                continue
            content = tar.extractfile(member)
            assert content is not None
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
    most_bytes = MAX_TEXT_BYTES if _is_text(name) else MAX_IMAGE_BYTES
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
    base = posixpath.basename(_as_text(name))
    return not base.startswith(APPLE_DOUBLE) and posixpath.splitext(base)[1].lower() in suffixes


def _is_text(name: str) -> bool:
    return _has_suffix(name, TEXT_SUFFIXES)


def _is_wanted(name: str, wanted: Wanted) -> bool:
    return _has_suffix(name, IMAGE_SUFFIXES | UNREAD_SUFFIXES) or (wanted != "images" and _is_text(name))


def _has_data(name: str, wanted: Wanted) -> bool:
    return wanted != "texts" or _is_text(name)


def _as_text(name: str) -> str:
    """Return the name of an entry with slashes between folders, as text that UTF-8 can hold."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\\", "/").removeprefix("./")


def _read_beside(texts: Sequence[Entry]) -> tuple[list[str], dict[str, Any]]:
    """Return the captions of the files beside an image, and the values of the JSON among them; what is no text is left out."""
    captions: list[str] = []
    values: dict[str, Any] = {}
    for entry in sorted(texts, key=lambda text: text.name):
        text = _decode(entry.data or b"")
        if entry.name.lower().endswith(".txt"):
            captions += read_texts({"text": text.splitlines()}, ["text"])
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            values |= row
            captions += read_texts(row, REFERENCE_NAMES)
    return list(dict.fromkeys(captions)), values


def _questions_in(values: dict[str, Any]) -> tuple[ReferenceQA, ...]:
    """Return the questions of a JSON file: its own, with their answers, and those of a list `qa`."""
    listed = values.get(QA)
    rows = [values, *(row for row in listed if isinstance(row, dict))] if isinstance(listed, list) else [values]
    return tuple(question for row in rows if (question := read_question(row)))


def _have_questions(archives: Archives, names: Sequence[str], index_of: IndexOf) -> bool:
    """Return whether the first archive has questions, in a store beside its first image: a column is of all images, or none."""
    if archives.is_local:
        with archives.translate_errors():
            texts = list(index_of(names[0]).texts.values())
        return any(_questions_in(_read_beside(of_key)[1]) for of_key in texts)
    with closing(_read_images(archives, names[0], index_of)) as images:
        return any(_questions_in(_read_beside(texts)[1]) for _, texts in islice(images, 1))


def _decode(data: bytes) -> str:
    try:
        return decode_text(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def find_archives(path: str, *, follow_links: bool = False, is_whole: bool = True) -> Archives:
    """Return an archive, or all under a folder, on this disk or in a store. Raise SourceError if there is none.

    `is_whole`: also compute the digest of their contents.
    """
    missing = SourceError(
        f"no archive at {path}", hint=f"pass a file, or a folder with files that end in {', '.join(SUFFIXES)}"
    )
    if "://" in path:
        from pipeline.sources.remote import find_files, translate_errors  # fsspec is imported only when needed

        files = find_files(path, SUFFIXES)
        names = sorted(name for name in files.paths if not posixpath.basename(name).startswith(APPLE_DOUBLE))
        if not names:
            raise missing
        return Archives(names, files.revision, files.open, partial(translate_errors, path))
    root = Path(path).expanduser()
    candidates = [root] if root.is_file() else sorted(root.rglob("*"))
    paths = [file for file in candidates if file.name.lower().endswith(SUFFIXES) and not file.name.startswith(APPLE_DOUBLE)]
    paths = [file for file in paths if file.is_file()]
    if not paths:
        raise missing
    base, bound = (root.parent, None) if root.is_file() else (root, None if follow_links else root)
    path_of = {os.fsencode(file.relative_to(base)).decode("utf-8", "backslashreplace"): file for file in paths}
    translate = partial(_translate_disk_errors, root)

    def open_local(name: str) -> BinaryIO:
        return open_regular(path_of[name], bound)

    with translate():
        contents = []
        for name, file_path in path_of.items():
            with open_regular(file_path, bound) as file:
                contents += [[name, open_file_digest(file)]] if is_whole else []
    return Archives([*path_of], digest(contents) if is_whole else "", open_local, translate, is_local=True)


@contextmanager
def _translate_disk_errors(root: Path) -> Iterator[None]:
    """Turn errors of this disk into SourceError."""
    try:
        yield
    except UnsafeFileError as error:
        raise SourceError(str(error), hint="copy the file there, or pass --follow-links") from None
    except OSError as error:
        raise SourceError(
            f"cannot read {root}: {error.strerror or error}", hint="check its permissions, and the disk"
        ) from None


def open_archives(
    archives: Archives,
    part: SourceSlice = ALL,
    licence: str = UNKNOWN,
    columns: Sequence[str] = (),
    split: str | None = None,
) -> Source:
    """Return the images of archives, or a slice. `columns` of the JSON files beside them, or of EXIF, become the context.

    Raise SourceError if no archive is of the `split`, none of the first images has one of the columns, or, while they are read,
    if an archive is damaged or none has an image.
    """
    names = [name for name in archives.names if split in (None, split_of_path(_without_suffix(name)))]
    if not names:
        raise SourceError(f"no archive is named after the split {split}", hint="the name of a file says its split: train-0.tar")
    index_of = lru_cache(1)(partial(_read_index, archives))  # columns are looked for in the first archive, which is read then
    _require_columns(archives, names, columns, index_of)
    has_questions = _have_questions(archives, names, index_of)
    by_file = len(names) >= part.of

    def read() -> Iterator[RawSample | Rejected]:
        number = -1
        for index, name in enumerate(names):
            if by_file and index % part.of != part.number:
                continue
            of_archive = split_of_path(_without_suffix(name))
            for image, texts in _read_images(archives, name, index_of):
                number += 1
                if by_file or number % part.of == part.number:
                    row = _row(f"{name}/{image.name}", image, texts, licence, columns, of_archive, has_questions=has_questions)
                    if isinstance(row, Rejected) or split in (None, row.fields["split"]):
                        yield row if isinstance(row, Rejected) else _with_stored_split(row, split)
        if number < 0 and part == ALL:
            raise SourceError(
                f"no image in {', '.join(names)[:200]}", hint="PNG, JPEG, WebP and others are read, in folders too"
            )

    return Source(name="archive", revision=archives.revision if part == ALL else "", rows=check_samples(read(), columns))


def _read_images(archives: Archives, name: str, index_of: IndexOf) -> Generator[tuple[Entry, list[Entry]]]:
    """Yield the images of an archive, each with the texts that are about it."""
    with archives.translate_errors():
        index = index_of(name) if archives.is_local else None
        with archives.open(name) as file:
            if index is None:
                yield from pair_neighbors(read_entries(file, name))
            else:
                yield from ((image, index.of(image)) for image in read_entries(file, name, "images"))


def _read_index(archives: Archives, name: str) -> TextIndex:
    index, num_bytes = TextIndex(), 0
    with archives.open(name) as file:
        for entry in read_entries(file, name, "texts"):
            num_bytes += len(entry.data or b"")
            if num_bytes > MAX_ARCHIVE_TEXT_BYTES:
                hint = "unpack it, and read it as a folder"
                raise SourceError(f"{name} holds more than {MAX_ARCHIVE_TEXT_BYTES:,} bytes of texts", hint=hint)
            index.add(entry)
    return index


def _with_stored_split(row: RawSample, requested: str | None) -> RawSample:
    return replace(row, fields=row.fields | {"split": stored_split(row.fields["split"], requested)})


def _row(
    name: str,
    image: Entry,
    texts: Sequence[Entry],
    licence: str,
    columns: Sequence[str],
    split: str | None,
    *,
    has_questions: bool,
) -> RawSample | Rejected:
    if image.data is None:
        return Rejected(source_row=name, reason=image.reason, detail=_REASONS[image.reason])
    captions, values = _read_beside(texts)
    try:
        split = read_split(values.get(SPLIT)) or split
    except ValueError as error:
        return Rejected(source_row=name, reason="unknown_split", detail=str(error))
    values = {"folder": posixpath.dirname(image.name), "file_name": image.name} | values
    context = tuple((column, as_text(values.get(column))) for column in columns)
    fields: dict[str, Any] = {"references": tuple(captions), "context": context, "split": split}
    fields |= {"reference_qa": _questions_in(values)} if has_questions else {}
    return RawSample(source_row=name, images=(image.data,), licence=licence, fields=fields)


def _require_columns(archives: Archives, names: Sequence[str], columns: Sequence[str], index_of: IndexOf) -> None:
    """Raise SourceError if nothing that lies beside the first images has one of these columns."""
    known = {*OF_EVERY_IMAGE}
    columns = [column for column in columns if not is_exif_name(column)]
    for name in names:
        if not {*columns} - known:
            return
        with closing(_read_images(archives, name, index_of)) as images:
            for _, texts in islice(images, COLUMN_IMAGES):
                known |= {*_read_beside(texts)[1]}
        if len(known) > len(OF_EVERY_IMAGE):
            break
    if unknown := [column for column in columns if column not in known]:
        hint = f"beside the first images are {', '.join(sorted(known))}"
        raise SourceError(f"there is no column {unknown[0]}", hint=hint)


def _without_suffix(name: str) -> str:
    return name[: -len(next(suffix for suffix in SUFFIXES if name.lower().endswith(suffix)))]


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    refuse_roles(config, "an archive", "an archive has files: --columns context=A,B names values of NAME.json for prompts")
    archives = find_archives(path, follow_links=config.follow_links, is_whole=part == ALL)
    return open_archives(archives, part, config.license or UNKNOWN, config.context, config.source_split)


SPEC = SourceSpec(
    name="archive:PATH",
    what="the images in a zip or tar file (WebDataset), or in all under a folder; also s3://, gs://, hf:// and https://",
    splits="as the names of the archives say, or split in NAME.json, else by hash",
    size="yours",
    license="unknown, unless --license says it; unknown images are pushed to a private repository",
    needs="a vision-language model",
    example="synth generate --source archive:photos.zip",
    open=_open,
    options=frozenset({"source_split", "columns", "license", "follow_links"}),
)
