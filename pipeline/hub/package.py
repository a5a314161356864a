"""What leaves this machine in a push: the files of a version or a model, with a manifest and a card that say what they hold."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.card import CARD_SAMPLES, render_card, render_model_card
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.licenses import non_redistributable
from pipeline.dataset.version import LEDGER_FILE, Version
from pipeline.digests import digest, file_digest
from pipeline.errors import PushError
from pipeline.storage.files import read_json
from pipeline.tables import PIXELS, ROW, features, with_features

CHECKPOINT_FILES = ("config.json", "tokenizer.json", "model.safetensors", "train.json", "metrics.json", "log.jsonl")


@dataclass(frozen=True, slots=True)
class Package:
    """A version of a dataset, or a model, on its way.

    `name` is its tag, `title` the message of its commit; `manifest` is as it will be read there, and says of `files` what
    their bytes are; `files` holds the content of every file by its path there.
    """

    kind: Literal["dataset", "model"]
    name: str
    title: str
    manifest: dict[str, Any]
    files: dict[str, Path | bytes]

    def bytes(self) -> dict[str, int]:
        """Return the size of each file."""
        return {name: len(what) if isinstance(what, bytes) else what.stat().st_size for name, what in self.files.items()}


@contextmanager
def build_package(
    version: Version, repo: str, *, images: bool | None = None, acknowledged: Sequence[str] = ()
) -> Iterator[Package]:
    """Yield what is pushed to `repo`; shards that must be rewritten lie in a folder that is removed afterwards.

    Args:
        version: what is to be pushed.
        repo: where to; the card names it.
        images: whether pixels go too; None leaves out what may not be passed on.
        acknowledged: licences under which the caller may pass on pixels all the same; the card says so.

    Raises:
        PushError: files of the version are missing, or pixels are asked for that may not be passed on.
    """
    missing = [name for name in (*version.manifest["files"], LEDGER_FILE) if not (version.path / name).is_file()]
    if missing:
        raise PushError(f"{version.path} lacks {', '.join(missing)}", hint="a version never changes: generate it again")
    held = non_redistributable(version.manifest["licences"])
    unsaid = [licence for licence in held if licence not in acknowledged]
    if images and unsaid:
        raise PushError(
            f"pixels under {', '.join(unsaid)} may not be passed on",
            hint=f"if you hold the right to, say so: --acknowledge {' --acknowledge '.join(unsaid)}; the card will say it",
        )
    has_pixels = bool(set(PIXELS) & set(version.manifest["columns"]))
    if has_pixels and (images is False or (images is None and held)):
        with tempfile.TemporaryDirectory() as folder:
            yield _pack(version, repo, without_pixels(version, Path(folder)), Path(folder))
    else:
        said = {"acknowledged": held} if has_pixels and held else {}
        yield _pack(version, repo, version.manifest | said, version.path)


def without_pixels(version: Version, folder: Path) -> dict[str, Any]:
    """Write a copy of each shard without pixels; return the manifest that goes with them."""
    files = {}
    kept = [column for column in version.manifest["columns"] if column not in PIXELS]
    schema = with_features(pa.schema([ROW.field(column) for column in kept]))
    for name, about in version.manifest["files"].items():
        source = pq.ParquetFile(version.path / name)
        with pq.ParquetWriter(folder / name, schema, compression="zstd") as writer:
            for group in range(source.num_row_groups):  # one at a time, so that they stay where they are
                writer.write_table(source.read_row_group(group, columns=kept).select(kept).cast(schema))
        size = (folder / name).stat().st_size
        files[name] = about | {"sha256": file_digest(folder / name), "bytes": size}
    left_out = {"pixels": "left out", "pixel_columns": [c for c in version.manifest["columns"] if c in PIXELS]}
    return version.manifest | {"columns": kept, "features": features(schema), "files": files} | left_out


def _pack(version: Version, repo: str, manifest: dict[str, Any], folder: Path) -> Package:
    return Package(
        kind="dataset",
        name=version.name,
        title=f"{version.name}: {sum(manifest['rows'].values())} samples",
        manifest=manifest,
        files={
            **{name: folder / name for name in sorted(manifest["files"])},
            LEDGER_FILE: version.path / LEDGER_FILE,
            "README.md": render_card(manifest, first_rows(version), repo).encode(),
            "manifest.json": _json(manifest),
        },
    )


def build_checkpoint_package(folder: Path, repo: str) -> Package:
    """Return the package of a trained captioner; its tag names the version of the data and its own content.

    Raises:
        PushError: the folder holds no finished training.
    """
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if missing:
        raise PushError(f"{folder} is no finished training: it lacks {missing[0]}", hint="pass what `synth train` printed")
    about = {name: read_json(folder / f"{name}.json") for name in ("config", "train", "metrics")}
    for part in ("encoder", "decoder"):  # a path of the user's is nobody's business
        about["train"][part] = Path(about["train"][part]).name if Path(about["train"][part]).is_dir() else about["train"][part]
    train = _json(about["train"])
    files = {name: {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size} for name in CHECKPOINT_FILES}
    files["train.json"] = {"sha256": hashlib.sha256(train).hexdigest(), "bytes": len(train)}
    content = digest([files[name]["sha256"] for name in CHECKPOINT_FILES])
    data = about["config"]["data"]
    name = f"{data['version']}-{content[:8]}"
    manifest = {"version": name, "digest": content, "data": data, "files": files}
    dataset = data.get("repo") or _pushed_as(folder, data)
    card = render_model_card(about | {"digest": content}, repo, dataset)
    return Package(
        kind="model",
        name=name,
        title=f"{name}: trained on {data['source']['name']}",
        manifest=manifest,
        files={
            **{name: folder / name for name in CHECKPOINT_FILES},
            "train.json": train,
            "README.md": card.encode(),
            "manifest.json": _json(manifest),
        },
    )


def _pushed_as(folder: Path, data: dict[str, Any]) -> str | None:
    """Return where the data of a checkpoint was pushed to, where it lies in the folder of that very dataset."""
    home = DatasetDir(folder.resolve().parent.parent)
    version = next((v for v in home.versions() if v.manifest["digest"] == data["digest"]), None)
    return next((push["repo"] for push in home.pushed() if version and push["version"] == version.name), None)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def first_rows(version: Version, count: int = CARD_SAMPLES) -> list[dict[str, Any]]:
    """Return a few rows without their pixels, for the card."""
    columns = [column for column in version.manifest["columns"] if column not in PIXELS]
    rows: list[dict[str, Any]] = []
    for _, batch in version.batches(columns, count):
        rows += batch.slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    return rows
