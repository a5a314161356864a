"""Splits of a source: the words for them in paths, folders and columns, and which split is stored."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.dataset.version import REJECTIONS_FILE
from pipeline.tables import SPLIT_RANK

_SPLIT_WORDS = {
    "train": "train training restval",  # restval: Karpathy's name for the rest of COCO's validation images
    "validation": "validation valid val dev",
    "test": "test testing testdev eval heldout holdout",
}
SPLIT_OF_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
_WORD = re.compile(r"[a-z]+")
# RefCOCO names its test splits testA and testB.
_VARIANT = re.compile(r"^(train|val|dev|test)[a-z]$")


def read_split(value: Any) -> str | None:
    """Return the split that a word such as `val` means, or None for an empty value.

    Raises ValueError if the word is unknown.
    """
    word = str(value).strip().casefold() if value else ""
    if word and word not in SPLIT_OF_WORD:
        raise ValueError(f"{value!r} is not a split: use train, validation or test")
    return SPLIT_OF_WORD.get(word)


def split_of_path(path: str) -> str | None:
    """Return the split that a path names last, such as validation for default/val/0000.parquet, or None."""
    for word in reversed(_WORD.findall(path.lower())):
        if split := SPLIT_OF_WORD.get(word) or SPLIT_OF_WORD.get(_VARIANT.sub(r"\1", word)):
            return split
    return None


def group_by_split(paths: Iterable[str]) -> dict[str | None, list[str]]:
    """Group paths by the split that each path names. A synth version's file of rejections is left out."""
    files: dict[str | None, list[str]] = {}
    for path in paths:
        if not path.endswith(REJECTIONS_FILE):
            files.setdefault(split_of_path(path), []).append(path)
    return files


def splits_of_names(names: Mapping[str, str]) -> dict[str, str]:
    """Return the split that each name states, such as a folder name.

    Return {} if all names state the same split, or if `train` is the only stated split. Without a validation
    split, training images are left out, because some of them will be held out.
    """
    splits = {key: SPLIT_OF_WORD.get(name.casefold()) for key, name in names.items()}
    stated = {*splits.values()}
    if len(stated) < 2 or stated == {"train", None}:
        return {}
    dropped = {None} if "validation" in stated else {None, "train"}
    return {key: split for key, split in splits.items() if split and split not in dropped}


def most_held_out(split: str | None, other: str | None) -> str | None:
    """Return the split that comes first in this order: test, validation, train, None."""
    return max(split, other, key=SPLIT_RANK.__getitem__)


def stored_split(row_split: str | None, requested_split: str | None) -> str | None:
    """Return the split to store. It is None if only `train` is read, so that some images are held out."""
    return None if requested_split == "train" else row_split


def describe_held_out(files: Mapping[str | None, Sequence[str]]) -> list[str]:
    """Return a message if all files belong to one held-out split."""
    (split, names), *others = files.items()
    if others or split in (None, "train"):
        return []
    message = f"all rows are in the split {split} because of the file name {names[0]}"
    return [f"{message}: to train on these rows, rename the file"]
