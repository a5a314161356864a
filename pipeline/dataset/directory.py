"""The dataset folder: its paths, its lock, and how its versions and samples are read.

Files appear whole or not at all: they are written to a temporary file, flushed to the disk and renamed. An unchanged file is
not rewritten, so that a second run of the same command changes nothing. The folder of a run on a cluster may lie in an
object store (storage/object_store.py): files are then written to a disk and uploaded.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.dataset.images import BATCH_SAMPLES, ImageStore
from pipeline.dataset.version import (
    DATA,
    MANIFEST,
    VERSION_NAME,
    NewerVersionError,
    Version,
    dataset_dir_of,
    parse_version,
    read_version,
)
from pipeline.errors import ConfigError, StoreError
from pipeline.storage.files import open_table, read_json, read_table, write_json
from pipeline.storage.lock import lease, lock_file
from pipeline.storage.object_store import is_remote
from pipeline.storage.untrusted import UnsafeFileError
from pipeline.tables import LISTED_SAMPLE, NUM_PAGES
from pipeline.types import SampleBatch

log = logging.getLogger(__name__)
ELSEWHERE = "elsewhere.json"  # in DATA: dataset folders that were made with --out
MAX_REMEMBERED = 20
OUTPUTS = ("kept", "rejected")  # the tables that each step leaves
IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE = "image_groups", "near_duplicates"  # of the step source
RUN_FILE, LOCK_FILE = "run.json", ".lock"
LISTED_ROWS = 1024  # samples that are read together without their images
TAG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class DatasetDir:
    """Paths within one dataset folder."""

    path: Path

    @property
    def run_file(self) -> Path:
        """The resolved config."""
        return self.path / RUN_FILE

    def settings(self) -> dict[str, Any]:
        """Return the settings of the last run; those that are not valid as they are, such as addresses without passwords."""
        values = read_json(self.run_file)
        try:
            return Config.model_validate(values).model_dump(mode="json")
        except ValidationError:
            return values

    @property
    def journal(self) -> Path:
        """The journal of raw replies, with one writer on this machine."""
        return self.path / "journal" / "local.sqlite"

    @property
    def server_log(self) -> Path:
        """The output of a vLLM server that was started."""
        return self.path / "vllm.log"

    def step_file(self, name: str, which: str = "kept") -> Path:
        """Rows that a step kept or rejected."""
        return self.path / "steps" / name / f"{which}.parquet"

    def step_files(self, name: str, which: str = "kept") -> list[Path]:
        """Return the files of rows that a step kept or rejected: one, or one of each shard of a run on a cluster."""
        own = self.step_file(name, which)
        below = "*/*" if is_remote(self.path) else "*"
        return [own] if own.exists() else sorted(self.path.glob(f"shards/{below}/steps/{name}/{which}.parquet"), key=str)

    @property
    def reviews(self) -> Path:
        """Reviews of texts by people, applied by `synth review apply`."""
        return self.path / "review" / "reviews.jsonl"

    @property
    def cost(self) -> Path:
        """The cost of requests so far."""
        return self.path / "steps" / "ask" / "cost.json"

    def read_cost(self) -> dict[str, float]:
        """Return the cost of requests so far; nothing if it is not known."""
        try:
            return dict(read_json(self.cost))
        except (OSError, ValueError, RecursionError, TypeError):
            return {}

    def pushed(self) -> list[dict[str, str]]:
        """Return every push from here: version, repo and commit."""
        file = self.path / "pushed.json"
        if not file.exists():
            return []
        try:
            return [{name: str(push[name]) for name in ("version", "repo", "commit")} for push in read_json(file)["pushed"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise StoreError(f"{file} is damaged", hint="move it away; it lists what was pushed from here") from None

    def record_push(self, version: str, repo: str, commit: str) -> None:
        """Record a push; the same push is recorded once."""
        push = {"version": version, "repo": repo, "commit": commit}
        earlier = [other for other in self.pushed() if other != push]
        write_json(self.path / "pushed.json", {"pushed": [*earlier, push]})

    def taken_numbers(self) -> list[tuple[int, ...]]:
        """Return the numbers of versions that were tagged or pushed, here or not: no other version is given one of them."""
        names = {*read_tags(self.path).values(), *(push["version"] for push in self.pushed())}
        return sorted(parse_version(name) for name in names if VERSION_NAME.fullmatch(name))

    def versions(self) -> list[Version]:
        """Return all finished versions, oldest first. Raise StoreError if one is damaged."""
        versions: list[Version] = []
        for manifest in (self.path / "versions").glob(f"v*/{MANIFEST}"):
            try:
                versions.append(read_version(manifest.parent))
            except NewerVersionError:
                raise
            except StoreError as error:
                name = manifest.parent.name
                removal = f"synth versions rm {name} --data {self.path}"
                hint = f"move {manifest.parent} away; if nobody needs it, remove it: {removal}"
                raise StoreError(f"the version {name} cannot be read: {error}", hint=hint) from None
        return sorted(versions)

    def version(self, name: str | None = None, *, previews: bool = True) -> Version:
        """Return the version of that name or tag, or the newest; without `previews`, a preview only if all are previews.

        Raises StoreError if there is no such version.
        """
        versions = self.versions()
        matches = [version for version in versions if name in (None, version.name)]
        tags = read_tags(self.path) if name and not matches else {}
        matches = matches or [version for version in versions if version.name == tags.get(name or "")]
        if not matches:
            names = [*(version.name for version in versions), *tags]
            hint = f"versions here: {', '.join(names) or 'none'}; `synth generate` makes one"
            raise StoreError(f"{self.path} has no version {name or ''}".rstrip(), hint=hint)
        finished = [version for version in matches if previews or not version.is_preview]
        return (finished or matches)[-1]

    @contextmanager
    def lock(self, *, wait: bool = False, say: Callable[[str], None] = lambda text: None) -> Iterator[Callable[[], None]]:
        """Hold the writer's lock of this folder. Raises StoreError if another process holds it, unless `wait` is set.

        In an object store, the lease of a killed process is waited for, with a message to `say`; the yielded function raises
        StoreError if another process has taken over our lease.
        """
        if is_remote(self.path):
            with lease(self.path / LOCK_FILE, say=say) as check:
                yield check
            return
        self.path.mkdir(parents=True, exist_ok=True)

        def on_busy() -> None:
            if not wait:
                raise StoreError(f"another process is writing to {self.path}", hint="wait for it, or choose another --out")

        with lock_file(self.path / LOCK_FILE, on_busy, StoreError):
            yield lambda: None


def read_tags(dataset: Path) -> dict[str, str]:
    """Return the version that each tag of a dataset folder names. Raise StoreError if the file holds anything else."""
    file = dataset / "versions" / "tags.json"
    if not file.exists():
        return {}
    try:
        tags = read_json(file)["tags"]
    except (ValueError, LookupError, TypeError, RecursionError, UnsafeFileError):
        tags = None
    if not isinstance(tags, dict) or not all(is_tag(tag) and VERSION_NAME.fullmatch(str(name)) for tag, name in tags.items()):
        raise StoreError(f"{file} holds other things than tags", hint="remove it, and tag the versions again")
    return tags


def write_tags(dataset: Path, tags: dict[str, str]) -> None:
    """Write the tags of a dataset folder, in the order of their names."""
    write_json(dataset / "versions" / "tags.json", {"tags": dict(sorted(tags.items()))})


def is_tag(name: str) -> bool:
    """Return whether this may be a tag: it is not taken for a version or a path."""
    return bool(TAG_NAME.fullmatch(name)) and not VERSION_NAME.fullmatch(name)


def require_tag_name(tag: str) -> None:
    """Raise ConfigError if this cannot be a tag."""
    if not is_tag(tag):
        hint = "a letter first, then letters, digits, dots, hyphens and underscores, 64 in all, and not like v1.0.0"
        raise ConfigError(f"{tag!r} cannot be a tag", hint=hint)


def require_nameable(path: Path) -> None:
    """Raise ConfigError for a path that is no UTF-8, at which Parquet files can neither be written nor read."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ConfigError(f"the name of the folder {shown} is no UTF-8", hint="rename it") from None


