"""The Python interface of `pipeline`, for notebooks and schedulers: generate, load, push and export a dataset."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import missing_error
from pipeline.dataset.manifest import describe_data
from pipeline.dataset.pixels import find_joined, lacks_pixels
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError
from pipeline.formats.export import Exported, export_version
from pipeline.hub.package import build_package
from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
from pipeline.hub.push import PushResult, check_repo_name, push_package
from pipeline.install import extra_of
from pipeline.progress import Progress
from pipeline.run import RunResult, generate_dataset
from pipeline.storage.files import translate_disk_errors
from pipeline.storage.object_store import parse_dataset_path
from pipeline.tables import SPLITS

if TYPE_CHECKING:
    from datasets import DatasetDict

ROWS_AT_ONCE = 64  # with their images


def generate(
    source: str | None = None,
    *,
    out: str | Path | None = None,
    config: Config | str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RunResult:
    """Turn the images of a source into a version of a dataset, as `synth generate` does.

    The same call goes on with what is done: no reply is asked for twice.

    Args:
        source: where the images come from, such as "folder:photos" or "hub:ORG/NAME".
        out: the dataset folder; default `data/SOURCE`.
        config: settings, or a file of settings (synth.yaml).
        progress: receives progress, messages and warnings; default: nobody.
        settings: settings by their keys, which override those of `config`; a section is a dictionary, as in
            `generate={"max_attempts": 2}`. docs/settings.md lists all.

    Returns:
        The version, whether it is new, the counts of requests, and how many rows each step kept and rejected.

    Raises:
        SynthError: a setting is wrong, the source or the server cannot be used, or no row is left. Its `hint` says what to do.
    """
    given = settings | ({"source": source} if source is not None else {})
    if isinstance(config, Config):
        resolved = resolve(**config.model_dump(exclude_unset=True) | given)
    else:
        resolved = resolve(None if config is None else Path(config), **given)
    return generate_dataset(resolved, _folder(out), progress)


def load(name: str | Path) -> "DatasetDict":
    """Return a version with its splits, columns and images.

    `name` is DIR, DIR@VERSION or DIR@TAG, here or in an object store, or ORG/NAME@VERSION of the Hub. Images are of the feature
    Image, and pages of List(Image). `datasets` writes the rows to its cache (HF_HOME) once, and maps them into memory. Raise
    StoreError if there is no such version, or if an image is missing or damaged; ConfigError without the package `datasets`.
    """
    try:
        from datasets import DatasetDict
    except ImportError:
        raise ConfigError("pipeline.load needs the package datasets", hint=extra_of("datasets")) from None
    version = _open(str(name))
    if lacks_pixels(version) and (joined := find_joined(version)):
        version = joined
    if not version.holds_pixels:
        ids = (name for _, batch in version.batches(["sample_id"]) for name in batch["sample_id"].to_pylist())
        if missing := version.store.find_missing(ids):
            raise missing_error(missing, version.store.folder)
    return DatasetDict({split: _split_of(version, split) for split in SPLITS if version.shards(split)})


def push(
    version: Version | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    images: bool | None = None,
    license: str | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Push a version to the Hugging Face Hub in one commit, with a tag that never moves, as `synth push` does.

    Args:
        version: a version, such as that of `generate`, or DIR, DIR@VERSION.
        repo: the repository, ORG/NAME; it is made if there is none.
        private: whether a new repository is private; None: if the license of the images is not known.
        images: whether images are pushed; None: if their license allows it.
        license: of the images, by the Hub's name, where the source did not state it.

    Raises:
        SynthError: the version is damaged, the Hub refuses it, or the tag names other rows there.
    """
    check_repo_name(repo)
    version = version if isinstance(version, Version) else _open(str(version))
    stated = describe_data(license, None, None)
    with build_package(version, repo, images=images, stated=stated) as package:
        is_private = package.has_unknown_license if private is None else private
        pushed = push_package(package, repo, private=is_private, progress=progress)
    with translate_disk_errors(version.dataset_dir):
        DatasetDir(version.dataset_dir).record_push(version.name, pushed.repo, pushed.commit)
    return pushed


def export(
    version: Version | str | Path,
    format: str,  # noqa: A002  # the name of the option
    out: str | Path,
    *,
    style: str | None = None,
    splits: Iterable[str] = SPLITS,
    progress: Progress | None = None,
) -> Exported:
    """Write a version to a new folder in the format of another tool, as `synth export` does.

    Args:
        version: a version, such as that of `generate`, or DIR, DIR@VERSION, ORG/NAME@VERSION.
        format: "parquet" for self-contained files, or one of those that `synth export --help` lists.
        style: the captions that are wanted, where a format takes one of each image.

    Raises:
        SynthError: the format is unknown, the folder exists, the version has no images, or nothing in it fits the format.
    """
    version = version if isinstance(version, Version) else _open(str(version))
    return export_version(version, format, Path(out), style=style, splits=splits, progress=progress)


def _folder(out: str | Path | None) -> Path | None:
    return None if out is None else parse_dataset_path(str(out))


def _open(name: str) -> Version:
    return pull_version(name) if is_hub_name(name) else open_or_download(parse_dataset_path(name), previews=False)


def _split_of(version: Version, split: str) -> Any:
    """Return the rows of a split, which `datasets` caches by the manifest."""
    from datasets import Dataset, Features

    described = version.manifest["features"]
    features = Features.from_dict({name: described[name] for name in version.manifest["columns"]})
    source = {"path": str(version.path), "manifest": version.manifest, "repo": version.repo}
    return Dataset.from_generator(_rows, features=features, gen_kwargs={**source, "of_split": split}, split=split)


def _rows(path: str, manifest: dict[str, Any], repo: str | None, of_split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. The arguments name the cached rows."""
    version = Version(Path(path), manifest, repo)
    columns = version.manifest["columns"]
    for _, batch in version.batches(columns, ROWS_AT_ONCE, [of_split]):
        yield from batch.select(columns).to_pylist()
