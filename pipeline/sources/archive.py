"""Source: images in zip and tar archives, including WebDataset shards (`archive:PATH`).

Nothing is unpacked to disk. `NAME.txt` holds captions of an image, one per line. `NAME.json` may hold
captions, questions, a split and columns for prompts. In a local archive, these files may be anywhere, because
they are read before the images. A remote archive is read once, so the files must be next to their image.

Archives are untrusted. Links, devices, encrypted entries, oversized entries and names that lead out of the
archive are rejected. A damaged archive or a decompression bomb raises SourceError.
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
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, cast

from pipeline.config import Config
from pipeline.errors import SourceError, did_you_mean, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.sources.base import (
    SourceSpec,
    as_text,
    check_samples,
    first_names,
    refuse_roles,
)
from pipeline.sources.source_files import UNREAD_SUFFIXES, SourceFiles, find_source_files
from pipeline.sources.splits import describe_held_out, read_split, split_of_path, stored_split
from pipeline.sources.text_files import decode_text, parse_json
from pipeline.sources.texts import (
    MAX_TEXT_CHARACTERS,
    METADATA_FILES,
    PATH_COLUMNS,
    ImageTexts,
    describe_model_texts,
    human_captions,
    human_questions,
    model_texts,
    normalize_path,
)
from pipeline.storage.untrusted import is_hidden
from pipeline.tables import SPLIT
from pipeline.types import UNKNOWN, RawSample, Rejected, Source

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
TEXT_SUFFIXES = (".txt", ".json")
MAX_TEXT_BYTES = 1_000_000  # per text file
MAX_ARCHIVE_TEXT_BYTES = 256_000_000  # all text files in one archive
MAX_HEADER_BYTES = 1_000_000  # tar header that holds a long name
MAX_MEMBERS = 1_000_000
# Central directory of a zip file. zipfile uses up to 20 times as much memory.
MAX_DIRECTORY_BYTES = 64_000_000
# An archive of N bytes may unpack to N * MAX_UNPACK_RATIO + FREE_UNPACKED_BYTES bytes.
MAX_UNPACK_RATIO, FREE_UNPACKED_BYTES = 200, 100_000_000
# Limits for consecutive tar entries with the same key, which are held in memory together.
MAX_GROUP_ENTRIES, MAX_GROUP_BYTES = 64, 64_000_000
QUESTION_ARCHIVES = 16  # number of archives searched for questions before any image is read
COLUMN_IMAGES = 20  # number of images whose texts are searched for the context columns
BLOCK_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 1_000
MAGIC_BYTES = 6
_DRIVE = re.compile(r"[A-Za-z]:")
# Decoders by magic bytes. Each can read concatenated streams, and never returns more bytes than requested.
_DECODERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": lambda file: bz2.BZ2File(file, "rb"),
    b"\xfd7zXZ": lambda file: lzma.LZMAFile(file, "rb"),  # noqa: SIM115  # closed with the file below it
}
# With any other method, zipfile unpacks an entry all at once, whatever size the directory states.
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
    "name_too_long": "its name is too long",
    "not_a_file": "a link, a pipe or a device, not a regular file",
    "file_too_large": f"more than {MAX_IMAGE_BYTES:,} bytes",
    "encrypted": "it is encrypted",
    "unreadable_entry": "it is damaged, or not compressed with deflate",
    "unsupported_format": "this format is not supported: convert the file to JPEG or PNG",
}


# --- entries of one archive


@dataclass(frozen=True, slots=True)
class Entry:
    """An image or text file in an archive. If it is rejected, `data` is None and `reason` is set."""

    name: str
    data: bytes | None
    reason: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return posixpath.splitext(self.name)[0]


def read_entries(file: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield the images, text files and metadata files (without their data) in an archive.

    Raises SourceError if the archive is damaged or a decompression bomb.
    """
    try:
        magic = file.read(MAGIC_BYTES)
        file.seek(0)
        if magic.startswith(b"PK"):
            yield from _read_zip(file, name)
        else:
            packed = _CountedFile(file)
            decoders = (decoder for start, decoder in _DECODERS.items() if magic.startswith(start))
            decode = next(decoders, lambda stream: stream)
            unpacked = _CountedFile(
                decode(packed), lambda size: _require_no_bomb(name, size, packed.num_bytes)
            )
            yield from _read_tar(unpacked, name)
    except OSError as error:
        if error.errno is not None:  # disk errors have an errno, decoder errors do not
            raise
        raise _damage_error(name, error) from None
    except _DAMAGES as error:
        raise _damage_error(name, error) from None


