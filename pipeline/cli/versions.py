"""Commands for the versions of a dataset: versions list, rm, gc."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pipeline.cli.options import DATASET_PATH, ONLY_MADE, AsJson, DataDir
from pipeline.cli.output import echo, last_dataset, say
from pipeline.storage.object_store import is_remote

if TYPE_CHECKING:
    from pipeline.dataset.directory import DatasetDir

OnlyMade = Annotated[
    Path | None, Option("--data", **DATASET_PATH, help="Dataset folder.", show_default=ONLY_MADE)
]


def _open_dataset(path: Path, *, is_local: bool = False) -> "DatasetDir":
    """Return the dataset folder at a path. Raises StoreError if there is none, or it is not local."""
    from pipeline.dataset.directory import RUN_FILE, DatasetDir, find_dataset, split_version
    from pipeline.errors import StoreError

    if is_local and is_remote(path):
        raise StoreError(
            f"{path} is in an object store", hint="remove its objects with the tools of the object store"
        )
    folder = find_dataset(path)
    if not is_remote(folder) and not (folder / "versions").is_dir():
        if (folder / RUN_FILE).is_file():
            raise StoreError(
                f"{folder} has no version yet", hint="run the same `synth generate` again: it resumes"
            )
        raise StoreError(f"no dataset at {folder}", hint="`synth generate --source scenes` makes one")
    if split_version(path)[1]:
        raise StoreError(
            f"{path} is a version, not a dataset folder", hint=f"pass the dataset folder: {folder}"
        )
    return DatasetDir(folder)


def versions_list(data: DataDir = None, as_json: AsJson = False) -> None:
    """List the versions of a dataset with rows, size, parent, digest and pushes, oldest first."""
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_dataset(data or last_dataset())
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
        size = f"{row['bytes'] / 1e6:>8.1f} MB"
        echo(f"{row['version']:<9} {row['date']}  {row['digest'][:12]}  {size}  {counts}")
        for repo in row["pushed"]:
            echo(f"          pushed to {repo}")


def versions_rm(
    names: Annotated[list[str], Argument(metavar="VERSION...", help="Versions to remove.")],
    data: OnlyMade = None,
    as_json: AsJson = False,
) -> None:
    """Remove versions from this machine. Replies stay in the journal, and pushed versions stay on the Hub."""
    from pipeline.dataset.directory import only_dataset
    from pipeline.dataset.removal import remove_versions
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_dataset(data or only_dataset(), is_local=True)
    with translate_disk_errors(dataset.path), dataset.lock():
        pushes = dataset.pushed()
        removed = remove_versions(dataset, names)
    if as_json:
        freed_bytes = sum(version.num_bytes for version in removed)
        echo(json.dumps({"removed": [version.path.name for version in removed], "bytes": freed_bytes}))
        return
    for version in removed:
        echo(f"removed {version.path.name}, which frees {version.num_bytes / 1e6:.1f} MB")
        for repo in dict.fromkeys(push["repo"] for push in pushes if push["version"] == version.path.name):
            echo(f"          was pushed to {repo}")
    say(f"images stay until `synth versions gc --data {dataset.path}` removes the unused ones")


def versions_gc(
    data: OnlyMade = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files, but remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove unused images, files of killed commands, and stored hidden states (`train` recomputes them)."""
    from pipeline.dataset.directory import only_dataset
    from pipeline.dataset.removal import remove_images, remove_leftovers, remove_temporary_folders
    from pipeline.storage.files import translate_disk_errors

    dataset = _open_dataset(data or only_dataset(), is_local=True)
    with translate_disk_errors(dataset.path), dataset.lock():
        leftovers = remove_leftovers(dataset, dry_run=dry_run)
        leftovers += remove_temporary_folders(dataset, dry_run=dry_run)
        leftovers += remove_images(dataset, dry_run=dry_run)
    freed_bytes = sum(leftover.num_bytes for leftover in leftovers)
    if as_json:
        paths = [str(leftover.path) for leftover in leftovers]
        echo(json.dumps({"removed": paths, "bytes": freed_bytes, "dry_run": dry_run}))
        return
    for leftover in leftovers:
        say(f"{'would remove' if dry_run else 'removed'} {leftover.path}, {leftover.num_bytes / 1e6:.1f} MB")
    echo(f"{'would free' if dry_run else 'freed'} {freed_bytes / 1e6:.1f} MB in {dataset.path}")
