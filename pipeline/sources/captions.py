"""Read captions and questions that people wrote about the images of a folder, from one file in a form that is common.

| form | what a file holds |
|---|---|
| COCO | JSON with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`) |
| Karpathy | JSON with `images`: `filename`, `split`, and `sentences` with `raw` |
| a JSON object | names of images with their captions |
| rows | a JSON list, JSON lines, or CSV with a header: a name, and captions, or a question with answers |
| Flickr30k | lines `NAME#0<tab>CAPTION` |

Each may be compressed by gzip. An image is named by its path, or by its file name if no other image has it.
"""

import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import SourceError
from pipeline.sources.base import MAX_METADATA_BYTES
from pipeline.sources.texts import (
    captions_of_people,
    decode_text,
    most_held_out,
    read_csv,
    read_lines,
    read_question,
    read_split,
    texts_by_model,
    texts_of_value,
)
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import CAPTIONS, SPLIT, WRITTEN_BY
from pipeline.types import ReferenceQA

FILE_NAMES = ("file_name", "filename", "image_name", "image", "image_path", "filepath", "file", "path")
NAMES = (*FILE_NAMES, "image_id", "name")
HINT = "it may be COCO's or Karpathy's JSON, CSV or JSON lines with file_name and caption, or Flickr30k's lines, in UTF-8"
_TOKEN = re.compile(r"(.+)#\d+\t(.*)")


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
