"""Source: images in tar files, such as WebDataset shards (`archive:PATH`).

Nothing is unpacked to disk, and each archive is read once. As in WebDataset, texts are next to their image:
`NAME.txt` holds captions of an image, one per line. `NAME.json` may hold captions, questions, a split and
columns for prompts. Texts without an image next to them are rejected.

Archives are untrusted. Links, devices, oversized entries and names that lead out of the archive are rejected.
A damaged archive or a decompression bomb raises SourceError.
"""

import gzip
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any, BinaryIO, cast

from pipeline.config import Config
from pipeline.errors import SourceError, one_line
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.sources.base import SourceSpec, as_text, check_samples, refuse_roles, require_columns
from pipeline.sources.source_files import UNREAD_SUFFIXES, find_source_files
from pipeline.sources.splits import describe_held_out, group_by_split, read_split, split_of_path, stored_split
from pipeline.sources.text_files import decode_text, parse_json
from pipeline.sources.texts import (
    MAX_TEXT_CHARACTERS,
    METADATA_FILES,
    PATH_COLUMNS,
    ImageTexts,
    human_captions,
    human_questions,
    model_texts,
    normalize_path,
)
from pipeline.storage.untrusted import is_hidden
from pipeline.tables import SPLIT
from pipeline.types import UNKNOWN, RawSample, Rejected, Source

SUFFIXES = (".tar", ".tar.gz", ".tgz")
TEXT_SUFFIXES = (".txt", ".json")
MAX_TEXT_BYTES = 1_000_000
# A tar header that holds a long name may have at most this size.
MAX_HEADER_BYTES = 1_000_000
MAX_MEMBERS = 1_000_000
# An archive of N bytes may unpack to N * MAX_UNPACK_RATIO + FREE_UNPACKED_BYTES bytes.
MAX_UNPACK_RATIO, FREE_UNPACKED_BYTES = 200, 100_000_000
# Limits for consecutive entries with the same key, which are held in memory together.
MAX_GROUP_ENTRIES, MAX_GROUP_BYTES = 64, 64_000_000
# The context columns are looked up in the texts of this many groups.
COLUMN_GROUPS = 20
BLOCK_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 1_000
UNPACK_HINT = "unpack it, and pass the folder: --source folder:DIR"
_BOMB_HINT = f"it may be a decompression bomb; if you trust it, {UNPACK_HINT}"
_DRIVE = re.compile(r"[A-Za-z]:")
_GZIP_MAGIC = b"\x1f\x8b"
_DAMAGES = (tarfile.TarError, zlib.error, EOFError, MemoryError, ValueError, LookupError)
REASONS = {
    "outside_archive": "its name is a path outside of the archive",
    "name_too_long": "its name is too long",
    "not_a_file": "a link, a pipe or a device, not a regular file",
    "file_too_large": f"more than {MAX_IMAGE_BYTES:,} bytes, or {MAX_TEXT_BYTES:,} in a text file",
    "unsupported_format": "this format is not supported: convert the file to JPEG or PNG",
    "unreadable_text": "its characters are not in UTF-8",
    "unused_text": "no image with the same name is next to it",
}


# --- entries of one archive


@dataclass(frozen=True, slots=True)
class Entry:
    """An image or text file in an archive. If it is rejected, only `name` and `reason` are set."""

    name: str
    data: bytes | None
    reason: str = ""
    text: str | None = None


def _key(name: str) -> str:
    """Return WebDataset's sample key: the path up to the first dot in the file name."""
    folder, base = posixpath.split(normalize_path(name))
    return posixpath.join(folder, base.partition(".")[0])


