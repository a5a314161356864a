"""Human texts about images: captions, questions and splits.

They come from table rows, from `NAME.txt` next to an image, from metadata files as in the imagefolder format
of `datasets`, and from caption files. A caption file may be gzipped, and has one of these formats:

| format | content |
|---|---|
| COCO | JSON with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`) |
| Karpathy | JSON with `images`: `filename`, `split`, and `sentences` with `raw` |
| a JSON object | image names with their captions |
| rows | a JSON list, JSON lines, or CSV with a header: a name, with captions or a question and answers |

An image is named by its path, or by its file name if that is unique. Model-written texts are skipped.
"""

import ast
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.sources.splits import most_held_out, read_split
from pipeline.sources.text_files import parse_json, parse_rows, read_text, translate_file_errors
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
    WRITTEN_BY,
)
from pipeline.text.escape import encodable
from pipeline.text.tokenized import join_tokens
from pipeline.types import ReferenceQA

TEXT_KEYS = ("raw", "caption", "text", "answer")
MAX_LITERAL_CHARACTERS = 100_000  # parsing a Python literal takes up to 345 times its size in memory
# A Python string without a prefix. An unclosed string extends to the end, so that the search is linear.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*+'?|"(?:[^"\\]|\\.)*+"?""", re.DOTALL)
# This finds strings without a comma between them, after '' has replaced each string.
_ADJACENT = re.compile(r"''\s*+\w*+''")
_PROMPT_ID = re.compile(r"[a-z][a-z0-9_]*/[\w.-]+@[0-9a-f]{12,64}")
FILE_NAMES = ("file_name", "filename", "image_name", "image", "image_path", "filepath", "file", "path")
NAMES = (*FILE_NAMES, "image_id", "name")
FORMATS_HINT = "use COCO or Karpathy JSON, or CSV or JSON lines with file_name and caption, in UTF-8"
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PATH_COLUMNS = ("folder", "file_name")  # context columns that every image has
# A text may be nested in at most this many lists and objects.
MAX_DEPTH = 8
MAX_TEXT_CHARACTERS = 20_000  # longer texts are cut to this length, and the filter rejects them


# --- rows


