"""Compute a report's funnel, and read the images of rejected rows."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.errors import StoreError
from pipeline.storage.files import open_table


def funnel_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the funnel of a manifest. `adds_up` is true if no row was lost in the step or just before it."""
    kept_before: dict[str, int] = {}
    steps = []
    for step in manifest.get("funnel", []):
        is_complete = step["input"] == step["kept"] + sum(step["rejected"].values())
        follows = step["unit"] != "annotations" or step["input"] == kept_before.get(
            "annotations", step["input"]
        )
        steps.append(step | {"adds_up": is_complete and follows})
        kept_before[step["unit"]] = step["kept"]
    return steps


def steps_match(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the step files in a dataset folder have the row counts in the manifest of a version."""
    dataset = DatasetDir(folder)
    steps = [step for step in manifest.get("funnel", []) if step["unit"] == "annotations"]
    return bool(steps) and all(
        sum(open_table(path).metadata.num_rows for path in dataset.step_files(step["step"])) == step["kept"]
        for step in steps
    )


def images_of(folder: Path, ids: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (sample id, first image) for samples, including rejected ones. Skip missing images."""
    store = ImageStore(folder)
    for sample_id in store.in_order(ids) if ids else ():
        with suppress(StoreError):
            yield sample_id, store.read([sample_id])[0].as_py()[0]
