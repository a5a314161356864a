"""Source: a local folder of images, read in an order that does not depend on the disk.

Captions beside the images become references: `picture.txt` with one caption a line, or `metadata.jsonl`, `.csv` or
`.parquet` with a column `file_name`, as in the imagefolder format of `datasets`. Other columns of these files may be named as
the context of prompts, and so may `folder` and `file_name`, which every image has.
"""

import csv
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config
from pipeline.dataset.licenses import UNKNOWN
from pipeline.dataset.text_columns import CAPTION_COLUMNS, QUESTION, SPLIT
from pipeline.digests import digest
from pipeline.errors import SourceError
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import (
    MAX_METADATA_BYTES,
    SourceSpec,
    as_text,
    check_samples,
    first_names,
    refuse_roles,
)
from pipeline.sources.captions import (
    captions_of_people,
    decode_text,
    describe_by_model,
    describe_unknown,
    match_images,
    most_held_out,
    questions_of_people,
    read_captions,
    read_lines,
    read_split,
    read_table,
    spelled_alike,
    texts_by_model,
)
from pipeline.sources.file_digests import ImageIds, digest_of_file
from pipeline.sources.parquet import SPLIT_OF_WORD, plain_batches, split_of_path
from pipeline.storage.own_lines import OWN_LINES, is_own_line, read_own_lines
from pipeline.storage.untrusted import (
    NOT_A_FILE,
    OUTSIDE,
    TOO_LARGE,
    UnsafeFileError,
    is_hidden,
    open_regular,
    read_regular,
    read_with_status,
)
from pipeline.tables import SPLITS
from pipeline.types import ALL, Context, RawSample, ReferenceQA, Rejected, Source, SourceSlice

UNREAD_SUFFIXES = frozenset(  # of images in formats that are not read
    f".{name}"
    for name in (
        "jp2", "j2k", "jpx", "jxl", "psd", "svg", "svgz", "tga", "ico", "icns", "sgi", "eps", "exr", "hdr", "ppm", "pgm", "pbm",
        "pnm", "qoi", "xcf", "raw", "cr2", "cr3", "nef", "nrw", "arw", "srf", "dng", "orf", "rw2", "raf", "pef", "sr2", "3fr",
    )
)  # fmt: skip
MAX_CAPTION_FILE_BYTES = 1_000_000
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OF_EVERY_IMAGE = ("folder", "file_name")  # columns that need no metadata file
UNREADABLE_FOLDER = "unreadable_folder"
REFUSALS = {  # by reason, without a path of this machine
    OUTSIDE: "a file outside of the folder: copy it there, or pass --follow-links",
    NOT_A_FILE: "a pipe, a device or a folder, not a regular file",
    TOO_LARGE: f"more than {MAX_IMAGE_BYTES:,} bytes",
}


@dataclass(slots=True)
class FolderContent:
    """The files under a folder by what they are for."""

    images: list[Path] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # images in other formats, and folders that cannot be listed
    others: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)  # to folders, which are not entered
    hidden: list[Path] = field(default_factory=list)  # files and folders that systems and programs keep there for themselves


@dataclass(slots=True)
class References:
    """Captions and other texts beside images, by image path, with messages about what was not used."""

    captions: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    questions: dict[Path, tuple[ReferenceQA, ...]] = field(default_factory=dict)
    splits: dict[Path, str] = field(default_factory=dict)  # of the images that a file of captions puts into one
    values: dict[Path, dict[str, str]] = field(default_factory=dict)  # of columns of metadata files that were asked for
    columns: set[str] = field(default_factory=set)  # of all metadata files
    files: set[Path] = field(default_factory=set)  # that they were read from
    num_by_model: int = 0  # texts that are left out
    messages: list[str] = field(default_factory=list)


