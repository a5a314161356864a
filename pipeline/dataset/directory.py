"""The dataset folder: its paths and its lock, and access to its versions and samples."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.dataset.images import BATCH_SAMPLES, ImageStore
from pipeline.dataset.version import DATA, MANIFEST, Version, read_version
from pipeline.errors import ConfigError, StoreError
from pipeline.storage.files import open_table, read_json, write_json
from pipeline.storage.lock import lease, lock_file
from pipeline.storage.object_store import is_remote
from pipeline.storage.untrusted import UnsafeFileError
from pipeline.tables import LISTED_SAMPLE
from pipeline.types import SampleBatch

OUTPUTS = ("kept", "rejected")
IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE = "image_groups", "near_duplicates"
LOCK_FILE = ".lock"
LISTED_ROWS = 1024
_DAMAGED_JSON = (ValueError, LookupError, TypeError, RecursionError, UnsafeFileError)


@dataclass(frozen=True, slots=True)
class DatasetDir:
    """A dataset folder or one of its shards, on disk or in an object store."""

    path: Path
    # The image store is in this folder, by default in `path`.
    image_folder: Path | None = None

    @property
    def run_file(self) -> Path:
        """The file with the settings of the last run."""
        return self.path / "run.json"

    @property
    def journal(self) -> Path:
        """The journal of replies to the requests that this machine sent."""
        return self.path / "journal" / "local.sqlite"

    def step_file(self, name: str, which: str = "kept") -> Path:
        """Return the path of a step's file, by default the file with the rows that the step kept."""
        return self.path / "steps" / name / f"{which}.parquet"

    def step_files(self, name: str, which: str = "kept") -> list[Path]:
        """Return the path from `step_file`. After a run on a cluster, return the paths in all shards."""
        file = self.step_file(name, which)
        if file.exists():
            return [file]
        shard = "*/*" if is_remote(self.path) else "*"
        return sorted(self.path.glob(f"shards/{shard}/steps/{name}/{which}.parquet"), key=str)

    @property
    def reviews(self) -> Path:
        """The file where `synth review apply` stores human reviews, and the verdicts of audits."""
        return self.path / "review" / "reviews.jsonl"

    @property
    def cost(self) -> Path:
        """The file with the cost of all requests so far."""
        return self.path / "steps" / "ask" / "cost.json"

    def read_cost(self) -> dict[str, float]:
        """Return the cost of all requests so far, or {} if it is unknown."""
        try:
            return dict(read_json(self.cost))
        except (OSError, *_DAMAGED_JSON):
            return {}

    def pushed(self) -> list[dict[str, str]]:
        """Return the version, repo and commit of each push. Raises StoreError if the file is damaged."""
        file = self.path / "pushed.json"
        if not file.exists():
            return []
        try:
            pushes = read_json(file)["pushed"]
            return [{name: str(push[name]) for name in ("version", "repo", "commit")} for push in pushes]
        except _DAMAGED_JSON:
            hint = "move it away: only the record of pushes is lost"
            raise StoreError(f"{file} is damaged", hint=hint) from None

    def record_push(self, version: str, repo: str, commit: str) -> None:
        """Record a push, unless it is already recorded."""
        push = {"version": version, "repo": repo, "commit": commit}
        earlier = [other for other in self.pushed() if other != push]
        write_json(self.path / "pushed.json", {"pushed": [*earlier, push]})

    def versions(self) -> list[Version]:
        """Return all finished versions, oldest first. Raises StoreError if one is damaged."""
        manifests = (self.path / "versions").glob(f"v*/{MANIFEST}")
        versions = [read_version(manifest.parent) for manifest in manifests]
        return sorted(versions, key=lambda version: version.number)

    def version(self, name: str | None = None, *, previews: bool = True) -> Version:
        """Return the version `name`, by default the newest version. Raises StoreError if it does not exist.

        Without `previews`, a preview is returned only if all matching versions are previews.
        """
        versions = self.versions()
        matches = [version for version in versions if name in (None, version.name)]
        if not matches:
            names = ", ".join(version.name for version in versions) or "none"
            hint = f"existing versions: {names}; `synth generate` makes a new version"
            raise StoreError(f"{self.path} has no version {name or ''}".rstrip(), hint=hint)
        complete = [version for version in matches if previews or not version.is_preview]
        return (complete or matches)[-1]

    @contextmanager
    def lock(
        self, *, wait: bool = False, say: Callable[[str], None] = lambda text: None
    ) -> Iterator[Callable[[], None]]:
        """Hold the lock of this folder. Raises StoreError if another process holds it, unless `wait` is set.

        In an object store, another process can take over the lock. Then the yielded function raises
        StoreError.
        """
        if is_remote(self.path):
            with lease(self.path / LOCK_FILE, say=say) as check:
                yield check
            return
        self.path.mkdir(parents=True, exist_ok=True)

        def on_busy() -> None:
            if not wait:
                hint = "wait for it, or choose another --out"
                raise StoreError(f"another process is writing to {self.path}", hint=hint)

        with lock_file(self.path / LOCK_FILE, on_busy, StoreError):
            yield lambda: None


