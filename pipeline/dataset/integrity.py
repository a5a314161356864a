"""Check the files, rows and images of a version against its manifest."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.builder import DIGESTS, row_digest, version_digest
from pipeline.dataset.images import UNREADABLE, read_intact_ids
from pipeline.dataset.version import REJECTIONS_FILE, Version, extras_of
from pipeline.digests import file_digest
from pipeline.errors import StoreError
from pipeline.tables import PIXELS


def damaged_files(version: Version, *, by_size: bool = False) -> list[str]:
    """Return the names of files that are missing, or whose digest differs from the manifest.

    With `by_size`, only sizes are compared, and no file is read.
    """

    def is_intact(path: Path, entry: dict[str, Any]) -> bool:
        if not path.is_file():
            return False
        return path.stat().st_size == entry["bytes"] and (by_size or file_digest(path) == entry["sha256"])

    entries = {**version.manifest["files"], REJECTIONS_FILE: version.manifest["rejections"]}
    return [name for name, entry in entries.items() if not is_intact(version.path / name, entry)]


def content_digest(version: Version) -> str:
    """Compute the digest of the rows in the files, without the pixels, which sample ids identify."""
    manifest = version.manifest
    stored = {*manifest["columns"]}
    extras = extras_of(manifest)
    columns = [name for name in extras.columns if name in stored | {*manifest.get("pixel_columns", ())}]
    texts = [name for name in extras.columns if name not in PIXELS]
    tables = [DIGESTS.empty_table()]
    for split, batch in version.batches([name for name in texts if name in stored]):
        rows = ({name: row.get(name) for name in texts} | {"split": split} for row in batch.to_pylist())
        digests = pa.array([row_digest(row) for row in rows], pa.string())
        tables.append(pa.table([batch["sample_id"], digests], schema=DIGESTS))
    ordered = pa.concat_tables(tables).sort_by("sample_id")
    return version_digest(zip(*ordered.to_pydict().values(), strict=True), columns, extras.scores)


def find_damage(version: Version, stored: Collection[str] | None = None) -> list[str]:
    """Return messages about the damage in a version, if any.

    `stored` has the ids of all intact images in its store. If it is None, the store is read to find them.
    """
    if files := damaged_files(version):
        return [f"{name} does not match the manifest" for name in files]
    try:
        is_intact = content_digest(version) == version.manifest["digest"]
        damaged: list[str] = []
        if not version.holds_pixels:
            if stored is None:
                stored = set[str]()
                for path in version.store.paths():
                    with suppress(*UNREADABLE):
                        stored |= read_intact_ids(path)
            damaged = [name for name in version.sample_ids() if name not in stored]
    except (StoreError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        return [f"its rows cannot be read: {error}"]
    if not is_intact:
        return ["its rows do not match its digest"]
    if not damaged:
        return []
    return [f"the images of {len(damaged)} samples are missing or damaged, such as {damaged[0][:12]}"]


def require_intact_files(version: Version) -> None:
    """Raise StoreError if a file differs from the manifest, or the store lacks images."""
    hint = f"nothing was sent; `synth check {version.dataset_dir}` shows how to repair it"
    if files := damaged_files(version):
        names = ", ".join(files)
        raise StoreError(f"{version.path} is damaged: {names} does not match its manifest", hint=hint)
    if not version.holds_pixels and (missing := version.store.find_missing(version.sample_ids())):
        problem = f"{len(missing)} images of {version.path} are not in {version.store.folder}"
        raise StoreError(problem, hint=hint)