def open_folder(
    root: Path,
    part: SourceSlice = ALL,
    licence: str = UNKNOWN,
    columns: Sequence[str] = (),
    caption_files: Sequence[Path] = (),
    *,
    follow_links: bool = False,
) -> Source:
    """Return image files sorted by path, or a slice without a revision. Raise SourceError if `root` holds none.

    `columns` of metadata files, or fields of EXIF, become the context; SourceError is raised for one that is neither. The
    `caption_files` say what people wrote about the images (sources/captions.py).
    Links to files outside of `root` are rejected, unless `follow_links` is set: their content would be published.
    """
    if not root.is_dir():
        raise SourceError(f"not a folder: {root}", hint="pass a folder of images: --source folder:PATH")
    content = list_files(root)
    if not content.images:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        hint = f"files that end in {suffixes} are read, in subfolders too"
        if any(path.suffix == ".arrow" for path in content.others):
            hint = f"datasets.load_from_disk({str(root)!r}) reads it: write it with to_parquet, and read that with parquet:PATH"
        raise SourceError("; ".join([f"no image in {root}", *describe_folders(content), *describe_hidden(content)]), hint=hint)
    rows: dict[str, Path | Rejected] = {row_name(path, root): path for path in content.images}
    rows |= {row.source_row: row for row in content.rejected}
    own = [(name, rows[name]) for name in sorted(rows)[part.number :: part.of]]
    paths = [row for _, row in own if isinstance(row, Path)]
    bound = None if follow_links else root
    references = read_references(root, paths, columns, content.images, follow_links=follow_links)
    _add_caption_files(references, caption_files, root, content.images)
    _add_splits_of_folders(references, {row_name(path, root): path for path in content.images})  # of all, also for a slice
    has_questions = bool(references.questions)
    contexts = {path: _context_of(path, root, references.values.get(path, {}), columns) for path in paths} if columns else {}
    unknown = [name for name in columns if name not in references.columns | {*OF_EVERY_IMAGE} and not is_exif_name(name)]
    if unknown and part == ALL:  # a slice may have no image beside the file that has the column
        known = ", ".join(sorted(references.columns | {*OF_EVERY_IMAGE}))
        raise SourceError(f"there is no column {unknown[0]}", hint=f"columns of {' and '.join(METADATA_FILES)}: {known}")
    references.messages += _describe_empty(contexts.values(), columns) if part == ALL else []
    ids = ImageIds()

    def contents() -> Iterator[list[Any]]:
        for name, row in own:
            if isinstance(row, Rejected):
                ids.add()
                continue
            sha256, context = digest_or_fault(row, bound, ids=ids), [contexts[row]] if contexts else []
            yield [name, sha256, references.captions.get(row, ()), *context, *_more(references, row)]

    def read(number: int) -> RawSample | Rejected:
        name, row = own[number]
        if isinstance(row, Rejected):
            return row
        try:
            data, status = read_with_status(row, bound, max_bytes=MAX_IMAGE_BYTES)
        except UnsafeFileError as error:
            return Rejected(source_row=name, reason=error.reason, detail=REFUSALS[error.reason])
        except OSError as error:
            return Rejected(source_row=name, reason="unreadable_file", detail=error.strerror or "unknown")
        texts: dict[str, Any] = {"references": references.captions.get(row, ()), "context": contexts.get(row, ())}
        if has_questions:
            texts["reference_qa"] = references.questions.get(row, ())
        texts["split"] = references.splits.get(row)
        known = (image_id,) if (image_id := ids.find(number, status)) else ()
        return RawSample(source_row=name, images=(data,), licence=licence, fields=texts, image_ids=known)

    return Source(
        name="folder",
        revision=digest(list(contents())) if part == ALL else "",
        read=lambda start: check_samples(map(read, range(start, len(own))), columns),
        count=lambda: len(own),
        messages=tuple(_describe_content(content, references)) if part == ALL else (),
    )