def require_utf8_path(path: Path) -> None:
    """Raise ConfigError if a path is not valid UTF-8, because Parquet cannot open such a path."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ConfigError(f"the name of the folder {shown} is not UTF-8", hint="rename it") from None


def open_dataset(path: Path | None, *, previews: bool = True) -> Version:
    """Open a version folder, or a version in a dataset folder. By default, open the version made last.

    `path` may be FOLDER@VERSION. Raises StoreError if the dataset or version does not exist.
    """
    path, version = split_version(path or newest_dataset())
    require_utf8_path(path)
    if (path / MANIFEST).exists():
        opened = read_version(path)
        if version not in (None, opened.name):
            hint = "pass the dataset folder instead of a version"
            raise StoreError(f"{path} is the version {opened.name}, not {version}", hint=hint)
        return opened
    if not is_remote(path) and not (path / "versions").is_dir():
        raise no_dataset(path)
    return DatasetDir(path).version(version, previews=previews)


def no_dataset(path: Path) -> StoreError:
    """Return the error to raise when a folder on disk holds no dataset. It lists the datasets in DATA."""
    hint = "`synth generate` makes one; if it was interrupted, run it again"
    if datasets := _list_datasets():
        hint = f"datasets here: {', '.join(map(str, datasets[:8]))}; {hint}"
    known = [str(folder) for folder in path.parent.glob("*/") if folder != path]
    return StoreError(f"no dataset at {path}", unknown=str(path), known=known, hint=hint)


def _list_datasets() -> list[Path]:
    """Return the dataset folders in DATA. The folder with the newest version comes first."""
    manifests = sorted(DATA.glob(f"*/versions/v*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime_ns)
    return [*dict.fromkeys(path.parents[2] for path in manifests)]


def split_version(path: Path) -> tuple[Path, str | None]:
    """Split FOLDER@VERSION. For any other path, return the path and None."""
    folder, _, name = path.name.rpartition("@")
    if not folder or not name or path.exists():
        return path, None
    return path.parent / folder, name


def newest_dataset(*, is_only: bool = False) -> Path:
    """Return the dataset folder with the newest version. Raises StoreError if there is none.

    With `is_only`, raises StoreError if there are several datasets, instead of guessing.
    """
    if not (datasets := _list_datasets()):
        hint = "make a dataset with `synth generate --source scenes`, or pass the folder of a dataset"
        raise StoreError(f"no dataset under {DATA}/", hint=hint)
    if is_only and len(datasets) > 1:
        hint = f"pass one: {', '.join(map(str, datasets[:8]))}"
        raise StoreError(f"{DATA}/ has {len(datasets)} datasets", hint=hint)
    return datasets[0]


def read_samples(shard: DatasetDir, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the samples that the read step kept (tables.LISTED_SAMPLE), or only some of their columns."""
    names = LISTED_SAMPLE.names if columns is None else columns
    for batch in open_table(shard.step_file("read")).iter_batches(LISTED_ROWS, columns=names):
        yield batch.select(names)


def sample_batches(shard: DatasetDir) -> Iterator[SampleBatch]:
    """Yield all samples in batches, which read their images on demand."""
    sample_ids = open_table(shard.step_file("read")).read(["sample_id"])["sample_id"]
    store = ImageStore(shard.image_folder or shard.path)

    def read_images(ids: list[str]) -> list[tuple[bytes, ...]]:
        return list(map(tuple, store.read(ids).to_pylist()))

    for start in range(0, len(sample_ids), BATCH_SAMPLES):
        ids = sample_ids.slice(start, BATCH_SAMPLES).to_pylist()
        yield SampleBatch(ids, partial(read_images, ids))
