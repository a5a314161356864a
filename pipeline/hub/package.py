"""Build the package that a push uploads: the files of a version or a model, with their manifest and card."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pipeline.dataset.card import CARD_SAMPLES, has_unknown_license, render_card, render_model_card
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.integrity import require_intact_files
from pipeline.dataset.publishing import write_self_contained
from pipeline.dataset.version import AGAIN, LEFT_OUT, LOCK, PUSHED, REJECTIONS_FILE, Version, file_entry, first_rows, schema_of
from pipeline.digests import digest, without_folders
from pipeline.errors import PushError
from pipeline.storage.files import json_text, open_parquet, open_writer, read_json
from pipeline.storage.lock import lock_file
from pipeline.storage.untrusted import require_regular
from pipeline.tables import PIXELS, features, with_features
from pipeline.types import non_redistributable

NO_EXPORTS: Mapping[str, Path] = MappingProxyType({})
CHECKPOINT_FILES = ("config.json", "tokenizer.json", "model.safetensors", "train.json", "metrics.json", "log.jsonl")


@dataclass(frozen=True, slots=True)
class Package:
    """A version of a dataset, a model, or a page for a model, to upload.

    `name` is its tag, `title` the message of its commit; `manifest` is the uploaded manifest, with the digest and size of
    each file; `files` maps each path in the repository to a local file or to its content. `has_unknown_license`: it holds,
    tells of or has learned from images whose license is not known.
    """

    kind: Literal["dataset", "model", "space"]
    name: str
    title: str
    manifest: dict[str, Any]
    files: dict[str, Path | bytes]
    has_unknown_license: bool

    def bytes(self) -> dict[str, int]:
        """Return the size of each file."""
        return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()}


def exported_files(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's entries of the files of exports, by their paths in the repository; of what is none, nothing."""
    exports = manifest.get("exports")
    folders = exports.items() if isinstance(exports, dict) else ()
    files = ((f"{name}/{file}", entry) for name, of in folders if isinstance(of, dict) for file, entry in of.items())
    return {path: entry for path, entry in files if isinstance(entry, dict) and isinstance(entry.get("sha256"), str)}


@contextmanager
def build_package(
    version: Version,
    repo: str,
    *,
    images: bool | None = None,
    acknowledged: Sequence[str] = (),
    stated: dict[str, str] | None = None,
    exports: Mapping[str, Path] = NO_EXPORTS,
) -> Iterator[Package]:
    """Yield the package to push to `repo`; shards with the images are in a temporary folder that is removed
    afterwards.

    `images` includes or leaves out pixels; None leaves out those that may not be redistributed. `acknowledged` are restrictive
    licenses under which the caller may redistribute pixels; the card says so. `stated` is what the caller says of the data
    (dataset.manifest.describe_data). `exports` are folders of the same rows in formats of other tools, by name, which go into
    folders of that name. Raise PushError if files of the version are missing, or if `images` or `exports` would include pixels
    that may not be redistributed; StoreError if a file is damaged.
    """
    if missing := [name for name in (*version.manifest["files"], REJECTIONS_FILE) if not (version.path / name).is_file()]:
        raise PushError(f"{version.path} lacks {', '.join(missing)}", hint=AGAIN)
    require_intact_files(version)
    restricted = non_redistributable(version.manifest["licenses"])
    refused = [license_name for license_name in restricted if license_name not in acknowledged]
    if images and refused:
        hint = f"if you hold the right to, say so: --acknowledge {' --acknowledge '.join(refused)}; the card will say it"
        raise PushError(f"pixels under {', '.join(refused)} may not be passed on", hint=hint)
    pixel_columns = [column for column in PIXELS if column in version.manifest["columns"]]
    with _scratch(version) as folder:
        if pixel_columns and (images is False or (images is None and restricted)):
            if exports:
                raise PushError(f"{', '.join(exports)} would hold the images, which are left out", hint="leave out --also")
            yield _pack(version, repo, without_pixels(version, folder) | (stated or {}), folder)
            return
        if version.holds_pixels:
            manifest, folder = version.manifest, version.path
        else:
            manifest = write_self_contained(version, folder)
        acknowledgement = {"acknowledged": restricted} if pixel_columns and restricted else {}
        yield _pack(version, repo, manifest | acknowledgement | (stated or {}), folder, exports)


@contextmanager
def _scratch(version: Version) -> Iterator[Path]:
    """Yield an empty temporary folder for shards.

    Images from a store take as much room as the store: the folder is on its disk.
    """
    home = None if version.holds_pixels else version.dataset_dir / PUSHED
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as name, lock_file(Path(name) / LOCK, lambda: None, PushError):
        yield Path(name)


def without_pixels(version: Version, folder: Path) -> dict[str, Any]:
    """Write a copy of each shard without pixels; return the manifest that goes with them."""
    columns = [column for column in version.manifest["columns"] if column not in PIXELS]
    files, schema = {}, schema_of(version.manifest | {"columns": columns})
    for name, entry in version.manifest["files"].items():
        source = open_parquet(version.path / name)
        with open_writer(folder / name, with_features(schema)) as writer:
            for group in range(source.num_row_groups):  # one at a time, to keep the boundaries of row groups
                writer.write_table(source.read_row_group(group, columns=columns).select(columns).cast(writer.schema))
        files[name] = entry | file_entry(folder / name)
    left_out = {"pixels": LEFT_OUT, "pixel_columns": [c for c in version.manifest["columns"] if c in PIXELS]}
    described = {"columns": columns, "features": features(schema), "files": files, "reader_columns": []}
    return {key: value for key, value in version.manifest.items() if key != "images"} | described | left_out