def _describe_empty(contexts: Collection[Context], columns: Sequence[str]) -> list[str]:
    """Return of which columns some images have no value: their prompts say so. Of EXIF, that is read later."""
    values = list(map(dict, contexts))
    counts = {name: sum(not of_image[name] for of_image in values) for name in columns if not is_exif_name(name)}
    messages = []
    for name, count in counts.items():
        if count and name != "folder":
            messages.append(f"{count:,} of {len(values):,} images have no value in the column {name}")
    return messages


def _add_splits_of_folders(references: References, images: Mapping[str, Path]) -> None:
    """Add the splits that folders are named after, for images of which no file says one."""
    folders = _first_folders(images)
    splits = splits_of_names(folders)
    for name, split in splits.items():
        references.splits.setdefault(images[name], split)
    if splits and (unnamed := [name for name, folder in folders.items() if folder.casefold() not in SPLIT_OF_WORD]):
        text = f"{len(unnamed):,} images lie in no folder that is named after a split, and are divided by a hash"
        references.messages.append(f"{text} ({first_names(unnamed)})")


def _first_folders(names: Collection[str]) -> dict[str, str]:
    """Return by the path of each image the folder in which it lies below those that all of them share; "" for none."""
    shared = os.path.commonpath(names) if len(names) > 1 else ""
    below = {name: name.removeprefix(f"{shared}/") for name in names}
    return {name: rest.rpartition("/")[0].partition("/")[0] for name, rest in below.items()}


def splits_of_names(names: Mapping[str, str]) -> dict[str, str]:
    """Return the splits that names say, such as those of the folders of images: none if all say the same, or none holds out.

    Without a split to validate on, those of the split train are left out: some of them are needed for it.
    """
    splits = {key: SPLIT_OF_WORD.get(name.casefold()) for key, name in names.items()}
    named = {*splits.values()}
    if len(named) < 2 or named == {"train", None}:  # all are of one split, or nothing is held out
        return {}
    return {key: split for key, split in splits.items() if split and (split != "train" or "validation" in named)}


def _more(references: References, path: Path) -> list[Any]:
    """Return what the revision has of an image beside its captions: nothing where there is none, as in earlier releases."""
    asked = [[one.question, one.answers, one.answer_type] for one in references.questions.get(path, ())]
    split = references.splits.get(path)
    return [*([asked] if asked else []), *([{"split": split}] if split else [])]


def _add_caption_files(references: References, files: Sequence[Path], root: Path, images: Sequence[Path]) -> None:
    """Add what files of captions say of the images of a folder. Raise SourceError if none of it is about them."""
    by_name = {row_name(path, root): path for path in images}
    splits = splits_of_names({str(file): split_of_path(file.stem) or "" for file in files})  # captions_val2017.json
    read_before = {path.resolve() for path in references.files}
    for file in (path for path in files if path.resolve() not in read_before):
        matched, unknown = match_images(read_captions(file), list(by_name))
        if not matched:
            hint = f"names as the images have them are looked for, such as {next(iter(by_name))}"
            raise SourceError(f"{file} names no image of {root}; it names {first_names(unknown)}", hint=hint)
        references.files.add(file)
        references.messages += describe_unknown(file, unknown)
        for name, about in matched.items():
            path = by_name[name]
            references.captions[path] = (*references.captions.get(path, ()), *about.captions)
            references.questions[path] = (*references.questions.get(path, ()), *about.questions)
            if split := most_held_out(about.split or splits.get(str(file)), references.splits.get(path)):
                references.splits[path] = split
            references.num_by_model += about.num_by_model
    if not any(references.questions.values()):
        references.questions.clear()