def read_texts(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the human captions in a row, from the first of these columns that has a value."""
    value = next((row[name] for name in names if row.get(name)), None)
    if _is_by_model(row):
        items = value if isinstance(value, list) else ()
        value = [item for item in items if isinstance(item, dict) and WRITTEN_BY in item]
    return extract_texts(value)


def human_captions(row: Mapping[str, Any], names: Sequence[str] = CAPTION_COLUMNS) -> list[str]:
    """Return the captions in a row. If synth exported the row, also return its other `references`."""
    references = extract_texts(row.get(REFERENCES)) if WRITTEN_BY in row else []
    if not references:
        return read_texts(row, names)
    texts = dict[str, str]()
    for text in (*read_texts(row, names), *references):
        # Ignore differences in white space: versions normalize it in captions, but not in references.
        texts.setdefault(" ".join(text.split()), text)
    return [*texts.values()]


def human_questions(row: Mapping[str, Any]) -> tuple[ReferenceQA, ...]:
    """Return the questions in a row and its list `qa`. If synth exported the row, drop repeated questions."""
    is_export = WRITTEN_BY in row
    lists = [row.get(name) for name in ((REFERENCE_QA, QA) if is_export else (QA,))]
    items = [item for values in lists if isinstance(values, list) for item in values]
    rows = [row, *(item for item in items if isinstance(item, dict))]
    questions = [question for row in rows if (question := read_question(row))]
    if not is_export:
        return tuple(questions)
    first = dict[str, ReferenceQA]()
    for question in questions:
        first.setdefault(question.question, question)
    return tuple(first.values())


def model_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the distinct model-written texts in a row and in the objects in its lists."""
    items = (item for name in (*CAPTIONS, QA) if isinstance(row.get(name), list) for item in row[name])
    by_model = [item for item in (row, *items) if isinstance(item, Mapping) and _is_by_model(item)]
    texts = (item.get(name) for item in by_model for name in (*CAPTIONS, QUESTION))
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def _is_by_model(row: Mapping[str, Any]) -> bool:
    # In rows that synth wrote, the prompt id ends with a digest.
    prompt_id = row.get("prompt_id")
    is_version_row = isinstance(prompt_id, str) and _PROMPT_ID.fullmatch(prompt_id) is not None
    return row.get(WRITTEN_BY) == BY_MODEL or is_version_row


def read_question(row: Mapping[str, Any]) -> ReferenceQA | None:
    """Return the human question in a row with `question` and `answers` or `answer`, or None."""
    if _is_by_model(row):
        return None
    question = row.get(QUESTION)
    value = next((row[key] for key in ANSWERS if row.get(key) not in (None, "", [])), None)
    answers = extract_texts(value, _answer_text)
    if not isinstance(question, str) or not question.strip() or not answers:
        return None
    answer_type = str(row[ANSWER_TYPE]) if row.get(ANSWER_TYPE) else None
    return ReferenceQA(question=encodable(question.strip()), answers=tuple(answers), answer_type=answer_type)


def extract_texts(
    value: Any, text_of: Callable[[Any], str] | None = None, max_depth: int = MAX_DEPTH
) -> list[str]:
    """Return the human texts in a value, which is a string, a list, or an object with one of TEXT_KEYS.

    `text_of` converts values of other types. Texts nested more deeply than `max_depth` are ignored.
    """
    if isinstance(value, str) and (items := parse_list(value)) is not None:
        value = items
    if isinstance(value, dict):
        text_values = () if _is_by_model(value) else (value[key] for key in TEXT_KEYS if key in value)
        value = [*islice(text_values, 1)]
    if isinstance(value, list):
        inner = value if max_depth else ()
        return [text for item in inner for text in extract_texts(item, text_of, max_depth - 1)]
    if not isinstance(value, str):
        value = text_of(value) if text_of else ""
    text = encodable(value).strip()[:MAX_TEXT_CHARACTERS]
    return [text] if text else []


def parse_list(text: str) -> list[Any] | None:
    """Parse a list of strings or objects in JSON, or as Python prints it. Return None for other cells."""
    if not (text[:1] == "[" and text[-1:] == "]"):
        return None
    is_short = len(text) < MAX_LITERAL_CHARACTERS
    # NumPy prints no commas between strings, and Python would join them.
    is_literal = is_short and not _ADJACENT.search(_QUOTED.sub("''", text))
    for parse in (json.loads, ast.literal_eval) if is_literal else (json.loads,):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = parse(text)
            return list(value) if value and all(isinstance(item, str | dict) for item in value) else None
    return None


def _answer_text(value: Any) -> str:
    """Return an answer as a human would write it: yes for true, 2 for 2.0, and "" for null or NaN."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# --- files of captions


@dataclass(slots=True)
class ImageTexts:
    """Human texts about one image, and the number of model-written texts that were skipped."""

    captions: list[str] = field(default_factory=list)
    questions: list[ReferenceQA] = field(default_factory=list)
    split: str | None = None
    num_by_model: int = 0

    @classmethod
    def of_row(cls, row: Mapping[str, Any], names: Sequence[str] = CAPTION_COLUMNS) -> "ImageTexts":
        """Return the human texts in a row. Raises ValueError if its split is unknown."""
        captions, questions = human_captions(row, names), [*human_questions(row)]
        return cls(captions, questions, read_split(row.get(SPLIT)), len(model_texts(row)))

    def merge(self, other: "ImageTexts") -> None:
        """Add the texts of `other`, and keep the more held-out split."""
        self.captions += other.captions
        self.questions += other.questions
        self.split = most_held_out(other.split, self.split)
        self.num_by_model += other.num_by_model

    def sample_fields(self) -> dict[str, Any]:
        """Return fields for a Sample."""
        questions = tuple(self.questions)
        return {"references": tuple(self.captions), "split": self.split, "reference_qa": questions}

    def as_json(self) -> list[Any]:
        """Return the values that are part of a source's revision."""
        questions = [[one.question, one.answers, one.answer_type] for one in self.questions]
        return [self.captions, questions, self.split]


def read_captions(path: Path) -> dict[str, ImageTexts]:
    """Return the texts in a caption file by image name.

    Raises SourceError if the file cannot be read or has no texts.
    """
    texts: defaultdict[str, ImageTexts] = defaultdict(ImageTexts)
    with translate_file_errors(path, FORMATS_HINT):
        for name, row_texts in _parse_captions(read_text(path)):
            texts[name].merge(row_texts)
    if not any(one.captions or one.questions for one in texts.values()):
        if any(one.num_by_model for one in texts.values()):
            hint = f"only human texts are read: if a human wrote them, remove the values of {WRITTEN_BY!r}"
            raise SourceError(f"a model wrote all texts of {path}", hint=hint)
        raise SourceError(f"{path} has no caption and no question", hint=FORMATS_HINT)
    return dict(texts)


NamedTexts = tuple[str, ImageTexts]


def _parse_captions(text: str) -> Iterator[NamedTexts]:
    if text.lstrip().startswith("{"):
        with suppress(json.JSONDecodeError):
            return _parse_whole_object(parse_json(text))
    return (_parse_row({name.lower(): value for name, value in row.items()}) for row in parse_rows(text))


def _parse_whole_object(value: dict[str, Any]) -> Iterator[NamedTexts]:
    images = value.get("images")
    if isinstance(images, list) and "annotations" in value:
        names = {image["id"]: image["file_name"] for image in images}
        if image := next((image for image in images if names[image["id"]] != image["file_name"]), None):
            problem = f"two of its images have the id {image['id']}"
            raise ValueError(f"{problem}: {image['file_name']} and {names[image['id']]}")

        def with_name(annotation: dict[str, Any]) -> dict[str, Any]:
            image_id = annotation["image_id"]
            return {**annotation, "file_name": names.get(image_id, image_id)}

        return (_parse_row(with_name(annotation)) for annotation in value["annotations"])
    if isinstance(images, list):
        return (_parse_row({**one, "captions": [item["raw"] for item in one["sentences"]]}) for one in images)
    # This is a JSON lines file with a single row.
    if any(name in value for name in NAMES):
        return iter([_parse_row(value)])
    return ((str(name), ImageTexts(extract_texts(captions))) for name, captions in value.items())


def _parse_row(row: Mapping[str, Any]) -> NamedTexts:
    name = next((row[key] for key in NAMES if row.get(key) not in (None, "")), None)
    if name is None:
        raise ValueError(f"a row has no image file name, only {', '.join(map(str, row))[:200]}")
    return str(name).strip(), ImageTexts.of_row(row, CAPTIONS)


def match_images(
    texts: Mapping[str, ImageTexts], images: Sequence[str]
) -> tuple[dict[str, ImageTexts], list[str]]:
    """Return the texts by image path (relative to the folder), and the names that match no image.

    A name matches an image's path, or else its file name if that is unique among the images and the names.
    """
    unmatched, matched = list(texts), dict[str, ImageTexts]()
    for key_of in (normalize_path, lambda name: normalize_path(name).rpartition("/")[2]):
        image_of, name_of = _unique(images, key_of), _unique(unmatched, key_of)
        for key, name in name_of.items():
            if key in image_of:
                matched.setdefault(image_of[key], ImageTexts()).merge(texts[name])
        shared = image_of.keys() & name_of.keys()
        unmatched = [name for name in unmatched if key_of(name) not in shared]
    return matched, unmatched


def _unique(names: Sequence[str], key_of: Callable[[str], str]) -> dict[str, str]:
    """Return the names by key, without names that share a key."""
    counts = Counter(map(key_of, names))
    return {key: name for name in names if (key := key_of(name)) and counts[key] == 1}


def normalize_path(name: str) -> str:
    """Return a path with forward slashes in Unicode form NFC. Windows and macOS write other forms."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def join_texts(samples: pa.Table) -> tuple[pa.Table, int]:
    """Join the tokens of the human texts of samples. Returns the samples and the number of changed texts."""
    num_joined = 0

    def join(text: str) -> str:
        nonlocal num_joined
        joined = join_tokens(text)
        num_joined += joined != text
        return joined

    def join_pair(pair: dict[str, Any]) -> dict[str, Any]:
        return pair | {"question": join(pair["question"]), "answers": [*map(join, pair["answers"])]}

    for name, convert in ((REFERENCES, join), (REFERENCE_QA, join_pair)):
        column = samples.schema.get_field_index(name)
        texts = [None if row is None else [*map(convert, row)] for row in samples[name].to_pylist()]
        field = samples.schema.field(column)
        samples = samples.set_column(column, field, pa.array(texts, field.type))
    return samples, num_joined