def open_dataset(path: Path | None, version: str | None = None, *, previews: bool = True) -> Version:
    """Open a version of a dataset or version folder, or of the one made last. Raise StoreError if there is none.

    FOLDER@VERSION names a version too, or a tag; for `previews`, see `DatasetDir.version`.
    """
    path, version = (path or last_made(), version) if version else split_version(path or last_made())
    require_nameable(path)
    if (path / MANIFEST).exists():
        opened = read_version(path)
        if version not in (None, opened.name):
            raise StoreError(f"{path} is {opened.name}, not {version}", hint="name the dataset folder instead")
        return opened
    if not is_remote(path) and not path.is_dir():
        raise StoreError(f"no dataset at {path}", hint="`synth generate --source scenes` makes one")
    return DatasetDir(path).version(version, previews=previews)


def split_version(path: Path) -> tuple[Path, str | None]:
    """Return the folder and the name of DIR@VERSION, or DIR@TAG; the path and None if it is something else."""
    folder, _, name = path.name.rpartition("@")
    if not folder or not name or path.exists():
        return path, None
    return path.parent / folder, name


def find_dataset(path: Path) -> Path:
    """Return the dataset folder that a path names: the folder itself, or that of a version, also as DIR@VERSION."""
    folder, _ = split_version(path)
    is_version = not is_remote(folder) and (folder / MANIFEST).exists()
    return dataset_dir_of(folder.absolute()) if is_version else folder


