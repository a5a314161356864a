"""Default folders and names of datasets."""

import re
from pathlib import Path

DATA = Path("data")


def dataset_folder(source: str) -> Path:
    """Return the default dataset folder of a source: its name in letters, digits, dots and dashes, under `data/`."""
    return DATA / (slugify(source) or "dataset")


def slugify(text: str) -> str:
    """Return a text as a folder name of letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