class _CountedFile:
    """Counts the bytes read from a file, and passes the total to `check` after each read."""

    def __init__(self, file: Any, check: Callable[[int], None] = lambda _: None) -> None:
        self._file, self._check, self.num_bytes = file, check, 0

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, or all bytes if `size` is -1."""
        data = cast(bytes, self._file.read(size))
        self.num_bytes += len(data)
        self._check(self.num_bytes)
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header that raises ValueError for overlong names, sparse files and damage.

    tarfile alone would read names and sparse maps of any length into memory, and would take a damaged header
    for the end of the archive.
    """

    _LONG = (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> "_StrictTarInfo":
        """Return the next header. Raises ValueError if it is damaged or the archive's end is missing."""
        try:
            return super().fromtarfile(tarfile)
        except _BAD_HEADERS as error:
            raise ValueError(str(error) if str(error) != "empty header" else "the file is cut off") from None

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:
        if self.type in self._LONG and self.size > MAX_HEADER_BYTES:
            raise ValueError(
                f"a tar header has {self.size:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
            )
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]  # missing in the stubs

    def _refuse_sparse(self, *_: Any) -> None:
        raise ValueError(f"{self.name} is a sparse file: pack it without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


_BAD_HEADERS = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError)  # type: ignore[attr-defined]


def _read_tar(stream: _CountedFile, name: str) -> Iterator[Entry]:
    """Yield the wanted entries of a tar file in file order."""
    with tarfile.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_StrictTarInfo) as tar:
        for number, member in enumerate(tar, 1):
            tar.members = []  # type: ignore[attr-defined]  # otherwise, tarfile keeps every header
            _require_few_members(name, number)
            is_file = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
            content = tar.extractfile(member) if is_file else None
            if _is_wanted(member.name):
                if content is None or not member.isreg():
                    yield Entry(_as_text(member.name), None, "not_a_file")
                else:
                    yield _read_entry(member.name, member.size, content.read)
            # Read to the end: tarfile would skip the remaining bytes without noticing a truncated file.
            while content is not None and content.read(BLOCK_BYTES):
                pass
        if tar.fileobj.read(BLOCK_BYTES).strip(b"\0"):
            hint = "unpack it with tar --ignore-zeros, and pass the folder: --source folder:DIR"
            raise SourceError(f"{name} has data after its end, like concatenated archives", hint=hint)


