"""Read human texts about an image from a row: captions, questions, its split; and tell them from a model's texts.

The rows come from CSV as programs and spreadsheets write it, and from JSON lines.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.sources.parquet import SPLIT_OF_WORD
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
    SPLIT_RANK,
    WRITTEN_BY,
)
from pipeline.types import ReferenceQA

TEXT_KEYS = ("raw", "caption", "text", "answer")  # of an object, in which a text may be
_PROMPT_ID = re.compile(r"[a-z][a-z0-9_]*/[\w.-]+@[0-9a-f]{12,64}")  # of what a model wrote
_PYTHON_TEXT = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_PYTHON_LIST = re.compile(rf"\[\s*(?:{_PYTHON_TEXT.pattern})(?:\s*,\s*(?:{_PYTHON_TEXT.pattern}))*\s*,?\s*\]")
_ESCAPE, _ESCAPED = re.compile(r"\\(.)"), {"n": "\n", "t": "\t"}


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
