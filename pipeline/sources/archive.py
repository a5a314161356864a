"""Source: images in archives (`archive:PATH`): tar files, WebDataset's among them, and zip files.

Entries are streamed, and nothing is unpacked to a disk. What lies beside an image under its name is about it: the lines of
`NAME.txt` are captions, and `NAME.json` may hold captions and columns for the context of prompts. In a tar file it stands next
to the image. Links, devices, entries with odd names, and entries that are too large are rejected; an archive that unpacks to
very much more than its size is an error, before it is unpacked.
"""

import json
import lzma
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipeline.config import CONTEXT, Config
from pipeline.dataset.licenses import UNKNOWN
from pipeline.digests import digest, open_file_digest
from pipeline.errors import ConfigError, SourceError, one_line
from pipeline.images.decode import APPLE_DOUBLE, IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.sources.base import SourceSpec, as_text, check_samples
from pipeline.sources.columns import stored_split
from pipeline.sources.folder import OF_EVERY_IMAGE, REFERENCE_NAMES
from pipeline.sources.parquet import split_of_path
from pipeline.storage.untrusted import UnsafeFileError, open_regular
from pipeline.types import ALL, RawSample, Rejected, Source, SourceSlice

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
TEXT_SUFFIXES = (".txt", ".json")
MAX_TEXT_BYTES = 1_000_000  # of a file beside an image
MAX_HEADER_BYTES = 1_000_000  # of a long name in a tar file
MAX_RATIO, FREE_BYTES = 200, 100_000_000  # to how many times its size an archive may unpack, beyond the first bytes
MAX_GROUP = 64  # entries of one name in a tar file that are held at once
_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)
_REASONS = {
    "outside_archive": "its name leads out of the archive",
    "not_a_file": "a link, a pipe or a device, not a regular file",
    "file_too_large": f"more than {MAX_IMAGE_BYTES:,} bytes",
    "encrypted": "it is encrypted",
    "unreadable_entry": "it is damaged, or packed by a method that is not known here",
}


@dataclass(frozen=True, slots=True)
class Archives:
    """Archives by name, with a digest of their contents."""

    names: list[str]
    revision: str
    open: Callable[[str], BinaryIO]
    translate_errors: Callable[[], AbstractContextManager[None]] = nullcontext  # of a store, into SourceError


@dataclass(slots=True)
class Entry:
    """An image or a text file of an archive; without `data` it is refused, for a reason."""

    name: str
    data: bytes | None
    reason: str = ""

    @property
    def stem(self) -> str:
        """Return the name without its suffix."""
        return self.name[: -len(_suffix(self.name))]

    @property
    def key(self) -> str:
        """Return the name up to the first dot of its last part: by WebDataset's rule, entries of one key are one sample."""
        folder, base = posixpath.split(self.name)
        return posixpath.join(folder, base.partition(".")[0])


@dataclass(slots=True)
class Group:
    """Entries that belong together: images, and what is said about them."""

    images: list[Entry] = field(default_factory=list)
    texts: list[Entry] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[Entry, list[Entry]]]:
        """Yield each image with the texts that have its name; the only image of a group also with those of its key."""
        for image in self.images:
            own = [text for text in self.texts if text.stem == image.stem or (len(self.images) == 1 and text.key == image.key)]
            yield image, own