def _read_zip(file: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield the wanted entries of a zip file. If entries have the same name, only the last one is read."""
    size = file.seek(0, 2)
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
        raise _size_error(f"the file list of {name} has more than {MAX_DIRECTORY_BYTES:,} bytes")
    with zipfile.ZipFile(file) as archive:
        _require_few_members(name, len(archive.infolist()))
        files = [info for info in archive.infolist() if not info.is_dir()]
        infos = {info.filename: info for info in files if _is_wanted(info.filename)}
        _require_no_bomb(name, sum(info.file_size for info in infos.values()), size)
        yield from (_read_zip_entry(archive, info) for info in infos.values())


def _read_zip_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        return Entry(_as_text(info.filename), None, "not_a_file")
    if info.flag_bits & 1:
        return Entry(_as_text(info.filename), None, "encrypted")
    if info.compress_type not in _ZIP_METHODS:
        return Entry(_as_text(info.filename), None, "unreadable_entry")

    def read(max_bytes: int) -> bytes:
        with archive.open(info) as content:
            return content.read(max_bytes)

    try:
        return _read_entry(info.filename, info.file_size, read)
    except _DAMAGES:
        return Entry(_as_text(info.filename), None, "unreadable_entry")


def _read_entry(name: str, size: int, read: Callable[[int], bytes]) -> Entry:
    text = _as_text(name)
    if len(text) > MAX_NAME_CHARACTERS:
        return Entry(text[-MAX_NAME_CHARACTERS:], None, "name_too_long")
    if text.startswith("/") or ".." in text.split("/") or _DRIVE.match(text):
        return Entry(text, None, "outside_archive")
    if _has_suffix(name, UNREAD_SUFFIXES):
        return Entry(text, None, "unsupported_format")
    if is_metadata(name):
        return Entry(text, b"")
    max_bytes = MAX_TEXT_BYTES if is_text(name) else MAX_IMAGE_BYTES
    data = read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(data) > max_bytes:
        return Entry(text, None, "file_too_large")
    return Entry(text, data)


def _require_few_members(name: str, number: int) -> None:
    if number > MAX_MEMBERS:
        raise _size_error(f"{name} has more than {MAX_MEMBERS:,} members")


def _require_no_bomb(name: str, unpacked_bytes: int, packed_bytes: int) -> None:
    if unpacked_bytes > MAX_UNPACK_RATIO * packed_bytes + FREE_UNPACKED_BYTES:
        raise _size_error(f"{name} unpacks from {packed_bytes:,} to over {unpacked_bytes:,} bytes")


def _size_error(message: str) -> SourceError:
    return SourceError(
        message,
        hint="it may be a zip bomb; if you trust it, unpack it and pass the folder: --source folder:DIR",
    )


def _damage_error(name: str, error: Exception) -> SourceError:
    return SourceError(f"{name} is damaged: {one_line(error)}", hint="download it again, or remove it")


def _has_suffix(name: str, suffixes: Sequence[str] | frozenset[str]) -> bool:
    text = _as_text(name)
    return not is_hidden(text) and posixpath.splitext(text)[1].lower() in suffixes


def is_text(name: str) -> bool:
    """Return whether an entry is a text file, judged by its name."""
    return _has_suffix(name, TEXT_SUFFIXES)


def is_metadata(name: str) -> bool:
    """Return whether an entry is a metadata file, judged by its name. Metadata in archives is not read."""
    return posixpath.basename(_as_text(name)) in METADATA_FILES


def _is_wanted(name: str) -> bool:
    return _has_suffix(name, (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES, *TEXT_SUFFIXES)) or is_metadata(name)


def _as_text(name: str) -> str:
    """Return an entry's name with forward slashes, and with characters escaped that UTF-8 cannot encode."""
    return name.replace("\\", "/").encode("utf-8", "backslashreplace").decode().removeprefix("./")


# --- texts of images


@dataclass(slots=True)
class ArchiveTexts:
    """Text files and number of images for each key, in an archive or in a group of consecutive entries."""

    texts: dict[str, list[Entry]] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)
    tables: list[str] = field(default_factory=list)  # names of metadata files

    def add(self, entry: Entry) -> None:
        """Store a text file or the name of a metadata file, or count an image for its key."""
        if is_metadata(entry.name):
            self.tables.append(entry.name)
        elif is_text(entry.name):
            self.texts.setdefault(key_of(entry.name), []).append(entry)
        else:
            self.images[key_of(entry.name)] += 1

    def pair(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
        """Yield the images among the entries, each with its text files."""
        for entry in entries:
            if not is_text(entry.name) and not is_metadata(entry.name):
                yield entry, self._texts_of(entry)

    def _texts_of(self, image: Entry) -> list[Entry]:
        """Return the text files with an image's key. If several images have it, the full name must match."""
        key, names = key_of(image.name), (normalize_path(image.stem), normalize_path(image.name))
        texts = self.texts.get(key, [])
        if self.images[key] == 1:
            return texts
        return [text for text in texts if normalize_path(text.stem) in names]


def pair_neighbors(entries: Iterator[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Yield each image with the adjacent text files that share its key, as in WebDataset.

    Groups above a size limit are split.
    """
    for group in _group_neighbors(entries):
        index = ArchiveTexts()
        for entry in group:
            index.add(entry)
        yield from index.pair(group)


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
    """Return WebDataset's sample key for an entry: the path up to the first dot in the file name."""
    folder, base = posixpath.split(normalize_path(name))
    return posixpath.join(folder, base.partition(".")[0])


def _parse_texts(texts: Sequence[Entry]) -> tuple[list[str], dict[str, Any]]:
    """Return the human captions in an image's text files, and the values in its JSON files.

    Lines of NAME.txt are skipped if NAME.json lists them as written by a model.
    """
    rows = {entry.name: _read_json(entry) for entry in texts if not entry.name.lower().endswith(".txt")}
    skipped = "\n".join(text for row in rows.values() for text in model_texts(row))
    by_model = {line.strip() for line in skipped.splitlines()}
    captions: list[str] = []
    values: dict[str, Any] = {}
    for entry in sorted(texts, key=lambda text: text.name):
        if entry.name in rows:
            values |= rows[entry.name]
            captions += human_captions(rows[entry.name])
        else:
            lines = (line.strip()[:MAX_TEXT_CHARACTERS] for line in (_decode(entry) or "").splitlines())
            captions += [line for line in lines if line and line not in by_model]
    return list(dict.fromkeys(captions)), values


def _read_json(entry: Entry) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file holds anything else."""
    try:
        row = parse_json(_decode(entry) or "")
    except (ValueError, RecursionError, MemoryError):
        return {}
    return row if isinstance(row, dict) else {}


def _decode(entry: Entry) -> str | None:
    """Return the text of an entry, or None if it is too large or not UTF-8."""
    try:
        return None if entry.data is None else decode_text(entry.data)
    except ValueError:
        return None


def _describe_texts(archive: str, index: ArchiveTexts) -> Iterator[str]:
    """Yield messages about the captions in an archive, and about text files that are not used."""
    parsed = [_parse_texts(texts) for key, texts in index.texts.items() if index.images[key]]
    if num_captions := sum(len(captions) for captions, _ in parsed):
        yield f"human captions in {archive}: {num_captions:,} for {sum(index.images.values()):,} images"
    yield from describe_model_texts(sum(len(model_texts(values)) for _, values in parsed), f" in {archive}")
    if index.tables:
        hint = "unpack the archive, and pass the folder: --source folder:DIR"
        yield f"metadata files in {archive} were not read: {first_names(index.tables)} ({hint})"
    unread = [text.name for texts in index.texts.values() for text in texts if _decode(text) is None]
    if unread:
        yield f"texts in {archive} that are too large or not UTF-8: {len(unread):,} ({first_names(unread)})"
    unused = [text.name for key, texts in index.texts.items() if not index.images[key] for text in texts]
    if unused:
        yield f"{len(unused):,} texts in {archive} belong to no image ({first_names(sorted(unused))})"


# --- the source


class Archives:
    """Reads the archives of a source, and keeps the texts of the last local archive in memory."""

    def __init__(self, files: SourceFiles) -> None:
        self.files = files
        self.text_index = lru_cache(1)(self._read_text_index)

    def read_images(self, name: str) -> Generator[tuple[Entry, list[Entry]]]:
        """Yield the images in an archive, each with its text files."""
        with self.files.translate_errors():
            index = self.text_index(name) if self.files.is_local else None
            with self.files.open(name) as file:
                if index is None:
                    yield from pair_neighbors(read_entries(file, name))
                else:
                    yield from index.pair(read_entries(file, name))

    def _read_text_index(self, name: str) -> ArchiveTexts:
        index, num_bytes = ArchiveTexts(), 0
        with self.files.open(name) as file:
            for entry in read_entries(file, name):
                num_bytes += len(entry.data or b"") if is_text(entry.name) else 0
                if num_bytes > MAX_ARCHIVE_TEXT_BYTES:
                    problem = f"{name} has more than {MAX_ARCHIVE_TEXT_BYTES:,} bytes of texts"
                    raise SourceError(problem, hint="unpack it, and pass the folder: --source folder:DIR")
                index.add(entry)
        return index

    def have_questions(self, names: Sequence[str]) -> bool:
        """Return whether the first archives have questions. For remote archives, only one image is read."""
        if self.files.is_local:
            with self.files.translate_errors():
                indexes = (self.text_index(name) for name in names[:QUESTION_ARCHIVES])
                groups = (texts for index in indexes for texts in index.texts.values())
                return any(human_questions(_parse_texts(texts)[1]) for texts in groups)
        with closing(self.read_images(names[0])) as images:
            return any(human_questions(_parse_texts(texts)[1]) for _, texts in islice(images, 1))

    def require_columns(self, names: Sequence[str], columns: Sequence[str]) -> None:
        """Check that the first images' texts have these columns. Raises SourceError if one is missing."""
        known = {*PATH_COLUMNS}
        for name in names:
            if known.issuperset(columns):
                return
            with closing(self.read_images(name)) as images:
                for _, texts in islice(images, COLUMN_IMAGES):
                    known |= {*_parse_texts(texts)[1]}
            if len(known) > len(PATH_COLUMNS):
                break
        if unknown := [column for column in columns if column not in known]:
            hint = did_you_mean(unknown[0], known, f"the first images have {', '.join(sorted(known))}")
            raise SourceError(f"no column is named {unknown[0]}", hint=hint)


def open_archives(
    files: SourceFiles,
    license: str = UNKNOWN,
    columns: Sequence[str] = (),
    split: str | None = None,
) -> Source:
    """Open the images in archives. `columns` (JSON values) become the context.

    Raises SourceError if no archive belongs to `split`, or if the first images lack one of the columns.
    Reading the source raises SourceError if an archive is damaged or no archive has an image.
    """
    names_by_split: dict[str | None, list[str]] = {}
    for name in files.names:
        names_by_split.setdefault(_split_of(name), []).append(name)
    names = [name for name in files.names if split in (None, _split_of(name))]
    if not names:
        hint = f"name the archives of this split like {split}-0.tar"
        raise SourceError(f"no archive is named after the split {split}", hint=hint)
    archives = Archives(files)
    archives.require_columns(names, columns)
    has_questions = archives.have_questions(names)

    def read() -> Iterator[RawSample | Rejected]:
        is_empty = True
        for name in names:
            for image, texts in archives.read_images(name):
                is_empty = False
                row = _row(name, image, texts, license, columns, has_questions=has_questions)
                if isinstance(row, Rejected):
                    yield row
                elif split in (None, row.fields["split"]):
                    row_split = stored_split(row.fields["split"], split)
                    yield replace(row, fields=row.fields | {"split": row_split})
        if is_empty:
            hint = "PNG, JPEG, WebP and other images are read, also in subfolders"
            raise SourceError(f"no images in {', '.join(names)[:200]}", hint=hint)

    messages = [*files.messages]
    if files.is_local:
        with files.translate_errors():
            first = names[0] if len(names) == 1 else f"the first of {len(names):,} archives, {names[0]}"
            messages += _describe_texts(first, archives.text_index(names[0]))
    messages += [] if split else describe_held_out(names_by_split)
    return Source(
        name="archive",
        revision=files.revision,
        read=lambda start: check_samples(islice(read(), start, None)),
        messages=tuple(messages),
    )


def _row(
    archive: str,
    image: Entry,
    texts: Sequence[Entry],
    license: str,
    columns: Sequence[str],
    *,
    has_questions: bool,
) -> RawSample | Rejected:
    name = f"{archive}/{image.name}"
    if image.data is None:
        return Rejected(source_row=name, reason=image.reason, detail=REASONS[image.reason])
    captions, values = _parse_texts(texts)
    try:
        split = read_split(values.get(SPLIT)) or _split_of(archive)
    except ValueError as error:
        return Rejected(source_row=name, reason="unknown_split", detail=str(error))
    values = {"folder": posixpath.dirname(image.name), "file_name": image.name} | values
    try:
        context = tuple((column, as_text(values.get(column))) for column in columns)
    except SourceError as error:
        return Rejected(source_row=name, reason="unusable_column", detail=str(error))
    image_texts = ImageTexts(captions, list(human_questions(values)), split)
    fields = image_texts.sample_fields(has_questions=has_questions) | {"context": context}
    return RawSample(source_row=name, images=(image.data,), license=license, fields=fields)


def _split_of(archive: str) -> str | None:
    suffix = next(suffix for suffix in SUFFIXES if archive.lower().endswith(suffix))
    return split_of_path(archive[: -len(suffix)])


def _open(config: Config, path: str) -> Source:
    refuse_roles(config, "an archive", "to use values of NAME.json in prompts: --columns context=A,B")
    files = find_source_files(path, SUFFIXES, follow_links=config.follow_links)
    if not files.names:
        hint = f"pass a file, or a folder with files that end in {', '.join(SUFFIXES)}"
        raise SourceError(f"no archive at {path}", hint=hint)
    return open_archives(files, config.license or UNKNOWN, config.context, config.source_split)


SPEC = SourceSpec(
    name="archive:PATH",
    what="images in a zip or tar file (WebDataset), or in all under a folder; also s3://, gs://, hf:// and "
    "https://",
    example="synth generate --source archive:photos.zip",
    open=_open,
    options=frozenset({"source_split", "columns", "license", "follow_links"}),
)
