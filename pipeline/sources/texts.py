"""Human texts about images: captions, questions, splits, and values for prompts.

They come from rows of tables, from `NAME.txt` next to an image, from metadata files as in the imagefolder format of `datasets`,
and from files of captions, each of which may be compressed by gzip:

| form | what a file holds |
|---|---|
| COCO | JSON with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`) |
| Karpathy | JSON with `images`: `filename`, `split`, and `sentences` with `raw` |
| a JSON object | names of images with their captions |
| rows | a JSON list, JSON lines, or CSV with a header: a name, and captions, or a question with answers |
| Flickr30k | lines `NAME#0<tab>CAPTION` |

An image is named by its path, or by its file name if no other image has it. Texts that a model wrote are left out.
"""

import csv
import gzip
import io
import json
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError
from pipeline.sources.base import MAX_METADATA_BYTES, as_text, first_names
from pipeline.sources.parquet import SPLIT_OF_WORD, read_plain_rows, split_of_path
from pipeline.storage.sidecars import OWN_LINES, is_own_line, read_own_lines
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import (
    ANSWER_TYPE,
    ANSWERS,
    BY_MODEL,
    CAPTION_COLUMNS,
    CAPTIONS,
    QA,
    QUESTION,
    REFERENCE_QA,
    REFERENCES,
    SPLIT,
    SPLIT_RANK,
    WRITTEN_BY,
)
from pipeline.types import ReferenceQA

TEXT_KEYS = ("raw", "caption", "text", "answer")  # of an object, in which a text may be
_PROMPT_ID = re.compile(r"[a-z][a-z0-9_]*/[\w.-]+@[0-9a-f]{12,64}")  # of what a model wrote
_PYTHON_TEXT = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_PYTHON_LIST = re.compile(rf"\[\s*(?:{_PYTHON_TEXT.pattern})(?:\s*,\s*(?:{_PYTHON_TEXT.pattern}))*\s*,?\s*\]")
_ESCAPE, _ESCAPED = re.compile(r"\\(.)"), {"n": "\n", "t": "\t"}
FILE_NAMES = ("file_name", "filename", "image_name", "image", "image_path", "filepath", "file", "path")
NAMES = (*FILE_NAMES, "image_id", "name")
HINT = "it may be COCO's or Karpathy's JSON, CSV or JSON lines with file_name and caption, or Flickr30k's lines, in UTF-8"
_TOKEN = re.compile(r"(.+)#\d+\t(.*)")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
OF_EVERY_IMAGE = ("folder", "file_name")  # columns that need no metadata file
MAX_CAPTION_FILE_BYTES = 1_000_000


# --- rows


def read_texts(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the captions of a row: the texts in the first of these columns that has a value, if people wrote them.

    Of a row that is a model's, they are those in lists of objects, each of which says by itself who wrote it.
    """
    value = next((row[name] for name in names if row.get(name)), None)
    if _is_by_model(row):
        value = [one for one in value if isinstance(one, dict) and WRITTEN_BY in one] if isinstance(value, list) else None
    return texts_of_value(value)


def captions_of_people(row: Mapping[str, Any], names: Sequence[str] = CAPTION_COLUMNS) -> list[str]:
    """Return the captions of a row; of an export of synth also those in its column `references`, each once."""
    references = texts_of_value(row.get(REFERENCES)) if WRITTEN_BY in row else []
    if not references:
        return read_texts(row, names)
    texts: dict[str, str] = {}
    for text in (*read_texts(row, names), *references):
        texts.setdefault(" ".join(text.split()), text)  # a caption in a version is tidy, and a reference as it was given
    return [*texts.values()]


def questions_of_people(row: Mapping[str, Any]) -> tuple[ReferenceQA, ...]:
    """Return the questions of a row: its own, and those of a list `qa`; of an export of synth, each once with all answers."""
    is_export = WRITTEN_BY in row
    lists = [row.get(name) for name in ((REFERENCE_QA, QA) if is_export else (QA,))]
    rows = [row, *(one for listed in lists if isinstance(listed, list) for one in listed if isinstance(one, dict))]
    questions = [question for one in rows if (question := read_question(one))]
    first = {one.question: one for one in reversed(questions)}
    return tuple(one for one in questions if not is_export or one is first[one.question])


def texts_by_model(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of which a row, or an object in a list of it, says that a model wrote them, each once."""
    listed = (one for name in (*CAPTIONS, QA) if isinstance(row.get(name), list) for one in row[name])
    by_model = [one for one in (row, *listed) if isinstance(one, Mapping) and _is_by_model(one)]
    texts = (one.get(name) for one in by_model for name in (*CAPTIONS, QUESTION))
    return [text for text in dict.fromkeys(text for text in texts if isinstance(text, str)) if text]


def describe_by_model(count: int, place: str = "") -> list[str]:
    """Return what a user should know of texts that are left out, since a model wrote them."""
    return [f"texts that a model wrote, which are none of people{place}: {count:,}"] if count else []


def _is_by_model(row: Mapping[str, Any]) -> bool:
    prompt_id = row.get("prompt_id")  # of a caption in a version; that of an own file says nothing here
    is_of_version = isinstance(prompt_id, str) and _PROMPT_ID.fullmatch(prompt_id) is not None
    return row.get(WRITTEN_BY) == BY_MODEL or is_of_version


def read_split(value: Any) -> str | None:
    """Return the split of a word such as `val`. Raise ValueError for an unknown one, whose images could land anywhere."""
    word = str(value).strip().casefold() if value else ""
    if word and word not in SPLIT_OF_WORD:
        raise ValueError(f"{value!r} is not a split: it may be train, validation, test, or a usual word for one of them")
    return SPLIT_OF_WORD.get(word)


def read_question(row: Mapping[str, Any]) -> ReferenceQA | None:
    """Return the question of a row with a column `question` and one of `answers` or `answer`; None if people wrote none."""
    if _is_by_model(row):
        return None
    question = row.get(QUESTION)
    answers = next((texts_of_value(row[key], _answer) for key in ANSWERS if row.get(key) not in (None, "", [])), [])
    if not isinstance(question, str) or not question.strip() or not answers:
        return None
    kind = row.get(ANSWER_TYPE)
    return ReferenceQA(question=_encodable(question.strip()), answers=tuple(answers), answer_type=str(kind) if kind else None)


def texts_of_value(value: Any, text_of: Callable[[Any], str] = lambda item: item if isinstance(item, str) else "") -> list[str]:
    """Return the texts in a value: itself, those of lists, or those of objects with a `raw`, `caption`, `text` or `answer`."""
    if isinstance(value, list):
        return [text for item in value for text in texts_of_value(item, text_of)]
    if isinstance(value, dict):
        if _is_by_model(value):
            return []
        return texts_of_value(next((value[key] for key in TEXT_KEYS if key in value), None), text_of)
    if isinstance(value, str) and (listed := list_in_cell(value)) is not None:
        return texts_of_value(listed, text_of)
    text = _encodable(text_of(value)).strip()
    return [text] if text else []


def list_in_cell(text: str) -> list[Any] | None:
    """Return the list of texts, or of objects, that stands in a cell of a table as JSON, or as Python writes it; else None."""
    if not (text[:1] == "[" and text[-1:] == "]"):
        return None
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if value and all(isinstance(item, str | dict) for item in value) else None
    if not _PYTHON_LIST.fullmatch(text):
        return None
    return [_ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), part[1:-1]) for part in _PYTHON_TEXT.findall(text)]