def read_entries(file: BinaryIO, name: str) -> Iterator[Entry]:
    """Yield the images and text files in an archive.

    Raises SourceError if the archive is damaged or a decompression bomb.
    """
    try:
        is_packed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        packed = _CountedFile(file)
        # GzipFile reads concatenated streams, and never returns more bytes than requested.
        unpacked = gzip.GzipFile(fileobj=cast(Any, packed)) if is_packed else packed

        def require_no_bomb(unpacked_bytes: int) -> None:
            if unpacked_bytes > MAX_UNPACK_RATIO * packed.num_bytes + FREE_UNPACKED_BYTES:
                sizes = f"{packed.num_bytes:,} bytes to more than {unpacked_bytes:,} bytes"
                raise SourceError(f"{name} unpacks {sizes}", hint=_BOMB_HINT)

        yield from _read_tar(_CountedFile(unpacked, require_no_bomb), name)
    except (OSError, *_DAMAGES) as error:
        # Only errors of the disk have a number. Other errors come from a decoder.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        hint = "download it again, or remove it"
        raise SourceError(f"{name} is damaged: {one_line(error)}", hint=hint) from None


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

    tarfile alone would read names of any length into memory, and take a damaged header for the end.
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
            if number > MAX_MEMBERS:
                raise SourceError(f"{name} has more than {MAX_MEMBERS:,} members", hint=_BOMB_HINT)
            has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
            content = tar.extractfile(member) if has_content else None
            # Windows writes backslashes, and a name may have characters that UTF-8 cannot encode.
            forward = member.name.replace("\\", "/").removeprefix("./")
            entry_name = forward.encode("utf-8", "backslashreplace").decode()
            if content is not None and member.isreg() and _is_wanted(entry_name):
                yield _read_entry(entry_name, member.size, content)
            elif _is_wanted(entry_name):
                yield Entry(entry_name, None, "not_a_file")
            # Read to the end: tarfile would skip the remaining bytes without noticing a truncated file.
            while content is not None and content.read(BLOCK_BYTES):
                pass
        if tar.fileobj.read(BLOCK_BYTES).strip(b"\0"):
            hint = "unpack it with tar --ignore-zeros, and pass the folder: --source folder:DIR"
            raise SourceError(f"{name} has data after its end, like concatenated archives", hint=hint)


def _read_entry(name: str, size: int, content: IO[bytes]) -> Entry:
    if len(name) > MAX_NAME_CHARACTERS:
        return Entry(name[-MAX_NAME_CHARACTERS:], None, "name_too_long")
    if name.startswith("/") or ".." in name.split("/") or _DRIVE.match(name):
        return Entry(name, None, "outside_archive")
    if _suffix(name) in UNREAD_SUFFIXES:
        return Entry(name, None, "unsupported_format")
    max_bytes = MAX_TEXT_BYTES if is_text(name) else MAX_IMAGE_BYTES
    if size > max_bytes:
        return Entry(name, None, "file_too_large")
    data = content.read()
    try:
        return Entry(name, data, text=decode_text(data) if is_text(name) else None)
    except ValueError:
        return Entry(name, None, "unreadable_text")


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def is_text(name: str) -> bool:
    """Return whether an entry holds texts. This includes metadata tables, which belong to no single image."""
    return _suffix(name) in TEXT_SUFFIXES or posixpath.basename(name) in METADATA_FILES


def _is_wanted(name: str) -> bool:
    return not is_hidden(name) and (_suffix(name) in IMAGE_SUFFIXES | UNREAD_SUFFIXES or is_text(name))


# --- texts of images