def last_made() -> Path:
    """Return the dataset folder whose newest version was written last, of those under `data/` and those made elsewhere.

    Raises StoreError if there is none.
    """
    manifests = _made_manifests()
    if not manifests:
        raise StoreError(f"no dataset under {DATA}/", hint="make one: `synth generate --source scenes`, or name its folder")
    return max(manifests, key=lambda path: path.stat().st_mtime_ns).parents[2]


def only_made() -> Path:
    """Return the dataset folder that was made here, under `data/` or elsewhere. Raise StoreError if there are several, or none.

    For what cannot be taken back: which was written last is said by a clock, and by whoever touches a file.
    """
    folders = sorted({path.parents[2] for path in _made_manifests()})
    if len(folders) > 1:
        raise StoreError(
            f"there are {len(folders)} datasets that were made here, in {DATA}/ or with --out",
            hint=f"name one: {', '.join(map(str, folders[:8]))}",
        )
    return folders[0] if folders else last_made()


def remember_dataset(out: Path | None) -> None:
    """Write down, in `data/`, which folder a run was told to write to: commands that are told none find it there.

    Where that cannot be written, or the folder is remote, nothing is kept.
    """
    if out is None or is_remote(out):
        return
    try:
        if (path := out.resolve()).parent == DATA.resolve():
            return
        others = [other for other in _remembered() if other != path]
        write_json(DATA / ELSEWHERE, {"datasets": list(map(str, [path, *others[: MAX_REMEMBERED - 1]]))})
    except OSError as error:
        log.info("%s is not remembered: %s", out, error)


def _remembered() -> list[Path]:
    """Return the dataset folders outside `data/`, the last one first; none if the file of them is not ours."""
    try:
        return list(map(Path, read_json(DATA / ELSEWHERE)["datasets"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UnsafeFileError):
        return []


def _made_manifests() -> list[Path]:
    manifests: list[Path] = []
    for folder in [*DATA.glob("*"), *_remembered()]:
        with suppress(OSError):  # a name that no folder can have
            manifests += folder.glob(f"versions/v*/{MANIFEST}")
    return sorted(manifests)


def read_samples(shard: DatasetDir, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the samples that the read step kept (tables.LISTED_SAMPLE), or some of their columns."""
    names = LISTED_SAMPLE.names if columns is None else columns
    for batch in open_table(shard.step_file("read")).iter_batches(LISTED_ROWS, columns=names):
        yield batch.select(names)


def sample_batches(shard: DatasetDir) -> Iterator[SampleBatch]:
    """Yield all samples with their images, a batch at a time."""
    store = ImageStore(shard.path)

    def read_images(ids: list[str]) -> list[tuple[bytes, ...]]:
        return list(map(tuple, store.read(ids).to_pylist()))

    for batch in open_table(shard.step_file("read")).iter_batches(BATCH_SAMPLES, columns=["sample_id"]):
        ids = batch["sample_id"].to_pylist()
        yield SampleBatch(ids, partial(read_images, ids))


def page_counts(shard: DatasetDir) -> Iterator[int]:
    """Yield the number of images of each sample."""
    for batch in read_samples(shard, [NUM_PAGES]):
        yield from batch[NUM_PAGES].to_pylist()


def read_exclusions(dataset: DatasetDir) -> pa.Table:
    """Return the images and texts that must not be learned from (tables.EXCLUSIONS)."""
    return read_table(require_file(dataset.step_file("read", "exclusions")))


def require_file(path: Path) -> Path:
    """Return the path of an existing file. Raises ConfigError if it is missing."""
    if not path.exists():
        raise ConfigError(f"{path} is missing", hint="run `synth generate` again: it makes the file")
    return path
