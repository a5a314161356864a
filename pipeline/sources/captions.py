"""Read captions and questions that people wrote about the images of a folder, from one file in a form that is common.

| form | what a file holds |
|---|---|
| COCO | JSON with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`) |
| Karpathy | JSON with `images`: `filename`, `split`, and `sentences` with `raw` |
| a JSON object | names of images with their captions |
| rows | a JSON list, JSON lines, or CSV with a header: a name, and captions, or a question with answers |
| Flickr30k | lines `NAME#0<tab>CAPTION` |

Each may be compressed by gzip.
"""

import ast
import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.text_columns import (
    ANSWER_TYPE,
    ANSWERS,
    CAPTION_COLUMNS,
    CAPTIONS,
    QA,
    QUESTION,
    REFERENCE_QA,
    REFERENCES,
    SPLIT,
)
from pipeline.errors import SourceError
from pipeline.images.decode import IMAGE_SUFFIXES
from pipeline.sources.base import MAX_METADATA_BYTES, first_names
from pipeline.sources.parquet import SPLIT_OF_WORD, plain_batches
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import BY_MODEL, SPLIT_RANK, WRITTEN_BY
from pipeline.text.escape import printable
from pipeline.types import ReferenceQA

_SUFFIX = re.compile(r"\.(?:[a-z]{1,5}|jp2|j2k|cr2|cr3|rw2|sr2|3fr|mp4|mp3)", re.IGNORECASE)  # of any file about a picture
FILE_NAMES = ("file_name", "filename", "image_name", "image", "image_path", "filepath", "file", "path")
NAMES = (*FILE_NAMES, "image_id", "name")
TEXT_KEYS = ("raw", "caption", "text", "answer")  # of an object, in which a text may be
HINT = (
    "it may be COCO's or Karpathy's JSON, Parquet, CSV or JSON lines with file_name and caption, or Flickr30k's lines, in UTF-8"
)
_PROMPT_ID = re.compile(r"[a-z][a-z0-9_]*/[\w.-]+@[0-9a-f]{12,64}")  # of what a model wrote
_PARQUET = b"PAR1"  # with which such a file begins
MAX_SHOWN_CHARACTERS = 200
_TOKEN = re.compile(r"(.+)#\d+\t(.*)")
_WITHOUT_COMMA = re.compile(r"['\"]\s+['\"]")
_NUMBER, _DIGITS, MAX_DIGITS = re.compile(r"([0-9]+)$"), re.compile("[0-9]+"), 18


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
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MAX_METADATA_BYTES + 1)
            if len(data) > MAX_METADATA_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_METADATA_BYTES:,} bytes")
        rows = list(_rows_of_parquet(data) if data.startswith(_PARQUET) else _rows(decode_text(data).lstrip()))
    except UnsafeFileError as error:
        raise SourceError(f"cannot read the captions: {error}", hint=error.hint) from None
    except (
        OSError,
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        csv.Error,
        pa.ArrowException,
    ) as error:
        problem = f"{error!r}" if isinstance(error, LookupError | AttributeError | TypeError) else str(error)
        if isinstance(error, OSError) and error.strerror:
            raise SourceError(
                f"cannot read {path}: {error.strerror}", hint="name a file of captions: --captions FILE"
            ) from None
        if isinstance(error, KeyError):
            problem = f"an object in it has no {error}"
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
        raise SourceError(f"{path} has no caption and no question{_describe_form(data)}", hint=HINT)
    return dict(written)


def decode_text(data: bytes) -> str:
    """Return a text in UTF-8, or in UTF-16 with a mark. Raise ValueError if it is in neither."""
    utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf_16 else "utf-8-sig")  # spreadsheets put a mark first


Row = tuple[str, list[str], ReferenceQA | None, str | None, int]  # name, captions, a question, the split, texts of a model


def _rows(text: str) -> Iterator[Row]:
    start = text.lstrip()[:1]
    if start == "[":
        return map(_object_row, json.loads(text))
    if start == "{":
        try:
            value = json.loads(text)
        except ValueError:
            return _rows_of_lines(text)
        return _rows_of_object(value)
    lines = text.split("\n")  # other line ends may be in a text
    if _TOKEN.fullmatch(lines[0].rstrip("\r")):
        return (_token_row(line.rstrip("\r")) for line in lines if line.strip())
    return (_row({name.lower(): value for name, value in row.items()}) for row in read_table(text))


def _rows_of_parquet(data: bytes) -> Iterator[Row]:
    """Yield the rows of a table. Raise ValueError if it unpacks to very much."""
    num_bytes = 0
    for batch in plain_batches(pq.ParquetFile(pa.BufferReader(data))):
        num_bytes += batch.nbytes
        if num_bytes > MAX_METADATA_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_METADATA_BYTES:,} bytes")
        yield from (_row({name.lower(): value for name, value in row.items()}) for row in batch.to_pylist())


