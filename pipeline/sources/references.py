"""Collect human texts about the images of a folder: captions, questions, splits, and values for prompts.

They come from `NAME.txt` next to an image, from metadata files as in the imagefolder format of `datasets`, and from files of
captions (sources/captions.py).
"""

import csv
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.sources.base import MAX_METADATA_BYTES, as_text, first_names
from pipeline.sources.captions import match_images, read_captions, spelled_alike
from pipeline.sources.parquet import SPLIT_OF_WORD, read_plain_rows, split_of_path
from pipeline.sources.texts import (
    captions_of_people,
    decode_text,
    most_held_out,
    questions_of_people,
    read_csv,
    read_lines,
    read_split,
    texts_by_model,
)
from pipeline.storage.own_lines import OWN_LINES, is_own_line, read_own_lines
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import CAPTION_COLUMNS, QUESTION, SPLIT
from pipeline.types import ReferenceQA

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OF_EVERY_IMAGE = ("folder", "file_name")  # columns that need no metadata file
MAX_CAPTION_FILE_BYTES = 1_000_000


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


def add_splits_of_folders(references: References, images: Mapping[str, Path]) -> None:
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


def texts_of_revision(references: References, path: Path) -> list[Any]:
    """Return the texts of an image that are part of the revision: captions, questions, and the split."""
    asked = [[one.question, one.answers, one.answer_type] for one in references.questions.get(path, ())]
    return [references.captions.get(path, ()), asked, references.splits.get(path)]


def add_caption_files(references: References, files: Sequence[Path], root: Path, images: Mapping[str, Path]) -> None:
    """Add what files of captions say of the images of a folder, by name. Raise SourceError if none of it is about them."""
    splits = splits_of_names({str(file): split_of_path(file.stem) or "" for file in files})  # captions_val2017.json
    read_before = {path.resolve() for path in references.files}
    for file in (path for path in files if path.resolve() not in read_before):
        matched, unknown = match_images(read_captions(file), list(images))
        if not matched:
            hint = f"names as the images have them are looked for, such as {next(iter(images))}"
            raise SourceError(f"{file} names no image of {root}; it names {first_names(unknown)}", hint=hint)
        references.files.add(file)
        references.messages += _describe_unknown(file, unknown)
        for name, about in matched.items():
            path = images[name]
            references.captions[path] = (*references.captions.get(path, ()), *about.captions)
            references.questions[path] = (*references.questions.get(path, ()), *about.questions)
            if split := most_held_out(about.split or splits.get(str(file)), references.splits.get(path)):
                references.splits[path] = split
            references.num_by_model += about.num_by_model
    if not any(references.questions.values()):
        references.questions.clear()


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
                    where = f"{file}, {row['file_name']}: the column"
                    own = {name: as_text(row[name], f"{where} {name}") for name in columns if name in row}
                    references.values.setdefault(image_of(folder, row), {}).update(own)
                references.messages += _describe_metadata(file, rows)
                references.messages += _add_splits(file, rows, references.splits, partial(image_of, folder))
                unknown = list[str]()
                for row in rows:
                    references.num_by_model += len(texts_by_model(row))
                    if (path := image_of(folder, row)) not in images:
                        unknown.append(str(row["file_name"]))
                        continue
                    captions.setdefault(path, []).extend(captions_of_people(row))
                    if questions := questions_of_people(row):
                        references.questions[path] = (*references.questions.get(path, ()), *questions)
                references.messages += _describe_unknown(file, unknown)
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


def _describe_unknown(file: Path, names: Sequence[str]) -> list[str]:
    """Return a message about names in a file that match no image."""
    return [f"{file} names {len(names):,} images that are not here: {first_names(names)}"] if names else []


def _describe_metadata(file: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a message about a metadata file without rows about images, or without captions."""
    if not rows:
        return [f"{file} is not used: no row of it has a file_name"]
    if any(column in row for row in rows for column in (*CAPTION_COLUMNS, QUESTION)):
        return []
    columns = ", ".join(str(name) for name in rows[0])
    return [f"{file} gives no captions: they are in {', '.join(CAPTION_COLUMNS)}, and it has {columns}"]


def _read_metadata(file: Path, bound: Path | None) -> list[dict[str, Any]]:
    """Return the rows of a metadata file of a folder that have a `file_name`.

    Raise SourceError if they cannot be read, or the file is outside of the folder.
    """
    try:
        data = read_regular(file, bound, max_bytes=MAX_METADATA_BYTES)
    except UnsafeFileError as error:
        raise SourceError(f"cannot read the captions: {error}", hint=error.hint) from None
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror or error}", hint="check its permissions") from None
    try:
        if file.suffix == ".parquet":
            has_names = "file_name" in pq.read_schema(pa.BufferReader(data)).names  # else it is a table of another program
            rows = list(read_plain_rows(data, MAX_METADATA_BYTES)) if has_names else []
        elif file.suffix == ".csv":
            rows = list(read_csv(decode_text(data)))
        else:
            rows = list(read_lines(decode_text(data)))
        return [row for row in rows if row.get("file_name")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error, pa.ArrowException) as error:
        problem = "a row has no names and values" if isinstance(error, AttributeError) else str(error)
        hint = f"it holds file_name and one of {', '.join(CAPTION_COLUMNS)}, in UTF-8"
        raise SourceError(f"cannot read {file}: {problem}", hint=hint) from None
