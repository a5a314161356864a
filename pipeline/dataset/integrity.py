"""Verify the files, rows and images of a version against its manifest; make a repaired copy."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from pipeline.dataset.builder import DIGESTS, row_digest, version_digest
from pipeline.dataset.card import CARD_SAMPLES, render_card
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import UNREADABLE, ImageStore, hash_images
from pipeline.dataset.publishing import publish
from pipeline.dataset.version import CARD_FILE, IMAGES_FILE, MANIFEST, REJECTIONS_FILE, Version, extras_of, first_rows
from pipeline.digests import file_digest
from pipeline.errors import StoreError
from pipeline.storage.files import read_table, scratch_folder, write_json, write_text
from pipeline.tables import IMAGE_DIGESTS, PIXELS

ROWS_AT_ONCE = 1024


def damaged_files(version: Version) -> list[str]:
    """Return the files of a version that are missing, or hold other bytes than its manifest says."""
    return [name for name, entry in _entries(version).items() if not _is_intact(version, name, entry)]


def missing_files(version: Version) -> list[str]:
    """Return the files of a version that are gone or of another size than its manifest says, without a look into them."""
    entries = _entries(version)
    paths = {name: version.path / name for name in entries}
    return [name for name, path in paths.items() if not path.is_file() or path.stat().st_size != entries[name].get("bytes")]


def _entries(version: Version) -> dict[str, dict[str, Any]]:
    """Return what the manifest says of each file."""
    images = {IMAGES_FILE: version.manifest["images"]} if version.manifest.get("images") else {}
    return {**version.manifest["files"], REJECTIONS_FILE: version.manifest["rejections"], **images}


def _is_intact(version: Version, name: str, entry: dict[str, Any]) -> bool:
    path = version.path / name
    return path.is_file() and file_digest(path) == entry.get("sha256")


def content_digest(version: Version) -> str:
    """Return the digest of the rows that the files hold.

    Pixels are not part of it: sample ids stand for them, as the sha256 of the images before their metadata was removed.
    """
    manifest = version.manifest
    stored = {*manifest["columns"]}
    extras = extras_of(manifest)
    columns = [name for name in extras.columns if name in stored | {*manifest.get("pixel_columns", ())}]
    texts = [name for name in extras.columns if name not in PIXELS]
    tables = [DIGESTS.empty_table()]
    for split, batch in version.batches([name for name in texts if name in stored], ROWS_AT_ONCE):
        rows = batch.to_pylist()
        of_batch = [row_digest({name: row.get(name) for name in texts} | {"split": split}) for row in rows]
        tables.append(pa.table([batch["sample_id"], pa.array(of_batch, pa.string())], schema=DIGESTS))
    ordered = pa.concat_tables(tables).sort_by("sample_id")
    digests = zip(ordered["sample_id"].to_pylist(), ordered["digest"].to_pylist(), strict=True)
    return version_digest(digests, columns, extras.scores)


def hash_store(store: ImageStore) -> dict[str, str]:
    """Return the digest of the stored images of each sample, computed from their bytes; a damaged file has none."""
    digests: dict[str, str] = {}
    for path in store.paths():
        with suppress(*UNREADABLE):
            digests = hash_images(path) | digests
    return digests


def damaged_images(version: Version, stored: Mapping[str, str]) -> list[str]:
    """Return the samples of a version whose images are not in the store, or have another digest than the
    version says.

    `stored` are the digests of all images of the store. A version whose files hold the images has none of
    these.
    """
    if not version.manifest.get("images"):
        return []
    table = read_table(version.path / IMAGES_FILE)
    expected = dict(zip(table["sample_id"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    rows = [name for _, batch in version.batches(["sample_id"]) for name in batch["sample_id"].to_pylist()]
    return [name for name in rows if name not in expected or stored.get(name) != expected[name]]


def find_damage(version: Version, stored: Mapping[str, str] | None = None) -> list[str]:
    """Return what is wrong with a version, in words; nothing if it is what its manifest says.

    `stored` are the digests of all images of the store (`hash_store`); None: they are computed.
    """
    if wrong := damaged_files(version):
        return [f"{name} is not what the manifest says" for name in wrong]
    try:
        is_intact = content_digest(version) == version.manifest["digest"]
        has_images = bool(version.manifest.get("images"))
        stored = hash_store(version.store) if stored is None and has_images else stored or {}
        damaged = damaged_images(version, stored)
    except (StoreError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        return [f"its rows cannot be read: {error}"]
    if not is_intact:
        return ["its rows are not those of its digest"]
    return [f"the images of {len(damaged)} samples are missing or damaged, such as {damaged[0][:12]}"] if damaged else []


def require_intact_files(version: Version) -> None:
    """Raise StoreError if a file of a version holds other bytes than its manifest says, or if images are not stored."""
    if wrong := damaged_files(version):
        hint = f"nothing was sent; `synth check {version.dataset_dir}` says what can be rebuilt"
        raise StoreError(f"{version.path} is damaged: {', '.join(wrong)} is not what its manifest says", hint=hint)
    digests = version.store.digests() if version.manifest.get("images") else IMAGE_DIGESTS.empty_table()
    stored = dict(zip(digests["sample_id"].to_pylist(), digests["sha256"].to_pylist(), strict=True))
    if damaged := damaged_images(version, stored):
        hint = f"nothing was sent; `synth check {version.dataset_dir}` says what can be rebuilt"
        raise StoreError(f"{len(damaged)} images of {version.path} are not in {version.store.folder}", hint=hint)


def make_repaired_version(version: Version, damage: list[str]) -> Version:
    """Publish the same rows as the next patch, which names the version whose push was damaged, and how.

    Raise StoreError if the version here is damaged as well, or is not the newest one of its folder.
    """
    require_intact_files(version)
    dataset = DatasetDir(version.dataset_dir)
    with dataset.lock(), scratch_folder(dataset.path / "versions") as draft:
        newest = dataset.versions()[-1]
        if newest.name != version.name:
            hint = f"push {newest.name}, which is newer"
            raise StoreError(f"only the newest version can be repaired, and {version.name} is not", hint=hint)
        major, minor, patch = max([version.number, *dataset.taken_numbers()])
        name = f"v{major}.{minor}.{patch + 1}"
        repairs = {"version": version.name, "damaged": damage}
        manifest = version.manifest | {"version": name, "parent": version.name, "repairs": repairs}
        if version.manifest.get("images"):  # a version that is a link has its images elsewhere
            ids = read_table(version.path / IMAGES_FILE, ["sample_id"])["sample_id"].to_pylist()
            ImageStore(dataset.path).add_from(version.store, ids)
        for file in _entries(version):
            shutil.copy(version.path / file, draft / file)
        write_text(draft / CARD_FILE, render_card(manifest, first_rows(version, CARD_SAMPLES)))
        write_json(draft / MANIFEST, manifest)
        final = dataset.path / "versions" / name
        publish(draft, final)
    return Version(final, manifest)