def entries(file: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield the images and texts of an archive in its order. Raise SourceError if it is damaged, or a bomb."""
    try:
        if name.lower().endswith(".zip"):
            yield from _zip_entries(file, name)
        else:
            yield from _tar_entries(file, name)
    except (*_DAMAGES, OSError, ValueError) as error:
        hint = "fetch it again, or take it out of the folder"
        raise SourceError(f"{name} is damaged: {one_line(error)}", hint=hint) from None


def groups(found: Iterator[Entry]) -> Iterator[Group]:
    """Group neighboring entries of one key, as WebDataset does."""
    group, key = Group(), None
    for entry in found:
        size = len(group.images) + len(group.texts)
        if size and (entry.key != key or size >= MAX_GROUP):
            yield group
            group = Group()
        key = entry.key
        (group.images if _is_image(entry.name) else group.texts).append(entry)
    if group.images or group.texts:
        yield group


class _BoundedTarInfo(tarfile.TarInfo):
    """A header whose long names are short: tarfile reads them into memory, however long they are."""

    _LONG = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in self._LONG and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {self.size:,} bytes")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]  # it is not in the stubs


class _Counted:
    """A file that counts the bytes which were read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.num_bytes = file, 0

    def read(self, size: int = -1) -> bytes:
        """Read as the file does."""
        data = self._file.read(size)
        self.num_bytes += len(data)
        return data


def _tar_entries(file: BinaryIO, name: str) -> Iterator[Entry]:
    counted = _Counted(file)
    with tarfile.open(fileobj=cast(BinaryIO, counted), mode="r|*", tarinfo=_BoundedTarInfo) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # which would keep every header
            _require_no_bomb(name, member.offset + member.size, counted.num_bytes)
            if member.isdir() or not _is_wanted(member.name):
                continue
            if not member.isreg():
                yield Entry(_shown(member.name), None, "not_a_file")
                continue
            read = tar.extractfile(member)
            assert read is not None
            yield _entry(member.name, member.size, read.read)


def _zip_entries(file: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield texts and the image that they are about next to each other, though they may lie apart in a zip file."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir() and _is_wanted(info.filename)]
        _require_no_bomb(name, sum(info.file_size for info in infos), size)
        texts: dict[str, list[zipfile.ZipInfo]] = {}
        for info in infos:
            if not _is_image(info.filename):
                texts.setdefault(info.filename[: -len(_suffix(info.filename))], []).append(info)
        for info in infos:
            if _is_image(info.filename):
                for own in (info, *texts.get(info.filename[: -len(_suffix(info.filename))], ())):
                    yield _zip_entry(archive, own)


def _zip_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return Entry(_shown(info.filename), None, "not_a_file")
    if info.flag_bits & 1:
        return Entry(_shown(info.filename), None, "encrypted")

    def read(most: int) -> bytes:
        with archive.open(info) as file:
            return file.read(most)

    try:
        return _entry(info.filename, info.file_size, read)
    except (*_DAMAGES, OSError):
        return Entry(_shown(info.filename), None, "unreadable_entry")


def _entry(name: str, size: int, read: Callable[[int], bytes]) -> Entry:
    most = MAX_IMAGE_BYTES if _is_image(name) else MAX_TEXT_BYTES
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ".." in parts or ":" in parts[0]:
        return Entry(_shown(name), None, "outside_archive")
    data = read(most + 1) if size <= most else b""
    if size > most or len(data) > most:
        return Entry(_shown(name), None, "file_too_large")
    return Entry(_shown(name).removeprefix("./"), data)


def _require_no_bomb(name: str, unpacked: int, packed: int) -> None:
    if unpacked > MAX_RATIO * packed + FREE_BYTES:
        message = f"{name} would unpack to {unpacked:,} bytes, and has {packed:,} so far"
        raise SourceError(message, hint="it may be made to fill memory: unpack it yourself, and read it as a folder")


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1]


def _is_image(name: str) -> bool:
    return _suffix(name).lower() in IMAGE_SUFFIXES and not posixpath.basename(name).startswith(APPLE_DOUBLE)


def _is_wanted(name: str) -> bool:
    is_text = _suffix(name).lower() in TEXT_SUFFIXES and not posixpath.basename(name).startswith(APPLE_DOUBLE)
    return _is_image(name) or is_text


def _shown(name: str) -> str:
    """Return a name as text that UTF-8 can hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def _read_texts(texts: Sequence[Entry]) -> tuple[list[str], dict[str, Any]]:
    """Return the captions of the files beside an image, and the values of the JSON among them; what is no text is left out."""
    captions: list[str] = []
    values: dict[str, Any] = {}
    for entry in sorted(texts, key=lambda text: text.name):
        text = (entry.data or b"").decode("utf-8-sig", "replace")
        if _suffix(entry.name).lower() == ".txt":
            captions += [line.strip() for line in text.splitlines() if line.strip()]
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            values |= row
            found = next((row[name] for name in REFERENCE_NAMES if row.get(name)), None)
            captions += [str(one) for one in (found if isinstance(found, list) else [found]) if one]
    encodable = (caption.encode("utf-8", "replace").decode() for caption in captions)
    return list(dict.fromkeys(encodable)), values


def find_archives(path: str, *, follow_links: bool = False, is_whole: bool = True) -> Archives:
    """Return an archive, or all under a folder, on this disk or in a store. Raise SourceError if there is none.

    `is_whole`: also compute the digest of their contents.
    """
    hint = f"pass a file, or a folder with files that end in {', '.join(SUFFIXES)}"
    if "://" in path:
        from pipeline.sources.remote import find_files, translate_errors  # fsspec is imported only when needed

        files = find_files(path, SUFFIXES)
        if not files.paths:
            raise SourceError(f"no archive at {path}", hint=hint)
        return Archives(sorted(files.paths), files.revision, files.open, partial(translate_errors, path))
    root = Path(path).expanduser()
    found = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    found = [file for file in found if file.name.lower().endswith(SUFFIXES)]
    if not found:
        raise SourceError(f"no archive at {path}", hint=hint)
    base = root.parent if root.is_file() else root
    bound = None if root.is_file() or follow_links else root
    names = [file.relative_to(base).as_posix() for file in found]

    def open_local(name: str) -> BufferedReader:
        try:
            return open_regular(base / name, bound)
        except UnsafeFileError as error:
            raise SourceError(str(error), hint="copy the file there, or pass --follow-links") from None

    contents = []
    for name in names:
        with open_local(name) as file:
            contents += [[name, open_file_digest(file)]] if is_whole else []
    return Archives(names, digest(contents) if is_whole else "", open_local)


def open_archives(
    archives: Archives,
    part: SourceSlice = ALL,
    licence: str = UNKNOWN,
    columns: Sequence[str] = (),
    split: str | None = None,
) -> Source:
    """Return the images of archives, or a slice. `columns` of the JSON files beside them become the context.

    Raise SourceError if no archive is of the `split`, the first image lacks a column, or an archive is damaged.
    """
    names = [name for name in archives.names if split in (None, split_of_path(_without_suffix(name)))]
    if not names:
        raise SourceError(f"no archive is named after the split {split}", hint="the name of a file says its split: train-0.tar")
    _require_columns(archives, names, columns)
    by_file = len(names) >= part.of

    def rows() -> Iterator[RawSample | Rejected]:
        number = -1
        for index, name in enumerate(names):
            if by_file and index % part.of != part.number:
                continue
            stored = stored_split(split_of_path(_without_suffix(name)), split)
            for image, texts in _images(archives, name):
                number += 1
                if by_file or number % part.of == part.number:
                    yield _row(f"{name}/{image.name}", image, texts, licence, columns, stored)

    return Source(name="archive", revision=archives.revision if part == ALL else "", rows=check_samples(rows()))


def _images(archives: Archives, name: str) -> Iterator[tuple[Entry, list[Entry]]]:
    with archives.translate_errors(), archives.open(name) as file:
        for group in groups(entries(file, name)):
            yield from group.rows()


def _row(
    name: str, image: Entry, texts: Sequence[Entry], licence: str, columns: Sequence[str], split: str | None
) -> RawSample | Rejected:
    if image.data is None:
        return Rejected(source_row=name, reason=image.reason, detail=_REASONS[image.reason])
    captions, values = _read_texts([text for text in texts if text.data is not None])
    own = {"folder": posixpath.dirname(image.name), "file_name": image.name} | values
    context = tuple((column, as_text(own.get(column))) for column in columns)
    fields = {"references": tuple(captions), "context": context, "split": split}
    return RawSample(source_row=name, images=(image.data,), licence=licence, fields=fields)


def _require_columns(archives: Archives, names: Sequence[str], columns: Sequence[str]) -> None:
    """Raise SourceError if what lies beside the first image has not these columns."""
    if not columns:
        return
    first = next(chain.from_iterable(_images(archives, name) for name in names), None)
    known = {*OF_EVERY_IMAGE, *(_read_texts(first[1])[1] if first else ())}
    if unknown := [column for column in columns if column not in known]:
        hint = f"beside the first image are {', '.join(sorted(known))}"
        raise SourceError(f"there is no column {unknown[0]}", hint=hint)


def _without_suffix(name: str) -> str:
    return name[: -len(next(suffix for suffix in SUFFIXES if name.lower().endswith(suffix)))]


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    if roles := [role for role in config.columns if role != CONTEXT]:
        hint = "an archive has files: --columns context=A,B names values of NAME.json for prompts"
        raise ConfigError(f"an archive has no column to be the {roles[0]}", hint=hint)
    archives = find_archives(path, follow_links=config.follow_links, is_whole=part == ALL)
    return open_archives(archives, part, config.license or UNKNOWN, config.context, config.source_split)


SPEC = SourceSpec(
    name="archive:PATH",
    what="the images in a zip or tar file (WebDataset), or in all under a folder; also s3://, gs://, hf:// and https://",
    splits="as the names of the archives say, else by hash",
    size="yours",
    license="unknown, unless --license says it; unknown images are pushed to a private repository",
    needs="a vision-language model",
    example="synth generate --source archive:photos.zip",
    open=_open,
    options=frozenset({"source_split", "columns", "license", "follow_links"}),
)