def _answer(value: Any) -> str:
    """Return an answer as people say it: yes for true, 2 for 2.0, nothing for null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    is_missing = value is None or value != value  # NaN
    return "" if is_missing else str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _encodable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def most_held_out(one: str | None, other: str | None) -> str | None:
    """Return the split, of two that an image is said to be in, that is held out more."""
    return max(one, other, key=SPLIT_RANK.__getitem__)


def decode_text(data: bytes) -> str:
    """Return a text in UTF-8, or in UTF-16 with a mark. Raise ValueError if it is in neither."""
    utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf_16 else "utf-8-sig")  # spreadsheets put a mark first


def read_lines(text: str) -> Iterator[Any]:
    """Yield the values of JSON lines. Raise ValueError, with its number, for a line that is none."""
    for number, line in enumerate(text.split("\n"), start=1):  # other line ends may be in a string
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from None


def read_csv(text: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV with commas, semicolons, tabs or bars, by names of columns.

    Raise ValueError for a name that comes twice, a row with more values than names, and a quote that is not closed.
    """
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    names = [name for name in table.fieldnames or () if name.strip()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two columns are named {twice}")
    last: dict[str, Any] = {}
    for row in table:
        last = _columns(row, table.line_num)
        if delimiter in "\t|" and any("\n" in str(value) and delimiter in str(value) for value in last.values()):
            raise ValueError(f"a quote before line {table.line_num} is not closed: put a text that begins with one in quotes")
        if any(row.values()):
            yield last
    if text.count('"') % 2 and any("\n" in str(value) for value in last.values()):
        raise ValueError(f"a quote before line {table.line_num} is not closed")


def _columns(row: dict[Any, Any], line: int) -> dict[str, Any]:
    """Return a row of a table by the names of its columns. Raise ValueError if it has more values than names."""
    if any(row.pop(None, None) or ()):  # other than commas at the end of a line
        raise ValueError(f"line {line} has more columns than the first line: put texts with commas in quotes")
    return {str(name).strip(): value for name, value in row.items()}


# --- files of captions


@dataclass(slots=True)
class Written:
    """What people wrote about one image."""

    captions: list[str] = field(default_factory=list)
    questions: list[ReferenceQA] = field(default_factory=list)
    split: str | None = None
    num_by_model: int = 0  # captions and questions that are left out, since a model wrote them


def read_captions(path: Path) -> dict[str, Written]:
    """Return what a file says of each image, by the names that it gives them. Raise SourceError if it cannot be read."""
    try:
        data = read_regular(path, max_bytes=MAX_METADATA_BYTES)
        if path.suffix == ".gz":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_METADATA_BYTES + 1)
            if len(data) > MAX_METADATA_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_METADATA_BYTES:,} bytes")
        rows = list(_rows(decode_text(data).lstrip()))
    except UnsafeFileError as error:
        raise SourceError(f"cannot read the captions: {error}", hint=error.hint) from None
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror or error}", hint="name a file of captions: --captions FILE"
        ) from None
    except KeyError as error:
        raise SourceError(f"cannot read {path}: an object in it has no {error}", hint=HINT) from None
    except (EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        problem = f"{error!r}" if isinstance(error, LookupError | AttributeError | TypeError) else str(error)
        raise SourceError(f"cannot read {path}: {problem}", hint=HINT) from None
    written: defaultdict[str, Written] = defaultdict(Written)
    for name, captions, question, split, num_by_model in rows:
        about = written[name]
        about.captions += captions
        about.questions += [question] if question else []
        about.split = most_held_out(split, about.split)
        about.num_by_model += num_by_model
    if not any(about.captions or about.questions for about in written.values()):
        if any(about.num_by_model for about in written.values()):
            hint = f"people's are wanted here; without the values {WRITTEN_BY!r} they are taken for those"
            raise SourceError(f"a model wrote all that is in {path}", hint=hint)
        raise SourceError(f"{path} has no caption and no question", hint=HINT)
    return dict(written)


Row = tuple[str, list[str], ReferenceQA | None, str | None, int]  # name, captions, a question, the split, texts of a model


def _rows(text: str) -> Iterator[Row]:
    start = text.lstrip()[:1]
    if start == "[":
        return map(_object_row, json.loads(text))
    if start == "{":
        try:
            value = json.loads(text)
        except ValueError:
            return map(_object_row, read_lines(text))
        return _rows_of_object(value)
    lines = text.split("\n")  # other line ends may be in a text
    if _TOKEN.fullmatch(lines[0].rstrip("\r")):
        return (_token_row(line.rstrip("\r")) for line in lines if line.strip())
    return (_row({name.lower(): value for name, value in row.items()}) for row in read_csv(text))


def _rows_of_object(value: dict[str, Any]) -> Iterator[Row]:
    images = value.get("images")
    if isinstance(images, list) and "annotations" in value:
        names = {image["id"]: image["file_name"] for image in images}
        if other := next((image for image in images if names[image["id"]] != image["file_name"]), None):
            raise ValueError(f"two of its images have the id {other['id']}: {other['file_name']} and {names[other['id']]}")
        return (_row({**one, "file_name": names.get(one["image_id"], one["image_id"])}) for one in value["annotations"])
    if isinstance(images, list):
        return (_row({**one, "captions": [sentence["raw"] for sentence in one["sentences"]]}) for one in images)
    if any(name in value for name in NAMES):
        return iter([_row(value)])  # JSON lines with a single one
    return ((str(name), texts_of_value(captions), None, None, 0) for name, captions in value.items())


def _token_row(line: str) -> Row:
    match = _TOKEN.fullmatch(line)
    if not match:
        raise ValueError(f"a line is not of the form NAME#0<tab>CAPTION: {line[:80]!r}")
    return match[1], texts_of_value(match[2]), None, None, 0


def _object_row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"a row is not an object with names and values, but {json.dumps(value)[:80]}")
    return _row(value)


