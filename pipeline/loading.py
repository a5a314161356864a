"""`pipeline.load`: a version as a `datasets.DatasetDict` with its images."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.dataset.images import missing_error
from pipeline.dataset.pixels import find_joined, lacks_pixels
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError
from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
from pipeline.install import extra_of
from pipeline.storage.object_store import parse_dataset_path
from pipeline.tables import SPLITS

if TYPE_CHECKING:
    from datasets import DatasetDict

ROWS_AT_ONCE = 64  # with their images


def load(name: str | Path) -> "DatasetDict":
    """Return a version with its splits, columns and images.

    `name` is DIR, DIR@VERSION or DIR@TAG, here or in an object store, or ORG/NAME@VERSION of the Hub. Images are of the feature
    Image, and pages of List(Image). `datasets` writes the rows to its cache (HF_HOME) once, and maps them into memory. Raise
    StoreError if there is no such version, or if an image is missing or damaged; ConfigError without the package `datasets`.
    """
    try:
        from datasets import DatasetDict
    except ImportError:
        raise ConfigError("pipeline.load needs the package datasets", hint=extra_of("datasets")) from None
    version = _open(str(name))
    if lacks_pixels(version) and (joined := find_joined(version)):
        version = joined
    if not version.holds_pixels:
        ids = (name for _, batch in version.batches(["sample_id"]) for name in batch["sample_id"].to_pylist())
        if missing := version.store.find_missing(ids):
            raise missing_error(missing, version.store.folder)
    return DatasetDict({split: _split_of(version, split) for split in SPLITS if version.shards(split)})


def _open(name: str) -> Version:
    return pull_version(name) if is_hub_name(name) else open_or_download(parse_dataset_path(name), previews=False)


def _split_of(version: Version, split: str) -> Any:
    """Return the rows of a split, which `datasets` caches by the manifest."""
    from datasets import Dataset, Features

    described = version.manifest["features"]
    features = Features.from_dict({name: described[name] for name in version.manifest["columns"]})
    source = {"path": str(version.path), "manifest": version.manifest, "repo": version.repo}
    return Dataset.from_generator(_rows, features=features, gen_kwargs={**source, "of_split": split}, split=split)


def _rows(path: str, manifest: dict[str, Any], repo: str | None, of_split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. The arguments name the cached rows."""
    version = Version(Path(path), manifest, repo)
    columns = version.manifest["columns"]
    for _, batch in version.batches(columns, ROWS_AT_ONCE, [of_split]):
        yield from batch.select(columns).to_pylist()