def list_files(root: Path) -> FolderContent:
    """Return all files under a folder. Folders that links lead to are not entered: a link to a parent would never end."""
    content = FolderContent()
    waiting = [root]  # not os.walk, which recurses: a tree may be deeper than Python's stack
    while waiting:
        folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            name, detail = row_name(folder, root), error.strerror or "unknown"
            content.rejected.append(Rejected(source_row=name, reason=UNREADABLE_FOLDER, detail=detail))
            continue
        for entry in entries:
            path = folder / entry.name
            if is_hidden(entry.name):
                content.hidden.append(path)
                continue
            is_link = entry.is_symlink()
            if path.is_dir() if is_link else entry.is_dir():  # a link to itself is an error for an entry, and none for a path
                (content.links if is_link else waiting).append(path)
                continue
            suffix = path.suffix.lower()
            if suffix in UNREAD_SUFFIXES:
                detail = f"{suffix} files are not read: convert them to JPEG or PNG"
                content.rejected.append(Rejected(source_row=row_name(path, root), reason="unsupported_format", detail=detail))
            else:
                (content.images if suffix in IMAGE_SUFFIXES else content.others).append(path)
    content.others.sort(key=lambda path: row_name(path, root))
    return content


def _describe_content(content: FolderContent, references: References) -> Iterator[str]:
    """Yield what a user should know of a folder: what cannot be read, captions beside images, files that are for nothing."""
    yield from describe_folders(content)
    if references.captions:
        captioned = [references.captions[path] for path in content.images if path in references.captions]
        count, total = sum(map(len, captioned)), len(content.images)
        yield f"captions of people: {count:,} for {len(captioned):,} of {total:,} images"
    if references.splits:
        counts = Counter(references.splits[path] for path in content.images if path in references.splits)
        yield f"splits of the source: {', '.join(f'{counts[split]:,} {split}' for split in SPLITS if counts[split])}"
    if references.questions:
        asked = [references.questions[path] for path in content.images if references.questions.get(path)]
        yield f"questions of people: {sum(map(len, asked)):,} about {len(asked):,} of {len(content.images):,} images"
    yield from describe_by_model(references.num_by_model)
    yield from references.messages
    yield from describe_links(content)
    yield from describe_hidden(content)
    files = {path.resolve() for path in references.files}
    if unread := [path for path in content.others if path.resolve() not in files]:
        yield f"not read: {count_by_suffix(unread)}"


def count_by_suffix(paths: Iterable[Path]) -> str:
    """Return how many files there are of each suffix, with the first names: `2 .mp4 (a.mp4, b.mp4), 1 .txt (notes.txt)`."""
    names: dict[str, list[str]] = {}
    for path in paths:
        names.setdefault(path.suffix.lower() or "without a suffix", []).append(path.name)
    most_first = sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    return ", ".join(f"{len(of_suffix):,} {suffix} ({first_names(of_suffix)})" for suffix, of_suffix in most_first)


def describe_folders(content: FolderContent) -> list[str]:
    """Return which folders cannot be read."""
    folders = sorted(row.source_row for row in content.rejected if row.reason == UNREADABLE_FOLDER)
    return [f"folders that cannot be read: {len(folders)} ({first_names(folders)})"] if folders else []


def describe_links(content: FolderContent) -> list[str]:
    """Return which links to folders are not entered."""
    names = sorted(path.name for path in content.links)
    return [f"links to folders, which are not entered: {len(names):,} ({first_names(names)})"] if names else []


def describe_hidden(content: FolderContent) -> list[str]:
    """Return which hidden files and folders are not read, but for the notes of synth itself."""
    names = sorted(path.name for path in content.hidden if path.name != OWN_LINES)
    return [f"hidden, and not read: {len(names):,} ({first_names(names)})"] if names else []