def group_by_key(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Yield groups of adjacent entries with the same key. A group above a size limit is split."""
    group, num_bytes = list[Entry](), 0
    for entry in entries:
        is_full = len(group) >= MAX_GROUP_ENTRIES or num_bytes >= MAX_GROUP_BYTES
        if group and (_key(entry.name) != _key(group[0].name) or is_full):
            yield group
            group, num_bytes = [], 0
        group.append(entry)
        num_bytes += len(entry.data or b"")
    if group:
        yield group


def pair_texts(group: Sequence[Entry]) -> tuple[list[tuple[Entry, list[Entry]]], list[Entry]]:
    """Return the images in a group, each with its texts, and the texts that cannot be used.

    If several images share the key, a text belongs to the image with the same name except for the suffix.
    """
    images = [entry for entry in group if not is_text(entry.name)]
    texts = [entry for entry in group if entry.text is not None]
    pairs = [(image, texts) for image in images]
    if len(images) > 1:
        pairs = [
            (image, [text for text in texts if _stem(text) in (_stem(image), normalize_path(image.name))])
            for image in images
        ]
    used = {text.name for _, image_texts in pairs for text in image_texts}
    return pairs, [entry for entry in group if is_text(entry.name) and entry.name not in used]


def _stem(entry: Entry) -> str:
    return normalize_path(posixpath.splitext(entry.name)[0])


def _parse_texts(texts: Sequence[Entry]) -> tuple[list[str], dict[str, Any]]:
    """Return the human captions in an image's text files, and the values in its JSON files."""
    rows = {entry.name: _read_json(entry) for entry in texts if _suffix(entry.name) != ".txt"}
    skipped = "\n".join(text for row in rows.values() for text in model_texts(row))
    by_model = {line.strip() for line in skipped.splitlines()}
    captions: list[str] = []
    values: dict[str, Any] = {}
    for entry in sorted(texts, key=lambda text: text.name):
        if entry.name in rows:
            values |= rows[entry.name]
            captions += human_captions(rows[entry.name])
        else:
            lines = (line.strip()[:MAX_TEXT_CHARACTERS] for line in (entry.text or "").splitlines())
            captions += [line for line in lines if line and line not in by_model]
    return list(dict.fromkeys(captions)), values


def _read_json(entry: Entry) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file holds anything else."""
    try:
        row = parse_json(entry.text or "")
    except (ValueError, RecursionError, MemoryError):
        return {}
    return row if isinstance(row, dict) else {}


def _open(config: Config, path: str) -> Source:
    """Open the images in archives. Values of JSON files next to the images become the context."""
    refuse_roles(config, "an archive", "to use values of NAME.json in prompts, pass --columns context=A,B")
    files = find_source_files(path, (*SUFFIXES, ".zip"), follow_links=config.follow_links)
    zips = [name for name in files.names if name.lower().endswith(".zip")]
    archives = [name for name in files.names if name not in zips]
    if zips and not archives:
        raise SourceError(f"{zips[0]} is a zip file, which is not read", hint=UNPACK_HINT)
    if not archives:
        hint = f"pass a file, or a folder with files that end in {', '.join(SUFFIXES)}"
        raise SourceError(f"no archive at {path}", hint=hint)
    license, columns, split = config.license or UNKNOWN, config.context, config.source_split
    names_by_split = group_by_split(archives)
    names = archives if split is None else names_by_split.get(split, [])
    if not names:
        hint = f"rename the archives of this split, for example to {split}-0.tar"
        raise SourceError(f"no archive is named after the split {split}", hint=hint)

    def read_groups() -> Iterator[tuple[str, list[Entry]]]:
        for name in names:
            with files.translate_errors(), files.open(name) as file:
                yield from ((name, group) for group in group_by_key(read_entries(file, name)))

    def read() -> Iterator[RawSample | Rejected]:
        is_empty = True
        for name, group in read_groups():
            pairs, unused = pair_texts(group)
            is_empty = is_empty and not pairs
            for row in (_row(name, image, texts, license, columns) for image, texts in pairs):
                if isinstance(row, Rejected):
                    yield row
                elif split in (None, row.fields["split"]):
                    row_split = stored_split(row.fields["split"], split)
                    yield replace(row, fields=row.fields | {"split": row_split})
            yield from (_reject(name, text, text.reason or "unused_text") for text in unused)
        if is_empty:
            hint = "PNG, JPEG, WebP and other images are read, also in subfolders"
            raise SourceError(f"no images in {', '.join(names)[:200]}", hint=hint)

    if not {*PATH_COLUMNS}.issuperset(columns):
        known = [*PATH_COLUMNS]
        for _, group in islice(read_groups(), COLUMN_GROUPS):
            known += sorted(_parse_texts([entry for entry in group if is_text(entry.name)])[1])
        require_columns(columns, dict.fromkeys(known), "columns of the first images")
    messages = [f"zip files are not read: {', '.join(zips)[:200]}"] if zips else []
    messages += [*files.messages, *([] if split else describe_held_out(names_by_split))]
    return Source(
        name="archive",
        revision=files.revision,
        read=lambda start: check_samples(islice(read(), start, None)),
        messages=tuple(messages),
    )


def _reject(archive: str, entry: Entry, reason: str) -> Rejected:
    return Rejected(source_row=f"{archive}/{entry.name}", reason=reason, detail=REASONS[reason])


def _row(
    archive: str, image: Entry, texts: Sequence[Entry], license: str, columns: Sequence[str]
) -> RawSample | Rejected:
    if image.data is None:
        return _reject(archive, image, image.reason)
    name = f"{archive}/{image.name}"
    captions, values = _parse_texts(texts)
    try:
        split = read_split(values.get(SPLIT)) or split_of_path(archive)
    except ValueError as error:
        return Rejected(source_row=name, reason="unknown_split", detail=str(error))
    values = {"folder": posixpath.dirname(image.name), "file_name": image.name} | values
    try:
        context = tuple((column, as_text(values.get(column))) for column in columns)
    except SourceError as error:
        return Rejected(source_row=name, reason="unusable_column", detail=str(error))
    fields = ImageTexts(captions, list(human_questions(values)), split).sample_fields()
    return RawSample(
        source_row=name, images=(image.data,), license=license, fields=fields | {"context": context}
    )


SPEC = SourceSpec(
    name="archive:PATH",
    what="images in tar files (WebDataset): one file or a folder; also s3://, gs://, hf:// and https://",
    example="synth generate --source archive:photos.tar",
    open=_open,
    options=frozenset({"source_split", "columns", "license", "follow_links"}),
)
