"""Source: images in archives (`archive:PATH`): tar files, such as those of WebDataset, and zip files.

Nothing is unpacked to a disk. `NAME.txt` next to an image holds captions, one a line. `NAME.json` may hold captions,
questions, a split, and columns for the context of prompts. Texts are read first, wherever they are in the archive. An archive
in a store is read once, with the texts that are next to their image.

Archives are untrusted. Links, devices, encrypted entries, names that lead out of the archive and entries that are too large are
rejected, each with a reason. A damaged archive, or one that unpacks to far more bytes than it has, is an error.
"""

import bz2
import gzip
import json
import lzma
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any, BinaryIO, Literal, cast

from pipeline.config import Config
from pipeline.errors import SourceError, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import LICENSE_UNLESS_SAID, SourceSpec, as_text, check_samples, first_names, refuse_roles
from pipeline.sources.parquet import describe_held_out, split_of_path, stored_split
from pipeline.sources.source_files import UNREAD_SUFFIXES, SourceFiles, find_source_files
from pipeline.sources.texts import (
    METADATA_FILES,
    OF_EVERY_IMAGE,
    captions_of_people,
    decode_text,
    describe_by_model,
    questions_of_people,
    read_split,
    spelled_alike,
    texts_by_model,
)
from pipeline.storage.untrusted import is_hidden
from pipeline.tables import SPLIT
from pipeline.types import ALL, UNKNOWN, RawSample, Rejected, Source, SourceSlice

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
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
MAX_GROUP_ENTRIES, MAX_GROUP_BYTES = 64, 64_000_000  # of one key in a tar file that are held at once
MAX_ARCHIVE_TEXT_BYTES = 256_000_000  # of all texts of an archive
QUESTION_ARCHIVES = 16  # that are looked through for questions, before any image is read
COLUMN_IMAGES = 20  # beside which columns of the context are looked for


# --- the entries of one archive


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


# --- the source


@dataclass(slots=True)
class TextsByKey:
    """The texts of an archive, or of neighboring entries, by key; and which images have each key."""

    texts: dict[str, list[Entry]] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)
    tables: list[str] = field(default_factory=list)  # names of metadata files, which are read in folders only

    def add(self, entry: Entry) -> None:
        """Add a text, or count an image."""
        if is_metadata(entry.name):
            self.tables.append(entry.name)
        elif is_text(entry.name):
            self.texts.setdefault(key_of(entry.name), []).append(entry)
        else:
            self.images[key_of(entry.name)] += 1

    def of(self, image: Entry) -> list[Entry]:
        """Return the texts that have the name of an image; of the only image of a key all texts of the key."""
        key, names = key_of(image.name), (spelled_alike(image.stem), spelled_alike(image.name))
        return [text for text in self.texts.get(key, ()) if self.images[key] == 1 or spelled_alike(text.stem) in names]


IndexOf = Callable[[str], TextsByKey]  # of an archive, by its name


