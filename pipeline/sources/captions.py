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

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.sources.base import MAX_METADATA_BYTES, first_names
from pipeline.sources.parquet import SPLITS
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.types import ReferenceQA

NAMES = ("file_name", "filename", "image_name", "image", "image_path", "filepath", "file", "path", "image_id", "name")
CAPTIONS = ("text", "caption", "captions", "description", "comment", "sentences", "references")
QUESTION, ANSWERS, ANSWER_TYPE, SPLIT = "question", ("answers", "answer"), "answer_type", "split"
HINT = "it may be COCO's or Karpathy's JSON, CSV or JSON lines with file_name and caption, or Flickr30k's NAME#0<tab>CAPTION"
_TOKEN = re.compile(r"(.+)#\d+\t(.*)")
_NUMBER = re.compile(r"(\d+)$")


@dataclass(slots=True)
class Written:
    """What people wrote about one image."""

    captions: list[str] = field(default_factory=list)
    questions: list[ReferenceQA] = field(default_factory=list)
    split: str | None = None


def read_captions(path: Path) -> dict[str, Written]:
    """Return what a file says of each image, by the names that it gives them. Raise SourceError if it cannot be read."""
    try:
        data = read_regular(path, max_bytes=MAX_METADATA_BYTES)
        if path.suffix == ".gz":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MAX_METADATA_BYTES + 1)
            if len(data) > MAX_METADATA_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_METADATA_BYTES:,} bytes")
        rows = list(_rows(data.decode("utf-8-sig")))  # spreadsheets put a mark first
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
    ) as error:
        problem = f"{error!r}" if isinstance(error, LookupError | AttributeError | TypeError) else str(error)
        raise SourceError(f"cannot read {path}: {problem}", hint=HINT) from None
    written: defaultdict[str, Written] = defaultdict(Written)
    for name, captions, question, split in rows:
        about = written[name]
        about.captions += captions
        about.questions += [question] if question else []
        about.split = split or about.split
    if not any(about.captions or about.questions for about in written.values()):
        raise SourceError(f"{path} has no caption and no question", hint=HINT)
    return dict(written)


Row = tuple[str, list[str], ReferenceQA | None, str | None]  # name, captions, a question, the split


def _rows(text: str) -> Iterator[Row]:
    start = text.lstrip()[:1]
    if start == "[":
        return map(_row, json.loads(text))
    if start == "{":
        try:
            value = json.loads(text)
        except ValueError:  # one object a line; other line ends may be in a string
            return (_row(json.loads(line)) for line in text.split("\n") if line.strip())
        return _rows_of_object(value)
    lines = text.splitlines()
    if lines and _TOKEN.fullmatch(lines[0]):
        return map(_token_row, (line for line in lines if line.strip()))
    header = lines[0] if lines else ""
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=header.count), skipinitialspace=True)
    return (_row({str(name).strip().lower(): value for name, value in row.items()}) for row in table)


def _rows_of_object(value: dict[str, Any]) -> Iterator[Row]:
    images = value.get("images")
    if isinstance(images, list) and "annotations" in value:
        names = {image["id"]: image["file_name"] for image in images}
        return (_row({**one, "file_name": names[one["image_id"]]}) for one in value["annotations"])
    if isinstance(images, list):
        return (_row({**one, "captions": [sentence["raw"] for sentence in one["sentences"]]}) for one in images)
    if any(name in value for name in NAMES):
        return iter([_row(value)])  # JSON lines with a single one
    return ((str(name), _texts(captions), None, None) for name, captions in value.items())


def _token_row(line: str) -> Row:
    match = _TOKEN.fullmatch(line)
    if not match:
        raise ValueError(f"a line is not of the form NAME#0<tab>CAPTION: {line[:80]!r}")
    return match[1], _texts(match[2]), None, None


def _row(row: Mapping[str, Any]) -> Row:
    name = next((row[key] for key in NAMES if row.get(key) not in (None, "")), None)
    if name is None:
        raise ValueError(f"a row names no image; it has {', '.join(map(str, row))[:200]}")
    captions = next((_texts(row[key]) for key in CAPTIONS if row.get(key)), [])
    split = row.get(SPLIT)
    return str(name).strip(), captions, read_question(row), SPLITS.get(str(split).strip()) if split else None


def read_question(row: Mapping[str, Any]) -> ReferenceQA | None:
    """Return the question of a row with a column `question` and one of `answers` or `answer`; None if it has none."""
    question = row.get(QUESTION)
    answers = next((_texts(row[key]) for key in ANSWERS if row.get(key) not in (None, "", [])), [])
    if not isinstance(question, str) or not question.strip() or not answers:
        return None
    kind = row.get(ANSWER_TYPE)
    return ReferenceQA(question=_encodable(question.strip()), answers=tuple(answers), answer_type=str(kind) if kind else None)


def _texts(value: Any) -> list[str]:
    """Return the texts of a value: itself, those of a list, or those of objects with a `raw`, `caption`, `text` or `answer`."""
    texts = []
    for item in value if isinstance(value, list) else [value]:
        inner = (
            next((item[key] for key in ("raw", "caption", "text", "answer") if key in item), "")
            if isinstance(item, dict)
            else item
        )
        text = _encodable(str(inner)).strip() if inner is not None else ""
        texts += [text] if text else []
    return texts


def _encodable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def match_images(written: Mapping[str, Written], images: Sequence[str]) -> tuple[dict[str, Written], list[str]]:
    """Return what was written by the paths of images, relative to their folder; and the names that are those of no image.

    A name is a path, a name without its folder or suffix, or the number at its end (COCO's `image_id`), if one image has it.
    """
    index: dict[str, dict[str, str]] = {}
    for level in _LEVELS:
        keys = [(level(name), name) for name in images]
        counts = Counter(key for key, _ in keys)
        index[level.__name__] = {key: name for key, name in keys if key and counts[key] == 1}
    matched, unknown = dict[str, Written](), list[str]()
    for name, about in written.items():
        image = next((found for level in _LEVELS if (found := index[level.__name__].get(level(name)))), None)
        if image is None:
            unknown.append(name)
            continue
        known = matched.setdefault(image, Written())
        known.captions += about.captions
        known.questions += about.questions
        known.split = about.split or known.split
    return matched, unknown


def _as_it_is(name: str) -> str:
    return name.removeprefix("./")


def _without_folder(name: str) -> str:
    return name.rpartition("/")[2]


def _without_suffix(name: str) -> str:
    return Path(_without_folder(name)).stem


def _number(name: str) -> str:
    match = _NUMBER.search(_without_suffix(name))
    return str(int(match[1])) if match else ""


_LEVELS = (_as_it_is, _without_folder, _without_suffix, _number)


def describe_unknown(path: Path, unknown: Iterable[str]) -> Iterator[str]:
    """Yield what a user should know of names that are those of no image."""
    names = list(unknown)
    if names:
        yield f"{path} names {len(names):,} images that are not here: {first_names(names)}"
