"""Commands about the versions of a dataset: versions list, tag, rm, gc."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter, Option

from pipeline.cli.options import DATASET_PATH, LAST_MADE, AsJson, DataDir
from pipeline.cli.output import echo, last_dataset, note_previews, say
from pipeline.storage.object_store import is_remote

if TYPE_CHECKING:
    from pipeline.dataset.directory import DatasetDir

OnlyMade = Annotated[
    Path | None, Option("--data", **DATASET_PATH, help="Dataset folder.", show_default="the only one made here")
]


def _dataset(path: Path) -> "DatasetDir":
    """Return a dataset folder, of which a version may have been named. Raise StoreError if there is none: none is made."""
    from pipeline.dataset.directory import RUN_FILE, DatasetDir, find_dataset, split_version
    from pipeline.errors import StoreError

    folder = find_dataset(path)
    if not is_remote(folder) and not (folder / "versions").is_dir():
        if (folder / RUN_FILE).is_file():
            raise StoreError(
                f"{folder} has no version yet", hint="run the same `synth generate` again: it goes on where it was"
            )
        raise StoreError(f"no dataset at {folder}", hint="`synth generate --source scenes` makes one")
    if split_version(path)[1]:
        raise StoreError(f"{path} names a version", hint=f"name the dataset folder: {folder}")
    return DatasetDir(folder)


def _local_dataset(path: Path) -> "DatasetDir":
    """Return a dataset folder on a disk. Raise StoreError for one in an object store, which has its own tools."""
    from pipeline.errors import StoreError

    if is_remote(path):
        raise StoreError(f"{path} is in an object store", hint="remove its objects with the tools of the store")
    return _dataset(path)


def versions_list(data: DataDir = None, as_json: AsJson = False) -> None:
    """List the versions of a dataset, oldest first: rows, size, parent, date, digest, tags, and where each was pushed."""
    from pipeline.dataset.directory import read_tags
    from pipeline.storage.files import translate_disk_errors

    folder = _dataset(data or last_dataset())
    with translate_disk_errors(folder.path):
        listed = folder.versions() or [folder.version()]  # raises the error that says what is missing
        rows, pushed, tags = [version.summary() for version in listed], folder.pushed(), read_tags(folder.path)
    for row, version in zip(rows, listed, strict=True):
        row["pushed"] = [f"{push['repo']}@{push['commit']}" for push in pushed if push["version"] == row["version"]]
        row["tags"] = [tag for tag, tagged in tags.items() if tagged == row["version"]]
        row["preview"] = version.is_preview
    if as_json:
        echo(json.dumps(rows))
        return
    for row in rows:
        counts = ", ".join(f"{count} {split}" for split, count in row["rows"].items())
        counts += f"  (from {row['parent'] or 'nothing'}{', a preview' if row['preview'] else ''})"
        echo(f"{row['version']:<9} {row['date']}  {row['digest'][:12]}  {row['bytes'] / 1e6:>8.1f} MB  {counts}")
        if row["tags"]:
            echo(f"          tagged {', '.join(row['tags'])}")
        for repo in row["pushed"]:
            echo(f"          pushed to {repo}")


def versions_tag(
    tag: Annotated[str, Argument(help="A name, such as paper.")],
    version: Annotated[str | None, Argument(help="Which version.", show_default="the newest that is not a preview")] = None,
    data: Annotated[Path | None, Option("--data", **DATASET_PATH, help="Dataset folder.", show_default=LAST_MADE)] = None,
    move: Annotated[bool, Option("--move", help="Let an existing tag name this version.")] = False,
    delete: Annotated[bool, Option("--delete", help="Remove the tag; the version stays.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a version a name, which `--version` accepts and which protects the version from removal."""
    from pipeline.dataset.directory import read_tags, require_tag_name, write_tags
    from pipeline.errors import StoreError
    from pipeline.storage.files import translate_disk_errors

    if delete and (version or move):
        raise BadParameter("--delete takes a tag alone", param_hint="--delete")
    require_tag_name(tag)
    dataset = _dataset(data or last_dataset())
    with translate_disk_errors(dataset.path), dataset.lock():
        tags = read_tags(dataset.path)
        if delete:
            if tag not in tags:
                raise StoreError(f"{dataset.path} has no tag {tag}", hint=f"tags here: {', '.join(tags) or 'none'}")
            write_tags(dataset.path, {name: tagged for name, tagged in tags.items() if name != tag})
            echo(json.dumps({"tag": tag, "version": None}) if as_json else f"{tag} no longer names {tags[tag]}")
            return
        chosen = dataset.version(version, previews=False)
        named = chosen.name
        if version is None:
            note_previews(chosen)
        if tags.get(tag, named) != named and not move:
            raise StoreError(f"{tag} names {tags[tag]}", hint="--move lets it name another version")
        write_tags(dataset.path, tags | {tag: named})
    echo(json.dumps({"tag": tag, "version": named}) if as_json else f"{tag} names {named}")


def versions_rm(
    names: Annotated[list[str], Argument(metavar="VERSION...", help="Versions to remove.")],
    data: OnlyMade = None,
    as_json: AsJson = False,
) -> None:
    """Remove versions from this machine. Replies stay in the journal, and what was pushed stays on the Hub."""
    from pipeline.dataset.directory import only_made
    from pipeline.dataset.removal import remove_versions
    from pipeline.storage.files import translate_disk_errors

    dataset = _local_dataset(data or only_made())
    with translate_disk_errors(dataset.path), dataset.lock():
        pushed = dataset.pushed()
        removed = remove_versions(dataset, names)
    if as_json:
        freed = sum(one.num_bytes for one in removed)
        echo(json.dumps({"removed": [one.path.name for one in removed], "bytes": freed}))
        return
    for one in removed:
        repos = dict.fromkeys(push["repo"] for push in pushed if push["version"] == one.path.name)
        echo(f"removed {one.path.name}, which frees {one.num_bytes / 1e6:.1f} MB")
        for repo in repos:
            echo(f"          was pushed to {repo}")
    say(f"images stay until `synth versions gc --data {dataset.path}` removes those that nothing needs")


def versions_gc(
    data: OnlyMade = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the files to remove, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove leftovers of killed commands, images that nothing needs, and hidden states, which a training computes again."""
    from pipeline.dataset.directory import only_made
    from pipeline.dataset.removal import find_leftovers, remove_images, remove_leftovers, remove_remade
    from pipeline.storage.files import translate_disk_errors

    dataset = _local_dataset(data or only_made())
    with translate_disk_errors(dataset.path), dataset.lock():
        leftovers = list(find_leftovers(dataset))
        if not dry_run:
            remove_leftovers(leftovers)
        leftovers += remove_remade(dataset, dry_run=dry_run)
        leftovers += remove_images(dataset, dry_run=dry_run)
    freed_bytes = sum(leftover.num_bytes for leftover in leftovers)
    if as_json:
        paths = [str(leftover.path) for leftover in leftovers]
        echo(json.dumps({"removed": paths, "bytes": freed_bytes, "dry_run": dry_run}))
        return
    for leftover in leftovers:
        say(f"{'would remove' if dry_run else 'removed'} {leftover.path}, {leftover.num_bytes / 1e6:.1f} MB")
    echo(f"{'would free' if dry_run else 'freed'} {freed_bytes / 1e6:.1f} MB in {dataset.path}")
