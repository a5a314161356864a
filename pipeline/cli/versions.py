"""Commands for the versions of a dataset: versions list, gc."""

import json
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from pipeline.cli.options import ONLY_MADE, AsJson, Dataset, dataset_argument, dataset_path
from pipeline.cli.output import echo, say
from pipeline.errors import StoreError
from pipeline.progress import size
from pipeline.storage.object_store import is_remote

if TYPE_CHECKING:
    from pipeline.dataset.directory import DatasetDir


def _open_dataset(name: str | None, *, for_removal: bool = False) -> "DatasetDir":
    """Return a dataset. Raises StoreError if it does not exist, and BadParameter if `name` has a version."""
    from pipeline.dataset.directory import DatasetDir, no_dataset, split_version
    from pipeline.dataset.version import MANIFEST, dataset_dir_of

    path = dataset_path(name, is_only=for_removal)
    if for_removal and is_remote(path):
        hint = "remove its objects with the tools of the object store"
        raise StoreError(f"{path} is in an object store", hint=hint)
    folder, version = split_version(path)
    if not is_remote(folder) and not (folder / "versions").is_dir():
        if (folder / MANIFEST).exists():
            hint = f"pass the dataset folder of this version: {dataset_dir_of(folder)}"
            raise StoreError(f"no dataset at {folder}", hint=hint)
        raise no_dataset(folder)
    if version is not None:
        raise BadParameter(f"pass the dataset without a version: {folder}", param_hint="DATASET")
    return DatasetDir(folder)


def versions_list(data: Dataset = None, as_json: AsJson = False) -> None:
    """List the versions of a dataset with rows, size, parent, digest and pushes, oldest first."""
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_dataset(data)
    with translate_disk_errors(dataset.path):
        # If there is no version, `version` raises an error that gives the reason.
        versions = dataset.versions() or [dataset.version()]
        rows, pushes = [version.summary() for version in versions], dataset.pushed()
    for row, version in zip(rows, versions, strict=True):
        own_pushes = (push for push in pushes if push["version"] == version.name)
        row["pushed"] = [f"{push['repo']}@{push['commit']}" for push in own_pushes]
        row["preview"] = version.is_preview
    if as_json:
        echo(json.dumps(rows))
        return
    for row in rows:
        counts = ", ".join(f"{count} {split}" for split, count in row["rows"].items())
        counts += f"  (from {row['parent']})" if row["parent"] else ""
        counts += "  (preview)" if row["preview"] else ""
        shown = f"{row['version']:<9} {row['date']}  {row['digest'][:12]}  {size(row['bytes']):>10}"
        echo(f"{shown}  {counts}")
        for repo in row["pushed"]:
            echo(f"          pushed to {repo}")


def versions_gc(
    data: Annotated[str | None, dataset_argument(default=ONLY_MADE)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files, but remove nothing.")] = False,
) -> None:
    """Remove unused images, files of killed commands, and stored hidden states (`train` recomputes them)."""
    from pipeline.dataset.removal import remove_images, remove_leftovers
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_dataset(data, for_removal=True)
    with translate_disk_errors(dataset.path), dataset.lock():
        leftovers = remove_leftovers(dataset, dry_run=dry_run)
        leftovers += remove_images(dataset, dry_run=dry_run)
    for path, num_bytes in leftovers:
        say(f"{'would remove' if dry_run else 'removed'} {path}, {size(num_bytes)}")
    freed = size(sum(num_bytes for _, num_bytes in leftovers))
    echo(f"{'would free' if dry_run else 'freed'} {freed} in {dataset.path}")
