"""Default folders and names of datasets."""

import re
from pathlib import Path

from pipeline.digests import digest

DATA = Path("data")
FEATURES, FEATURES_LOCK = "features", "lock"  # folder of stored hidden states in a dataset; the lock of each store
MAX_NAME_CHARACTERS = 240  # most disks take 255 bytes


def dataset_folder(source: str) -> Path:
    """Return the default dataset folder of a source: its name in letters, digits, dots and dashes, under `data/`.

    The end of a name that is too long for a folder is its digest.
    """
    name = slugify(source) or "dataset"
    return DATA / (name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:MAX_NAME_CHARACTERS]}-{digest(name)[:8]}")


def slugify(text: str) -> str:
    """Return a text as a folder name of letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
