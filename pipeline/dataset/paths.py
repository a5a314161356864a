"""Default folders and names of datasets."""

import re
from pathlib import Path

DATA = Path("data")


def dataset_folder(source: str) -> Path:
    """Return where the dataset of a source lies unless told: its name, as letters, digits, dots and dashes."""
    return DATA / (slugify(source) or "dataset")


def slugify(text: str) -> str:
    """Return a text as a name of a folder: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")
