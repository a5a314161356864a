"""The Python API of `pipeline`: generate, load, push and export a dataset."""

import asyncio
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import missing_error
from pipeline.dataset.manifest import describe_data
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError
from pipeline.formats.export import Exported, export_version
from pipeline.hub.package import build_package
from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
from pipeline.hub.push import PushResult, check_repo_name, push_package
from pipeline.progress import Progress
from pipeline.run import RunResult, generate_dataset
from pipeline.sources.join import find_joined
from pipeline.storage.files import translate_disk_errors
from pipeline.storage.object_store import parse_dataset_path, parse_local_path
from pipeline.tables import SPLITS

if TYPE_CHECKING:
    from datasets import DatasetDict


def generate(
    source: str | None = None,
    *,
    out: str | Path | None = None,
    config: Config | str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> RunResult:
    """Turn images into a version of a dataset, like `synth generate`.

    To resume a stopped run, repeat the call. Answered requests are not sent again. In a notebook, restart the
    kernel to stop a run.

    Args:
        source: where the images come from, such as "folder:photos" or "hub:ORG/NAME".
        out: the dataset folder, by default `data/SOURCE`.
        config: settings, or the path of a settings file (synth.yaml).
        progress: receives progress updates, messages and warnings.
        settings: settings by name, which override those in `config`. A section is a dictionary, as in
            `generate={"max_attempts": 2}`. docs/settings.md lists all settings.

    Returns:
        The version, whether it is new, request counts, and how many rows each step kept and rejected.

    Raises:
        SynthError: a setting is invalid, the source or the server fails, or no row is left.
    """
    overrides = settings if source is None else settings | {"source": source}
    if isinstance(config, Config):
        resolved = resolve(**config.model_dump(exclude_unset=True) | overrides)
    else:
        resolved = resolve(None if config is None else Path(config), **overrides)
    folder = None if out is None else parse_dataset_path(str(out))
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        is_notebook = False
    else:
        is_notebook = True
    # A notebook runs an event loop in this thread, and a run needs its own.
    with ThreadPoolExecutor(1) if is_notebook else nullcontext() as pool:
        run = partial(generate_dataset, resolved, folder, progress)
        return pool.submit(run).result() if pool else run()


def load(name: str | Path) -> "DatasetDict":
    """Return a version as a DatasetDict with its splits, columns and decoded images.

    The column `image` has the feature Image, and the column `pages` has List(Image). `datasets` caches the
    rows in HF_HOME.

    Args:
        name: DIR, DIR@VERSION or DIR@TAG, on disk or in an object store, or ORG/NAME@VERSION on the Hub.

    Raises:
        StoreError: the version does not exist, or an image is missing or damaged.
        ConfigError: the package `datasets` is not installed.
    """
    try:
        from datasets import DatasetDict
    except ImportError:
        raise ConfigError("pipeline.load needs the package datasets", hint="pip install datasets") from None
    version = _open(name)
    if version.lacks_pixels and (joined := find_joined(version)):
        version = joined
    if not version.holds_pixels and (missing := version.store.find_missing(version.sample_ids())):
        raise missing_error(missing, version.store.folder)
    return DatasetDict({split: _load_split(version, split) for split in SPLITS if version.shards(split)})


def push(
    version: Version | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    images: bool | None = None,
    license: str | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Push a version to the Hugging Face Hub in one commit with a fixed tag, like `synth push`.

    Args:
        version: a version, such as `result.version`, or its name: DIR or DIR@VERSION.
        repo: the repository, ORG/NAME. It is created if it does not exist.
        private: whether a new repository is private. Default: private if the image license is unknown.
        images: whether to push the images. By default they are pushed if their license allows it.
        license: the Hub identifier of the image license, if the source states no license.

    Raises:
        SynthError: the version is damaged, the Hub refuses it, or its tag exists on the Hub with other rows.
    """
    check_repo_name(repo)
    version = _open(version)
    stated = describe_data(license, None, None)
    with build_package(version, repo, images=images, stated=stated) as package:
        is_private = package.has_unknown_license if private is None else private
        pushed = push_package(package, repo, private=is_private, progress=progress)
    with translate_disk_errors(version.dataset_dir):
        DatasetDir(version.dataset_dir).record_push(version.name, pushed.repo, pushed.commit)
    return pushed


def export(
    version: Version | str | Path,
    format: str,  # noqa: A002
    out: str | Path,
    *,
    style: str | None = None,
    splits: Iterable[str] = SPLITS,
    progress: Progress | None = None,
) -> Exported:
    """Write a version in the format of another tool, like `synth export`. An equal export is kept.

    Args:
        version: a version, such as `result.version`, or its name: DIR, DIR@VERSION or ORG/NAME@VERSION.
        format: "parquet" for self-contained files, or a format that `synth export --help` lists.
        style: the caption style to write, if the format has one caption per image.

    Raises:
        SynthError: the format is unknown, the folder has other content, or no row fits the format.
    """
    folder = parse_local_path(str(out))
    with translate_disk_errors(folder):
        return export_version(_open(version), format, folder, style=style, splits=splits, progress=progress)


def _open(version: Version | str | Path) -> Version:
    if isinstance(version, Version):
        return version
    name = str(version)
    if is_hub_name(name):
        return pull_version(name)
    return open_or_download(parse_dataset_path(name), previews=False)


def _load_split(version: Version, split: str) -> Any:
    from datasets import Dataset, Features

    features = {name: version.manifest["features"][name] for name in version.manifest["columns"]}
    # `datasets` derives its cache key from these arguments.
    arguments = {"path": str(version.path), "manifest": version.manifest, "repo": version.repo}
    arguments["of_split"] = split
    types = Features.from_dict(features)
    return Dataset.from_generator(_rows, features=types, gen_kwargs=arguments, split=split)


def _rows(path: str, manifest: dict[str, Any], repo: str | None, of_split: str) -> Iterator[dict[str, Any]]:
    columns = manifest["columns"]
    for _, batch in Version(Path(path), manifest, repo).batches(columns, splits=[of_split]):
        yield from batch.select(columns).to_pylist()