def pair_neighbors(entries: Iterator[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Yield each image with the texts of its key beside it, as WebDataset groups them; a group that grows too large is cut."""
    for group in _group_neighbors(entries):
        index = TextsByKey()
        for entry in group:
            index.add(entry)
        yield from ((entry, index.of(entry)) for entry in group if not is_text(entry.name))


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
    folder, base = posixpath.split(spelled_alike(name))
    return posixpath.join(folder, base.partition(".")[0])


def _read_beside(texts: Sequence[Entry]) -> tuple[list[str], dict[str, Any]]:
    """Return the captions of people beside an image, and the values of the JSON there; what is not text is left out.

    A line of a text is none of people if the JSON says that a model wrote it.
    """
    rows = {entry.name: _read_json(entry) or {} for entry in texts if not entry.name.lower().endswith(".txt")}
    by_model = {line.strip() for row in rows.values() for text in texts_by_model(row) for line in text.splitlines()}
    captions: list[str] = []
    values: dict[str, Any] = {}
    for entry in sorted(texts, key=lambda text: text.name):
        if entry.name in rows:
            values |= rows[entry.name]
            captions += captions_of_people(rows[entry.name])
        else:
            lines = (text.strip() for text in _decode(entry.data or b"").splitlines())
            captions += [line for line in lines if line and line not in by_model]
    return list(dict.fromkeys(captions)), values


def _read_json(entry: Entry) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is none."""
    try:
        row = json.loads(_decode(entry.data or b""))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _describe_texts(archive: str, index: TextsByKey) -> Iterator[str]:
    """Yield how many captions are next to images of an archive, and which of its texts are not read."""
    read = [_read_beside(texts) for key, texts in index.texts.items() if index.images[key]]
    if captions := sum(len(of_people) for of_people, _ in read):
        yield f"captions of people in {archive}: {captions:,}, and {sum(index.images.values()):,} images"
    yield from describe_by_model(sum(len(texts_by_model(values)) for _, values in read), f" in {archive}")
    if index.tables:
        yield f"tables that are not read in {archive}: {first_names(index.tables)} (unpack it, and read it as a folder)"
    if alone := sorted(text.name for key, texts in index.texts.items() if not index.images[key] for text in texts):
        yield f"texts beside no image in {archive}: {len(alone):,} ({first_names(alone)})"


def _have_questions(archives: SourceFiles, names: Sequence[str], index_of: IndexOf) -> bool:
    """Return whether the first archives have questions, in a store the first image: a column is of all images, or none."""
    if archives.is_local:
        with archives.translate_errors():
            texts = (of_key for name in names[:QUESTION_ARCHIVES] for of_key in index_of(name).texts.values())
            return any(questions_of_people(_read_beside(of_key)[1]) for of_key in texts)
    with closing(_read_images(archives, names[0], index_of)) as images:
        return any(questions_of_people(_read_beside(texts)[1]) for _, texts in islice(images, 1))


def _decode(data: bytes) -> str:
    try:
        return decode_text(data)
    except ValueError:
        return data.decode("utf-8", "replace")


def open_archives(
    archives: SourceFiles,
    part: SourceSlice = ALL,
    license: str = UNKNOWN,
    columns: Sequence[str] = (),
    split: str | None = None,
) -> Source:
    """Return the images of archives, or a slice. `columns` of the JSON files beside them, or of EXIF, become the context.

    Raise SourceError if no archive is of the `split`, none of the first images has one of the columns, or, while they are read,
    if an archive is damaged or none has an image.
    """
    by_split: dict[str | None, list[str]] = {}
    for name in archives.names:
        by_split.setdefault(_split_of(name), []).append(name)
    names = [name for name in archives.names if split in (None, _split_of(name))]
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
            for image, texts in _read_images(archives, name, index_of):
                number += 1
                if by_file or number % part.of == part.number:
                    row = _row(name, image, texts, license, columns, has_questions=has_questions)
                    if isinstance(row, Rejected):
                        yield row
                    elif split in (None, row.fields["split"]):
                        yield replace(row, fields=row.fields | {"split": stored_split(row.fields["split"], split)})
        if number < 0 and part == ALL:
            raise SourceError(
                f"no image in {', '.join(names)[:200]}", hint="PNG, JPEG, WebP and others are read, in folders too"
            )

    messages = list(archives.messages) if part == ALL else []
    if archives.is_local and part == ALL:
        with archives.translate_errors():
            first = names[0] if len(names) == 1 else f"the first of {len(names):,} archives, {names[0]}"
            messages += _describe_texts(first, index_of(names[0]))
    messages += [] if split else describe_held_out(by_split)
    return Source(
        name="archive",
        revision=archives.revision if part == ALL else "",
        read=lambda start: check_samples(islice(read(), start, None), columns),
        messages=tuple(messages),
    )


def _read_images(archives: SourceFiles, name: str, index_of: IndexOf) -> Generator[tuple[Entry, list[Entry]]]:
    """Yield the images of an archive, each with the texts that are about it."""
    with archives.translate_errors():
        index = index_of(name) if archives.is_local else None
        with archives.open(name) as file:
            if index is None:
                yield from pair_neighbors(read_entries(file, name))
            else:
                yield from ((image, index.of(image)) for image in read_entries(file, name, "images"))


def _read_index(archives: SourceFiles, name: str) -> TextsByKey:
    index, num_bytes = TextsByKey(), 0
    with archives.open(name) as file:
        for entry in read_entries(file, name, "texts"):
            num_bytes += len(entry.data or b"")
            if num_bytes > MAX_ARCHIVE_TEXT_BYTES:
                hint = "unpack it, and read it as a folder"
                raise SourceError(f"{name} holds more than {MAX_ARCHIVE_TEXT_BYTES:,} bytes of texts", hint=hint)
            index.add(entry)
    return index


def _row(
    archive: str, image: Entry, texts: Sequence[Entry], license: str, columns: Sequence[str], *, has_questions: bool
) -> RawSample | Rejected:
    name = f"{archive}/{image.name}"
    if image.data is None:
        return Rejected(source_row=name, reason=image.reason, detail=REASONS[image.reason])
    captions, values = _read_beside(texts)
    try:
        split = read_split(values.get(SPLIT)) or _split_of(archive)
    except ValueError as error:
        return Rejected(source_row=name, reason="unknown_split", detail=str(error))
    values = {"folder": posixpath.dirname(image.name), "file_name": image.name} | values
    try:
        context = tuple((column, as_text(values.get(column))) for column in columns)
    except SourceError as error:
        return Rejected(source_row=name, reason="unusable_column", detail=str(error))
    fields: dict[str, Any] = {"references": tuple(captions), "context": context, "split": split}
    fields |= {"reference_qa": questions_of_people(values)} if has_questions else {}
    return RawSample(source_row=name, images=(image.data,), license=license, fields=fields)


def _require_columns(archives: SourceFiles, names: Sequence[str], columns: Sequence[str], index_of: IndexOf) -> None:
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


def _split_of(archive: str) -> str | None:
    return split_of_path(archive[: -len(next(suffix for suffix in SUFFIXES if archive.lower().endswith(suffix)))])


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    refuse_roles(config, "an archive", "an archive has files: --columns context=A,B names values of NAME.json for prompts")
    archives = find_source_files(path, SUFFIXES, follow_links=config.follow_links, is_whole=part == ALL)
    if not archives.names:
        hint = f"pass a file, or a folder with files that end in {', '.join(SUFFIXES)}"
        raise SourceError(f"no archive at {path}", hint=hint)
    return open_archives(archives, part, config.license or UNKNOWN, config.context, config.source_split)


SPEC = SourceSpec(
    name="archive:PATH",
    what="the images in a zip or tar file (WebDataset), or in all under a folder; also s3://, gs://, hf:// and https://",
    license=LICENSE_UNLESS_SAID,
    needs="a vision-language model",
    example="synth generate --source archive:photos.zip",
    open=_open,
    options=frozenset({"source_split", "columns", "license", "follow_links"}),
)
