"""Commands for the versions of a dataset: versions list, rm, gc."""

import json
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter, Option

from pipeline.cli.options import ONLY_MADE, AsJson, Dataset, dataset_argument, dataset_path
from pipeline.cli.output import echo, say
from pipeline.progress import size
from pipeline.storage.object_store import is_remote

if TYPE_CHECKING:
    from pipeline.dataset.directory import DatasetDir


def _open_dataset(name: str | None, *, for_removal: bool = False) -> tuple["DatasetDir", str | None]:
    """Return a dataset, and the version if `name` contains one. Raises StoreError if there is no dataset."""
    from pipeline.dataset.directory import DatasetDir, split_version
    from pipeline.dataset.version import MANIFEST, dataset_dir_of
    from pipeline.errors import StoreError

    path = dataset_path(name, is_only=for_removal)
    if for_removal and is_remote(path):
        raise StoreError(
            f"{path} is in an object store", hint="remove its objects with the tools of the object store"
        )
    folder, version = split_version(path)
    if not is_remote(folder) and not (folder / "versions").is_dir():
        hint = "`synth generate` makes one; if it was interrupted, run it again"
        if (folder / MANIFEST).exists():
            hint = f"name the dataset folder of this version: {dataset_dir_of(folder)}"
        raise StoreError(f"no dataset at {folder}", hint=hint)
    return DatasetDir(folder), version


def _open_whole(name: str | None, *, for_removal: bool = False) -> "DatasetDir":
    dataset, version = _open_dataset(name, for_removal=for_removal)
    if version is not None:
        raise BadParameter(f"name the dataset without a version: {dataset.path}", param_hint="DATASET")
    return dataset


def versions_list(data: Dataset = None, as_json: AsJson = False) -> None:
    """List the versions of a dataset with rows, size, parent, digest and pushes, oldest first."""
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_whole(data)
    with translate_disk_errors(dataset.path):
        # If there is no version, `version` raises an error that gives the reason.
        versions = dataset.versions() or [dataset.version()]
        rows, pushes = [version.summary() for version in versions], dataset.pushed()
    for row, version in zip(rows, versions, strict=True):
        row["pushed"] = [
            f"{push['repo']}@{push['commit']}" for push in pushes if push["version"] == version.name
        ]
        row["preview"] = version.is_preview
    if as_json:
        echo(json.dumps(rows))
        return
    for row in rows:
        counts = ", ".join(f"{count} {split}" for split, count in row["rows"].items())
        counts += f"  (from {row['parent'] or 'nothing'}{', a preview' if row['preview'] else ''})"
        shown = f"{row['version']:<9} {row['date']}  {row['digest'][:12]}  {size(row['bytes']):>10}"
        echo(f"{shown}  {counts}")
        for repo in row["pushed"]:
            echo(f"          pushed to {repo}")


def versions_rm(
    names: Annotated[list[str], Argument(metavar="DATASET@VERSION...", help="Versions of one dataset.")],
) -> None:
    """Remove versions from this machine. Replies stay in the journal, and pushed versions stay on the Hub.

    The dataset may be named once: synth versions rm DIR@v1.0.0 v1.0.1
    """
    from pipeline.dataset.removal import remove_versions
    from pipeline.storage.files import translate_disk_errors

    dataset, version = _open_dataset(names[0], for_removal=True)
    if version is None:
        raise BadParameter(f"{names[0]} names no version: {dataset.path}@v1.0.0", param_hint="VERSION")
    prefix = names[0].rpartition("@")[0]
    others = [name.removeprefix(f"{prefix}@") for name in names[1:]]
    with translate_disk_errors(dataset.path), dataset.lock():
        pushes = dataset.pushed()
        removed = remove_versions(dataset, [version, *others])
    for folder in removed:
        echo(f"removed {folder.path.name}, which frees {size(folder.num_bytes)}")
        for repo in dict.fromkeys(push["repo"] for push in pushes if push["version"] == folder.path.name):
            echo(f"          was pushed to {repo}")
    say(f"images stay until `synth versions gc {dataset.path}` removes the unused ones")


def versions_gc(
    data: Annotated[str | None, dataset_argument(default=ONLY_MADE)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files, but remove nothing.")] = False,
) -> None:
    """Remove unused images, files of killed commands, and stored hidden states (`train` recomputes them)."""
    from pipeline.dataset.removal import remove_images, remove_leftovers, remove_temporary_folders
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_whole(data, for_removal=True)
    with translate_disk_errors(dataset.path), dataset.lock():
        leftovers = remove_leftovers(dataset, dry_run=dry_run)
        leftovers += remove_temporary_folders(dataset, dry_run=dry_run)
        leftovers += remove_images(dataset, dry_run=dry_run)
    for leftover in leftovers:
        say(f"{'would remove' if dry_run else 'removed'} {leftover.path}, {size(leftover.num_bytes)}")
    freed = size(sum(leftover.num_bytes for leftover in leftovers))
    echo(f"{'would free' if dry_run else 'freed'} {freed} in {dataset.path}")