def _pack(
    version: Version, repo: str, manifest: dict[str, Any], folder: Path, exports: Mapping[str, Path] = NO_EXPORTS
) -> Package:
    exported = {
        name: {path.relative_to(of).as_posix(): path for path in sorted(of.rglob("*")) if path.is_file()}
        for name, of in exports.items()
    }
    entries = {name: {file: file_entry(path) for file, path in files.items()} for name, files in exported.items()}
    manifest = {key: value for key, value in manifest.items() if key != "exports"} | ({"exports": entries} if entries else {})
    return Package(
        kind="dataset",
        name=version.name,
        title=f"{version.name}: {sum(manifest['rows'].values())} samples",
        manifest=manifest,
        files={
            **{name: folder / name for name in sorted(manifest["files"])},
            **{f"{name}/{file}": path for name, files in exported.items() for file, path in files.items()},
            REJECTIONS_FILE: version.path / REJECTIONS_FILE,
            "README.md": render_card(manifest, first_rows(version, CARD_SAMPLES), repo).encode(),
            "manifest.json": json_text(manifest).encode(),
        },
        has_unknown_license=has_unknown_license(manifest),
    )


def build_checkpoint_package(
    folder: Path, repo: str, more: Callable[[Path], Mapping[str, bytes]], hub_ids: Mapping[str, str]
) -> Package:
    """Return the package of a captioner, tagged by its data and a digest of its files. Raise PushError if it is not trained.

    `more` makes files beside those of the checkpoint, or in place of them: with them it loads in transformers. `hub_ids` has
    the ids of models that settings name briefly.
    Raise UnsafeFileError for a file that is a link to the outside of the folder: its content would be published.
    """
    if missing := [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]:
        hint = "go on with it: synth train --resume" if (folder / "resume.pt").exists() else "pass what `synth train` printed"
        raise PushError(f"{folder} is not a finished training: it lacks {missing[0]}", hint=hint)
    for name in CHECKPOINT_FILES:
        require_regular(folder / name, folder)
    saved = {name: read_json(folder / f"{name}.json") for name in ("config", "train", "metrics")}
    made_of_models = base_models(saved["train"], hub_ids)
    for part in ("encoder", "decoder"):  # local paths are removed before settings are published
        saved["train"][part] = without_folders(str(saved["train"][part]))
    written = {"train.json": json_text(saved["train"]).encode(), **more(folder)}
    files = {name: file_entry(folder / name) for name in CHECKPOINT_FILES}
    files |= {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in written.items()}
    content_digest = digest([files[name]["sha256"] for name in (*CHECKPOINT_FILES, *sorted({*files} - {*CHECKPOINT_FILES}))])
    data = saved["config"]["data"]
    name = f"{data['version']}-{content_digest[:8]}"
    manifest = {"version": name, "digest": content_digest, "data": data, "files": files}
    made_of, pushed_as = _version_of(folder, data)
    dataset = data.get("repo") or pushed_as
    card = render_model_card(saved | {"digest": content_digest}, repo, dataset, made_of_models)
    return Package(
        kind="model",
        name=name,
        title=f"{name}: trained on {data['source']['name']}",
        manifest=manifest,
        files={
            **{name: folder / name for name in CHECKPOINT_FILES},
            **written,
            "README.md": card.encode(),
            "manifest.json": json_text(manifest).encode(),
        },
        has_unknown_license=data.get("has_unknown_license", made_of is None or has_unknown_license(made_of.manifest)),
    )


def base_models(train: Mapping[str, Any], hub_ids: Mapping[str, str]) -> list[str]:
    """Return the ids of the models on the Hub that a captioner was made of; a folder is none, whatever its name is."""
    given = [str(train[part]) for part in ("encoder", "decoder")]
    return [hub_ids.get(name, name) for name in given if name in hub_ids or without_folders(name) == name]


def build_space_package(model: Package, files: Mapping[str, bytes]) -> Package:
    """Return the package of a Space for a model, under the model's tag; `files` are all of it but the manifest."""
    entries = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    content_digest = digest([[name, entry["sha256"]] for name, entry in sorted(entries.items())])
    manifest = {"version": model.name, "digest": content_digest, "files": entries}
    return Package(
        kind="space",
        name=model.name,
        title=f"A page for {model.name}",
        manifest=manifest,
        files={**files, "manifest.json": json_text(manifest).encode()},
        has_unknown_license=model.has_unknown_license,
    )


def _version_of(folder: Path, data: dict[str, Any]) -> tuple[Version | None, str | None]:
    """Return the version that a checkpoint has learned from and where it was pushed, if it lies in the dataset's folder."""
    home = DatasetDir(folder.resolve().parent.parent)
    version = next((v for v in home.versions() if v.manifest["digest"] == data["digest"]), None)
    return version, next((push["repo"] for push in home.pushed() if version and push["version"] == version.name), None)
