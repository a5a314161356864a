"""Source: images in archives (`archive:PATH`): tar files, such as those of WebDataset, and zip files.

Nothing is unpacked to a disk. `NAME.txt` next to an image holds captions, one a line. `NAME.json` may hold captions,
questions, a split, and columns for the context of prompts. Texts are read first, wherever they are in the archive. An archive
in a store is read once, with the texts that are next to their image.
"""

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.images.metadata import is_exif_name
from pipeline.sources.archive_entries import REASONS, Entry, is_metadata, is_text, read_entries
from pipeline.sources.base import LICENSE_UNLESS_SAID, SourceSpec, as_text, check_samples, first_names, refuse_roles
from pipeline.sources.captions import spelled_alike
from pipeline.sources.local_files import SourceFiles
from pipeline.sources.parquet import describe_held_out, split_of_path, stored_split
from pipeline.sources.references import OF_EVERY_IMAGE
from pipeline.sources.remote import find_source_files
from pipeline.sources.texts import (
    captions_of_people,
    decode_text,
    describe_by_model,
    questions_of_people,
    read_split,
    texts_by_model,
)
from pipeline.tables import SPLIT
from pipeline.types import ALL, UNKNOWN, RawSample, Rejected, Source, SourceSlice

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
MAX_GROUP_ENTRIES, MAX_GROUP_BYTES = 64, 64_000_000  # of one key in a tar file that are held at once
MAX_ARCHIVE_TEXT_BYTES = 256_000_000  # of all texts of an archive
QUESTION_ARCHIVES = 16  # that are looked through for questions, before any image is read
COLUMN_IMAGES = 20  # beside which columns of the context are looked for


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
