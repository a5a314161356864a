"""Find the images that a file of captions means by its names."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.sources.base import first_names
from pipeline.sources.row_texts import most_held_out
from pipeline.types import ReferenceQA

_SUFFIX = re.compile(r"\.(?:[a-z]{1,5}|jp2|j2k|cr2|cr3|rw2|sr2|3fr|mp4|mp3)", re.IGNORECASE)  # of any file about a picture
_NUMBER, _DIGITS, MAX_DIGITS = re.compile(r"([0-9]+)$"), re.compile("[0-9]+"), 18


@dataclass(slots=True)
class Written:
    """What people wrote about one image."""

    captions: list[str] = field(default_factory=list)
    questions: list[ReferenceQA] = field(default_factory=list)
    split: str | None = None
    num_by_model: int = 0  # captions and questions that are left out, since a model wrote them


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