def _row(row: Mapping[str, Any]) -> Row:
    name = next((row[key] for key in NAMES if row.get(key) not in (None, "")), None)
    if name is None:
        raise ValueError(f"a row names no image; it has {', '.join(map(str, row))[:200]}")
    captions = captions_of_people(row, CAPTIONS)
    return str(name).strip(), captions, read_question(row), read_split(row.get(SPLIT)), len(texts_by_model(row))


def match_images(written: Mapping[str, Written], images: Sequence[str]) -> tuple[dict[str, Written], list[str]]:
    """Return the texts by the paths of images, relative to their folder, and the names that match no image.

    A name is a path, or a file name that one image has, and one name of the file.
    """
    left, matched = list(written), dict[str, Written]()
    for key_of in (spelled_alike, _file_name):
        of_images, of_names = _unique(images, key_of), _unique(left, key_of)
        for key, name in of_names.items():
            if key in of_images:
                _merge(matched.setdefault(of_images[key], Written()), written[name])
        left = [name for name in left if key_of(name) not in of_images or key_of(name) not in of_names]
    return matched, left


def _unique(names: Sequence[str], key_of: Callable[[str], str]) -> dict[str, str]:
    """Return names by their keys, without those that share one."""
    counts = Counter(map(key_of, names))
    return {key: name for name in names if (key := key_of(name)) and counts[key] == 1}


def _merge(known: Written, more: Written) -> None:
    known.captions += more.captions
    known.questions += more.questions
    known.num_by_model += more.num_by_model
    known.split = most_held_out(more.split, known.split)


def spelled_alike(name: str) -> str:
    """Return a path as Linux and Unicode's composed form (NFC) spell it: Windows and macOS spell it otherwise."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _file_name(name: str) -> str:
    return spelled_alike(name).rpartition("/")[2]


# --- folders


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