def _describe_form(data: bytes) -> str:
    """Return what a file has in place of captions: the names in its first object, or its first line."""
    if data.startswith(_PARQUET):
        names = pq.read_schema(pa.BufferReader(data)).names
    else:
        text = decode_text(data).lstrip()
        line = text.partition("\n")[0]
        try:
            value = json.loads(text if text[:1] == "[" else line if line.rstrip()[-1:] == "}" else text)
            value = value[0] if isinstance(value, list) and value else value
            names = [*value] if isinstance(value, dict) else []
        except ValueError:
            names = line.strip().split(",")
    return f": it has {printable(', '.join(map(str, names)))[:MAX_SHOWN_CHARACTERS]}" if names else ""


def _rows_of_lines(text: str) -> Iterator[Row]:
    """Yield the rows of JSON lines. Raise ValueError for a line that is none."""
    yield from (_object_row(value) for value in read_lines(text) if value is not None)


def read_lines(text: str) -> Iterator[Any]:
    """Yield the values of JSON lines. Raise ValueError, with its number, for a line that is none."""
    for number, line in enumerate(text.split("\n"), start=1):  # other line ends may be in a string
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from None


def read_table(text: str, *, is_quoted: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV with commas, semicolons, tabs or bars, by names of columns.

    Behind tabs and bars a quote is the text's own, unless the table `is_quoted`, or all quotes are as a program writes them.

    Raise ValueError for a name that comes twice, a row with more values than names, and at the end if a quote took all that
    follows into a text.
    """
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    if delimiter in "\t|" and not is_quoted and not _has_quoted_values(text, delimiter):
        table.reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=True
        )
    names = [name for name in table.fieldnames or () if name.strip()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two columns are named {twice}")
    last: dict[str, Any] = {}
    for row in table:
        last = _columns(row, table.line_num)
        if any(row.values()):
            yield last
    if text.count('"') % 2 and any("\n" in str(value) for value in last.values()):
        raise ValueError(f"a quote before line {table.line_num} is not closed")


def _has_quoted_values(text: str, delimiter: str) -> bool:
    """Return whether quotes stand around values, those within are doubled, and each row so has as many values as the first."""
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    width = 0
    try:
        for row in filter(None, table):
            width = width or len(row)
            # A value with a line break and a tab may be several rows: the first begins with a quote, the last ends with one.
            if len(row) != width or any("\n" in value and delimiter in value for value in row):
                return False
    except csv.Error:
        return False
    return width > 0


def _columns(row: dict[Any, Any], line: int) -> dict[str, Any]:
    """Return a row of a table by the names of its columns. Raise ValueError if it has more values than names."""
    if any(row.pop(None, None) or ()):  # other than commas at the end of a line
        raise ValueError(f"line {line} has more columns than the first line: put texts with commas in quotes")
    return {str(name).strip(): value for name, value in row.items()}


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
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and any(map(_names_a_file, rows))}
    if lists and not any(_is_image_name(key) for key in value):  # {"data": [...]}, or a list for each split
        splits = {key: SPLIT_OF_WORD.get(key.casefold()) for key in lists}
        return (_object_row({SPLIT: splits[key], **row}) for key, rows in lists.items() for row in filter(_names_a_file, rows))
    return ((str(name), _texts(captions), None, None, 0) for name, captions in value.items())


def _names_a_file(row: Any) -> bool:
    return isinstance(row, dict) and ("image_id" in row or any(_is_image_name(row.get(name)) for name in FILE_NAMES))


def _is_image_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).suffix.lower() in IMAGE_SUFFIXES


def _token_row(line: str) -> Row:
    match = _TOKEN.fullmatch(line)
    if not match:
        raise ValueError(f"a line is not of the form NAME#0<tab>CAPTION: {line[:80]!r}")
    return match[1], _texts(match[2]), None, None, 0


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


def read_texts(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the captions of a row: the texts in the first of these columns that has a value, if people wrote them.

    Of a row that is a model's, they are those in lists of objects, each of which says by itself who wrote it.
    """
    value = next((row[name] for name in names if row.get(name)), None)
    if _is_by_model(row):
        value = [one for one in value if isinstance(one, dict) and WRITTEN_BY in one] if isinstance(value, list) else None
    return _texts(value)


def captions_of_people(row: Mapping[str, Any], names: Sequence[str] = CAPTION_COLUMNS) -> list[str]:
    """Return the captions of a row; of an export of ours also those in its column `references`, each once."""
    references = _texts(row.get(REFERENCES)) if WRITTEN_BY in row else []
    if not references:
        return read_texts(row, names)
    texts: dict[str, str] = {}
    for text in (*read_texts(row, names), *references):
        texts.setdefault(" ".join(text.split()), text)  # a caption in a version is tidy, and a reference as it was given
    return [*texts.values()]


def questions_of_people(row: Mapping[str, Any]) -> tuple[ReferenceQA, ...]:
    """Return the questions of a row: its own, and those of a list `qa`; of an export of ours, each once with all answers."""
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
    answers = next((_texts(row[key], _answer) for key in ANSWERS if row.get(key) not in (None, "", [])), [])
    if not isinstance(question, str) or not question.strip() or not answers:
        return None
    kind = row.get(ANSWER_TYPE)
    return ReferenceQA(question=_encodable(question.strip()), answers=tuple(answers), answer_type=str(kind) if kind else None)


def _texts(value: Any, text_of: Callable[[Any], str] = lambda item: item if isinstance(item, str) else "") -> list[str]:
    """Return the texts in a value: itself, those of lists, or those of objects with a `raw`, `caption`, `text` or `answer`."""
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, text_of)]
    if isinstance(value, dict):
        if _is_by_model(value):
            return []
        return _texts(next((value[key] for key in TEXT_KEYS if key in value), None), text_of)
    if isinstance(value, str) and (listed := list_in_cell(value)) is not None:
        return _texts(listed, text_of)
    text = _encodable(text_of(value)).strip()
    return [text] if text else []