def read_references(
    root: Path,
    paths: Sequence[Path],
    columns: Sequence[str] = (),
    among: Sequence[Path] | None = None,
    *,
    follow_links: bool = False,
) -> References:
    """Return what metadata files say of `paths`: captions, values of other `columns`, and questions.

    The files are those beside any of the images `among` which the paths are.
    Raise SourceError if a metadata file or a row of it is unusable.
    """
    images = set(paths if among is None else among)
    of_spelling = {spelled_alike(str(path)): path for path in images}

    def image_of(folder: Path, row: dict[str, Any]) -> Path:
        """Return the image that a row names, however its system spells it; the path as it stands, if there is none."""
        path = folder / str(row["file_name"])
        return path if path in images else of_spelling.get(spelled_alike(str(path)), path)

    references, captions = References(), dict[Path, list[str]]()
    bound, unread = None if follow_links else root, list[str]()
    parents = {path.parent for path in images}
    for folder in sorted({folder for path in parents for folder in (path, *path.parents) if folder.is_relative_to(root)}):
        for file in (folder / name for name in METADATA_FILES):
            if file.is_file() or file.is_symlink():
                references.files.add(file)
                rows = _read_metadata(file, bound)
                references.columns.update(str(name) for row in rows for name in row)
                for row in rows if columns else ():
                    own = {name: as_text(row[name]) for name in columns if name in row}
                    references.values.setdefault(image_of(folder, row), {}).update(own)
                references.messages += _add_captions(file, rows, captions, images, partial(image_of, folder))
                references.messages += _add_splits(file, rows, references.splits, partial(image_of, folder))
                for row in rows:
                    if (questions := questions_of_people(row)) and (path := image_of(folder, row)) in images:
                        references.questions[path] = (*references.questions.get(path, ()), *questions)
                    references.num_by_model += len(texts_by_model(row))
    own_lines = dict[Path, frozenset[str]]()
    for path in paths:
        if (caption_file := path.with_suffix(".txt")).is_file():
            references.files.add(caption_file)
            try:
                text = read_regular(caption_file, bound, max_bytes=MAX_CAPTION_FILE_BYTES).decode("utf-8-sig", "replace")
                if path.parent not in own_lines:
                    own_lines[path.parent] = read_own_lines(path.parent, bound)
                    references.files.add(path.parent / OWN_LINES)
            except (OSError, UnsafeFileError) as error:
                unread.append(str(error))
                continue
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            of_people = [line for line in lines if not is_own_line(caption_file, line, own_lines[path.parent])]
            captions.setdefault(path, []).extend(of_people)
            references.num_by_model += len(lines) - len(of_people)
    if unread:
        references.messages.append(f"captions that are not read: {len(unread):,} ({first_names(unread)})")
    references.captions = {path: tuple(captions[path]) for path in paths if captions.get(path)}
    return references


def _add_captions(
    file: Path,
    rows: list[dict[str, Any]],
    captions: dict[Path, list[str]],
    images: set[Path],
    image_of: Callable[[dict[str, Any]], Path],
) -> list[str]:
    """Add the captions of a metadata file; return messages about what of it was not used."""
    missing = []
    for row in rows:
        path = image_of(row)
        if path not in images:
            missing.append(str(row["file_name"]))
        captions.setdefault(path, []).extend(captions_of_people(row))
    return describe_metadata(str(file), rows, missing)


def _add_splits(
    file: Path, rows: list[dict[str, Any]], splits: dict[Path, str], image_of: Callable[[dict[str, Any]], Path]
) -> list[str]:
    """Add what the column `split` of a metadata file says; return a message if it says something else than splits."""
    try:
        stated = [(image_of(row), read_split(row.get(SPLIT))) for row in rows]
    except ValueError as error:
        return [f"{file}: the column {SPLIT} is not read: {error}"]
    if "validation" not in {split for _, split in stated}:  # some of those to train on are needed for it
        stated = [(path, split) for path, split in stated if split != "train"]
    for path, split in stated:
        if split and (held_out := most_held_out(split, splits.get(path))):
            splits[path] = held_out
    return []


