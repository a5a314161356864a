"""Check the files, rows and images of a version against its manifest."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from pipeline.dataset.builder import DIGESTS, row_digest, version_digest
from pipeline.dataset.images import UNREADABLE, ImageStore, hash_images
from pipeline.dataset.version import IMAGES_FILE, REJECTIONS_FILE, Version, extras_of
from pipeline.digests import file_digest
from pipeline.errors import StoreError
from pipeline.storage.files import read_table
from pipeline.tables import IMAGE_DIGESTS, PIXELS


def damaged_files(version: Version) -> list[str]:
    """Return the names of files that are missing, or whose digest differs from the manifest."""
    files = ((name, version.path / name, entry["sha256"]) for name, entry in _file_entries(version).items())
    return [name for name, path, sha256 in files if not path.is_file() or file_digest(path) != sha256]


def missing_files(version: Version) -> list[str]:
    """Return the names of files that are missing, or whose size differs. File contents are not read."""
    files = ((name, version.path / name, entry["bytes"]) for name, entry in _file_entries(version).items())
    return [name for name, path, size in files if not path.is_file() or path.stat().st_size != size]


def _file_entries(version: Version) -> dict[str, dict[str, Any]]:
    images = {IMAGES_FILE: version.manifest["images"]} if version.manifest.get("images") else {}
    return {**version.manifest["files"], REJECTIONS_FILE: version.manifest["rejections"], **images}


def content_digest(version: Version) -> str:
    """Compute the digest of the rows in the files. Sample ids represent the pixels."""
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


def hash_store(store: ImageStore) -> dict[str, str]:
    """Compute the digest of each sample's images in a store. Damaged files are skipped."""
    digests: dict[str, str] = {}
    for path in store.paths():
        with suppress(*UNREADABLE):
            digests = hash_images(path) | digests
    return digests


def damaged_images(version: Version, stored: Mapping[str, str]) -> list[str]:
    """Return the ids of samples in a version whose image digest in `stored` is wrong or missing."""
    if not version.manifest.get("images"):
        return []
    table = read_table(version.path / IMAGES_FILE, IMAGE_DIGESTS.names)
    expected = dict(zip(*table.to_pydict().values(), strict=True))
    return [
        name for name in version.sample_ids() if name not in expected or stored.get(name) != expected[name]
    ]


def find_damage(version: Version, stored: Mapping[str, str] | None = None) -> list[str]:
    """Return messages about the damage in a version, if any. `stored` is the result of `hash_store`."""
    if files := damaged_files(version):
        return [f"{name} does not match the manifest" for name in files]
    try:
        is_intact = content_digest(version) == version.manifest["digest"]
        if stored is None:
            stored = hash_store(version.store) if version.manifest.get("images") else {}
        damaged = damaged_images(version, stored)
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
    if version.manifest.get("images"):
        stored = dict(zip(*version.store.digests().to_pydict().values(), strict=True))
        if damaged := damaged_images(version, stored):
            problem = f"{len(damaged)} images of {version.path} are not in {version.store.folder}"
            raise StoreError(problem, hint=hint)