def list_in_cell(text: str) -> list[Any] | None:
    """Return the list that stands in a cell of a table as JSON, or as Python writes it; None for any other text."""
    if not (text[:1] == "[" and text[-1:] == "]"):
        return None
    for parse in (json.loads, ast.literal_eval):
        if parse is ast.literal_eval and _WITHOUT_COMMA.search(text):  # as numpy writes a list: Python would join its texts
            return None
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(text)
            return value if isinstance(value, list) else None
    return None


def _answer(value: Any) -> str:
    """Return an answer as people say it: yes for true, 2 for 2.0, nothing for null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    is_missing = value is None or value != value  # NaN
    return "" if is_missing else str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _encodable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def match_images(written: Mapping[str, Written], images: Sequence[str]) -> tuple[dict[str, Written], list[str]]:
    """Return what was written by the paths of images, relative to their folder; and the names that are those of no image.

    A name is a path, a name without its folder or suffix, or the number at its end (COCO's `image_id`). It counts only if one
    image has it, and one name of the file.
    """
    left, matched = list(written), dict[str, Written]()
    for key_of_image, key_of_name in _KEYS:
        of_images, of_names = _only_ones(images, key_of_image), _only_ones(left, key_of_name)
        for key, name in of_names.items():
            if key in of_images:
                _merge(matched.setdefault(of_images[key], Written()), written[name])
        left = [name for name in left if key_of_name(name) not in of_images or key_of_name(name) not in of_names]
    return matched, left


def _only_ones(names: Sequence[str], key_of: Callable[[str], str]) -> dict[str, str]:
    """Return names by their keys, without those that share one."""
    keys = [(key_of(name), name) for name in names]
    counts = Counter(key for key, _ in keys)
    return {key: name for key, name in keys if key and counts[key] == 1}


def _merge(known: Written, more: Written) -> None:
    known.captions += more.captions
    known.questions += more.questions
    known.num_by_model += more.num_by_model
    known.split = most_held_out(more.split, known.split)


def most_held_out(one: str | None, other: str | None) -> str | None:
    """Return the split, of two that an image is said to be in, that is held out more."""
    return max(one, other, key=SPLIT_RANK.__getitem__)


def _path(name: str) -> str:
    return name.removeprefix("./")


def spelled_alike(name: str) -> str:
    """Return a path as Linux and Unicode's composed form (NFC) spell it: Windows and a Mac spell it otherwise."""
    return _path(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _file_name(name: str) -> str:
    return spelled_alike(name).rpartition("/")[2]


def _stem(name: str) -> str:
    return Path(_file_name(name)).stem


def _stem_of_name(name: str) -> str:
    """Return a name for an image without the suffix of a file, if it has one: that of `2021.03.04_12` is none."""
    path = Path(_file_name(name))
    return path.stem if _SUFFIX.fullmatch(path.suffix) else path.name


def _last_number(name: str) -> str:
    """Return the number at the end of an image's name; "" without one."""
    match = _NUMBER.search(_stem(name)[-MAX_DIGITS:])
    return str(int(match[1])) if match else ""


def _whole_number(name: str) -> str:
    """Return a name that is a number; "" for others: `dog_2` is not `cat_2`."""
    stem = _stem(name)
    return str(int(stem)) if len(stem) <= MAX_DIGITS and _DIGITS.fullmatch(stem) else ""


# How an image, and a name for it, are compared, from the surest way to the last.
_KEYS: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (_path, _path),
    (spelled_alike, spelled_alike),
    (_file_name, _file_name),
    (_stem, _stem_of_name),
    (_last_number, _whole_number),
)


def describe_unknown(path: Path, unknown: Iterable[str]) -> Iterator[str]:
    """Yield what a user should know of names that are those of no image."""
    names = list(unknown)
    if names:
        yield f"{path} names {len(names):,} images that are not here: {first_names(names)}"