def describe_metadata(file: str, rows: Sequence[dict[str, Any]], missing: Sequence[str]) -> list[str]:
    """Return what of a metadata file was not used; `missing` are images that it names, and that are not there."""
    messages = [f"{file} names {len(missing):,} images that are not here: {first_names(missing)}"] if missing else []
    if not rows:
        messages.append(f"{file} is not used: no row of it has a file_name")
    elif not any(column in row for row in rows for column in (*CAPTION_COLUMNS, QUESTION)):
        columns = ", ".join(str(name) for name in rows[0])
        messages.append(f"{file} gives no captions: they stand in {', '.join(CAPTION_COLUMNS)}, and it has {columns}")
    return messages


def _read_metadata(file: Path, bound: Path | None) -> list[dict[str, Any]]:
    try:
        data = read_regular(file, bound, max_bytes=MAX_METADATA_BYTES)
    except UnsafeFileError as error:
        raise SourceError(f"cannot read the captions: {error}", hint=error.hint) from None
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", hint="check its permissions") from None
    return parse_metadata(data, str(file))


def parse_metadata(data: bytes, name: str) -> list[dict[str, Any]]:
    """Return the rows of a metadata file, each with a `file_name`; none if another program's table has that name.

    Raise SourceError if they cannot be read.
    """
    try:
        if name.endswith(".parquet"):
            rows = _read_parquet(data)
        elif name.endswith(".csv"):
            rows = list(read_table(decode_text(data), is_quoted=True))
        else:
            rows = list(read_lines(decode_text(data)))
        named = [row for row in rows if row.get("file_name")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error, pa.ArrowException) as error:
        problem = "a row has no names and values" if isinstance(error, AttributeError) else str(error)
        hint = f"it holds file_name and one of {', '.join(CAPTION_COLUMNS)}, in UTF-8"
        raise SourceError(f"cannot read {name}: {problem}", hint=hint) from None
    return named


def _read_parquet(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a table. Raise ValueError if it is larger than its file may be."""
    table = pq.ParquetFile(pa.BufferReader(data))
    if "file_name" not in table.schema_arrow.names:  # another program's table of that name
        return []
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for batch in plain_batches(table):  # a value of a dictionary may stand in every row
        num_bytes += batch.nbytes
        if num_bytes > MAX_METADATA_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_METADATA_BYTES:,} bytes")
        rows += batch.to_pylist()
    return rows


def _context_of(path: Path, root: Path, values: dict[str, str], columns: Sequence[str]) -> Context:
    own = {"folder": "" if path.parent == root else row_name(path.parent, root), "file_name": row_name(path, root)}
    return tuple((name, values.get(name) or own.get(name, "")) for name in columns)


def row_name(path: Path, root: Path) -> str:
    """Return the path relative to the root; bytes that are not UTF-8 become escapes."""
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def digest_or_fault(
    path: Path, bound: Path | None, max_bytes: int | None = MAX_IMAGE_BYTES, ids: ImageIds | None = None
) -> str:
    """Return the sha256 of a file, or that it cannot be read, and add it to `ids`."""
    try:
        return digest_of_file(path, partial(open_regular, path, bound, max_bytes), ids)
    except (OSError, ValueError, UnsafeFileError):
        if ids is not None:
            ids.add()
        return "unreadable"


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    refuse_roles(config, "a folder", "a folder has files: --columns context=A,B names columns of metadata.csv for prompts")
    folder, licence = Path(path).expanduser(), config.license or UNKNOWN
    return open_folder(folder, part, licence, config.context, config.captions, follow_links=config.follow_links)


SPEC = SourceSpec(
    name="folder:PATH",
    what="every image under a folder, sorted; captions from NAME.txt, metadata.jsonl or metadata.csv there, or --captions",
    splits="as folders train, validation and test, metadata files or files of captions say, else by hash",
    size="yours",
    license="unknown, unless --license says it; unknown images are pushed to a private repository",
    needs="a vision-language model",
    example="synth generate --source folder:photos --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=_open,
    options=frozenset({"columns", "captions", "split.group_by", "license", "follow_links"}),
)
