"""Build the package that a push uploads: the files of a version or a model, the manifest, and the card."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pipeline.dataset.card import CARD_SAMPLES, has_unknown_license, render_card, render_model_card
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.integrity import require_intact_files
from pipeline.dataset.publishing import write_self_contained
from pipeline.dataset.version import LEFT_OUT, LOCK, PUSHED, REJECTIONS_FILE, Version, file_entry, first_rows
from pipeline.digests import digest, public_name, without_folders
from pipeline.errors import PushError
from pipeline.hub_errors import HUB_NAME
from pipeline.storage.files import json_text, read_json, translate_disk_errors
from pipeline.storage.lock import lock_file
from pipeline.storage.untrusted import require_regular
from pipeline.tables import PIXELS
from pipeline.types import non_redistributable

CHECKPOINT_FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "train.json",
    "metrics.json",
    "log.jsonl",
)


@dataclass(frozen=True, slots=True)
class Package:
    """The files to upload for a dataset version or a model."""

    kind: Literal["dataset", "model"]
    name: str  # the tag
    title: str
    manifest: dict[str, Any]
    files: dict[str, Path | bytes]
    has_unknown_license: bool

    def file_sizes(self) -> dict[str, int]:
        """Return the size of each file in bytes."""
        files = self.files.items()
        return {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files}


@contextmanager
def build_package(
    version: Version,
    repo: str,
    *,
    images: bool | None = None,
    acknowledged: Sequence[str] = (),
    stated: dict[str, Any] | None = None,
) -> Iterator[Package]:
    """Yield the package to push to `repo`. Some of its files exist only within the context.

    `images` states whether to include the images. None includes them if their licenses allow it.
    `acknowledged` lists restrictive licenses under which the user is allowed to publish. `stated` overrides
    manifest keys. Raises PushError if the images must not be published, and StoreError if a file is damaged.
    """
    require_intact_files(version)
    restricted = non_redistributable(version.manifest["licenses"])
    refused = [license_name for license_name in restricted if license_name not in acknowledged]
    if images and refused:
        options = " ".join(f"--acknowledge {name}" for name in refused)
        hint = f"if you may redistribute them, pass {options}: the card will state this"
        raise PushError(f"images under {', '.join(refused)} may not be redistributed", hint=hint)
    pixel_columns = [column for column in PIXELS if column in version.manifest["columns"]]
    stated = stated or {}
    if pixel_columns and (images is False or (images is None and restricted)):
        with _scratch_folder(version) as folder:
            manifest = without_pixels(version, folder) | stated
            yield _pack(version, repo, manifest, folder if version.holds_pixels else version.path)
        return
    if pixel_columns and restricted:
        stated = {"acknowledged": restricted} | stated
    if version.holds_pixels:
        yield _pack(version, repo, version.manifest | stated, version.path)
        return
    with _scratch_folder(version) as folder:
        yield _pack(version, repo, write_self_contained(version, folder) | stated, folder)


@contextmanager
def _scratch_folder(version: Version) -> Iterator[Path]:
    """Yield an empty folder for shards, on the same disk as the image store."""
    home = version.dataset_dir / PUSHED
    with translate_disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=home) as name, lock_file(Path(name) / LOCK, lambda: None, PushError):
            yield Path(name)


def without_pixels(version: Version, folder: Path) -> dict[str, Any]:
    """Return the manifest of a version without its images.

    If the version's files hold images, new files without images are written to `folder`.
    """
    columns = version.manifest["columns"]
    manifest = version.manifest | {"columns": [column for column in columns if column not in PIXELS]}
    if version.holds_pixels:
        manifest = write_self_contained(Version(version.path, manifest), folder)
    return manifest | {
        "features": {name: kind for name, kind in manifest["features"].items() if name not in PIXELS},
        "pixels": LEFT_OUT,
        "pixel_columns": [column for column in columns if column in PIXELS],
    }


def _pack(version: Version, repo: str, manifest: dict[str, Any], folder: Path) -> Package:
    return Package(
        kind="dataset",
        name=version.name,
        title=f"{version.name}: {sum(manifest['rows'].values())} samples",
        manifest=manifest,
        files={
            **{name: folder / name for name in sorted(manifest["files"])},
            REJECTIONS_FILE: version.path / REJECTIONS_FILE,
            "README.md": render_card(manifest, first_rows(version, CARD_SAMPLES), repo).encode(),
            "manifest.json": json_text(manifest).encode(),
        },
        has_unknown_license=has_unknown_license(manifest),
    )


def build_checkpoint_package(
    folder: Path, repo: str, extra_files: Callable[[Path], Mapping[str, bytes]], hub_ids: Mapping[str, str]
) -> Package:
    """Return the package of a captioner. Its tag is the version of the data plus a digest of the files.

    `extra_files` returns the files that transformers needs. `hub_ids` maps short names of models to Hub ids.
    Raises PushError if training is unfinished, and UnsafeFileError if a link leads out of the folder.
    """
    if missing := [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]:
        hint = "pass the folder that `synth train` printed"
        if (folder / "resume.pt").exists():  # the training was interrupted
            hint = f"run `synth train --resume --out {folder}`"
        raise PushError(f"{folder} is not a finished training run: it lacks {missing[0]}", hint=hint)
    for name in CHECKPOINT_FILES:
        require_regular(folder / name, folder)
    saved = {name: read_json(folder / f"{name}.json") for name in ("config", "train", "metrics")}
    models = base_models(saved["train"], hub_ids)
    # Publish no local paths.
    for part in ("encoder", "decoder"):
        saved["train"][part] = without_folders(str(saved["train"][part]))
    init = str(saved["train"].get("init") or "")
    if init and (Path(init).exists() or not HUB_NAME.fullmatch(init)):
        saved["train"]["init"] = Path(init).name
    written = {"train.json": json_text(saved["train"]).encode(), **extra_files(folder)}
    files = {name: file_entry(folder / name) for name in CHECKPOINT_FILES}
    for name, data in written.items():
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    names = (*CHECKPOINT_FILES, *sorted({*files} - {*CHECKPOINT_FILES}))
    content_digest = digest([files[name]["sha256"] for name in names])
    data = saved["config"]["data"]
    name = f"{data['version']}-{content_digest[:8]}"
    manifest = {"version": name, "digest": content_digest, "data": data, "files": files}
    dataset = data.get("repo")
    if not dataset:
        home = DatasetDir(folder.resolve().parent.parent)
        equal = {other.name for other in home.versions() if other.manifest["digest"] == data["digest"]}
        dataset = next((push["repo"] for push in home.pushed() if push["version"] in equal), None)
    card = render_model_card(saved | {"digest": content_digest}, repo, dataset, models)
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
        has_unknown_license=bool(data.get("has_unknown_license", True)),
    )


def base_models(train: Mapping[str, Any], hub_ids: Mapping[str, str]) -> list[str]:
    """Return the Hub ids of a captioner's encoder and decoder. A model from a local folder has no id."""
    names = (str(train[part]) for part in ("encoder", "decoder"))
    return [*filter(HUB_NAME.fullmatch, (hub_ids.get(name) or public_name(name) for name in names))]
