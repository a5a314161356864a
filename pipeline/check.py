"""`synth check`: verify everything in a dataset folder, and say what is damaged and what can be made again."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import READ_AGAIN, UNREADABLE, ImageStore, hash_images
from pipeline.dataset.integrity import find_damage
from pipeline.dataset.version import MANIFEST, VERSION_NAME, Version, read_version
from pipeline.errors import StoreError, SynthError, one_line
from pipeline.inference.journal import check_journal, repair_journal
from pipeline.storage.files import open_parquet, read_json
from pipeline.storage.object_store import is_remote

AGAIN = "run `synth generate` with the same settings: it makes the file again, from replies that are in the journal"


@dataclass(frozen=True, slots=True)
class Checked:
    """One file, journal or version: what it holds, or what is wrong with it and what to do."""

    what: str
    found: str
    is_ok: bool = True
    hint: str = ""


def check_dataset(dataset: DatasetDir, *, repair: bool = False) -> Iterator[Checked]:
    """Yield the state of each journal, step file and version of a dataset folder.

    With `repair`, a damaged journal is replaced by one of its intact replies; nothing else is changed. Raises StoreError if
    another process writes to the folder meanwhile.
    """
    if is_remote(dataset.path):
        raise StoreError(f"{dataset.path} is in an object store", hint="copy the folder to a disk, and check it there")
    journals = [dataset.journal, *sorted(dataset.path.glob("shards/*/journal/local.sqlite"))]
    for path in journals:
        if path.exists():
            yield _check_journal(dataset, path, repair=repair)
    for path in sorted(_step_files(dataset), key=str):
        with suppress(FileNotFoundError):  # a run has removed it meanwhile, to write it again
            yield _check_table(path)
    stored: dict[str, str] = {}
    for path in ImageStore(dataset.path).paths():
        yield _check_images(path, stored)
    for name in ("run.json", "pushed.json"):
        if (dataset.path / name).exists():
            yield _check_json(dataset.path / name)
    for path in sorted((dataset.path / "versions").glob("v*"), key=str):
        if (path / MANIFEST).exists():
            yield check_version_folder(path, dataset, stored)
        elif VERSION_NAME.fullmatch(path.name):
            yield Checked(str(path), f"it has no {MANIFEST}", False, f"move {path} away and run `synth generate` again")


def check_version_folder(path: Path, dataset: DatasetDir | None = None, stored: Mapping[str, str] | None = None) -> Checked:
    """Return the state of a version's folder; see check_version."""
    try:
        return check_version(read_version(path), dataset, stored)
    except SynthError as error:
        return Checked(str(path), str(error), False, error.hint)


def check_version(version: Version, dataset: DatasetDir | None = None, stored: Mapping[str, str] | None = None) -> Checked:
    """Return the state of a version: its files, the digest of its rows, and its images.

    `stored` are the digests of all images of the store by sample id; None: they are computed.
    """
    if not (damage := find_damage(version, stored)):
        files = len(version.manifest["files"])
        return Checked(str(version.path), f"{version.num_rows:,} rows in {files} files, as its digest says")
    pushed = [push for push in dataset.pushed() if push["version"] == version.name] if dataset else []
    hints = [f"fetch it: {push['repo']}@{push['commit']}" for push in pushed[:1]]
    hints.append(f"or move {version.path} away and run `synth generate` again: equal rows have the same digest")
    return Checked(str(version.path), "; ".join(damage), False, "; ".join(hints).removeprefix("or "))


def _check_journal(dataset: DatasetDir, path: Path, *, repair: bool) -> Checked:
    state = check_journal(path)
    if state.is_intact:
        return Checked(str(path), f"{state.replies:,} replies")
    problem = state.problem or f"{len(state.damaged):,} of {state.replies:,} replies have another checksum"
    if not repair:
        hint = f"`synth check {dataset.path} --repair` keeps every other reply; the next run asks the damaged ones again"
        return Checked(str(path), problem, False, hint)
    with dataset.lock():
        kept, lost, unanswered = repair_journal(path)
    gone = f"; of {unanswered:,} requests that were sent there is none" if unanswered else ""
    hint = f"the damaged one is {path.name}.damaged-*; run `synth generate` again: it asks what is missing"
    return Checked(str(path), f"{problem}; repaired: {kept:,} replies are kept, {lost:,} removed{gone}", True, hint)


def _step_files(dataset: DatasetDir) -> list[Path]:
    return [
        path
        for pattern in ("steps/*/*.parquet", "steps/read/*/*.parquet", "shards/*/steps/*/*.parquet")
        for path in dataset.path.glob(pattern)
    ]


def _check_images(path: Path, stored: dict[str, str]) -> Checked:
    """Return the state of a file of images, and add their digests to `stored`."""
    try:
        digests = hash_images(path)
    except UNREADABLE as error:
        return Checked(str(path), f"damaged: {one_line(error)}", False, f"move it away, and {READ_AGAIN}")
    for sample_id, sha256 in digests.items():
        stored.setdefault(sample_id, sha256)
    return Checked(str(path), f"{len(digests):,} images")


def _check_table(path: Path) -> Checked:
    """Return the state of a step file. Raises FileNotFoundError if it is gone."""
    try:
        rows = sum(batch.num_rows for batch in open_parquet(path).iter_batches())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        is_part = path.parent.parent.name == "read"  # rows that were read
        hint = f"move it away, and {READ_AGAIN}" if is_part else AGAIN
        return Checked(str(path), f"damaged: {one_line(error)}", False, hint)
    return Checked(str(path), f"{rows:,} rows")


def _check_json(path: Path) -> Checked:
    try:
        read_json(path)
    except (OSError, ValueError, RecursionError, SynthError) as error:
        return Checked(str(path), f"damaged: {one_line(error)}", False, "move it away, and run `synth generate` again")
    return Checked(str(path), "readable")
