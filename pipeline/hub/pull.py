"""Open a version on the Hub or in an object store: download it once, and check it against its manifest."""

from functools import partial
from pathlib import Path

from pipeline.dataset.directory import DatasetDir, open_dataset, split_version
from pipeline.dataset.images import ImageStore
from pipeline.dataset.integrity import damaged_files, find_damage
from pipeline.dataset.publishing import publish
from pipeline.dataset.version import (
    CARD_FILE,
    MANIFEST,
    REJECTIONS_FILE,
    VERSION_NAME,
    Version,
    dataset_dir_of,
    dataset_folder,
    parse_version,
    read_version,
)
from pipeline.errors import StoreError, did_you_mean
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from pipeline.storage.files import scratch_folder, translate_disk_errors
from pipeline.storage.object_store import download, is_remote, translate_store_errors
from pipeline.tables import SPLITS

# The files of a version. Exports in other formats, which a repository may also have, are not downloaded.
DOWNLOAD_PATTERNS = [MANIFEST, CARD_FILE, REJECTIONS_FILE, *(f"{split}-*.parquet" for split in SPLITS)]


def is_hub_name(text: str) -> bool:
    """Return whether a string is ORG/NAME or ORG/NAME@VERSION, and not the path of a local dataset."""
    return bool(HUB_NAME.fullmatch(text)) and not split_version(Path(text))[0].exists()


def pull_version(name: str) -> Version:
    """Download ORG/NAME@VERSION into the Hub's cache if it is not there, and check every file.

    VERSION is a tag, a branch or a commit. The default is the newest tag, which needs a connection. Raises
    StoreError if the version does not exist, is damaged, or is neither reachable nor in the cache.
    """
    # Commands on local versions do not need this slow import.
    from huggingface_hub import errors, snapshot_download

    repo, _, requested = name.partition("@")
    offline = "check the network, then try again; a downloaded version opens offline as ORG/NAME@VERSION"
    offline = did_you_mean(repo, map(str, Path(repo).parent.glob("*/")), offline)
    with translate_hub_errors(name, "dataset", StoreError, offline, or_folder=True):
        revision = requested or next(reversed(_tags(repo)), None)
        if revision is None:
            hint = "pass a folder made by `synth generate`, or a commit on the Hub: ORG/NAME@COMMIT"
            raise StoreError(f"{repo} is not a local folder, and the Hub has no version of it", hint=hint)
        fetch = partial(snapshot_download, repo, repo_type="dataset", allow_patterns=DOWNLOAD_PATTERNS)
        try:
            folder = Path(fetch(revision=revision))
            try:
                version = read_version(folder)
            except StoreError:  # the cached manifest may be damaged
                fetch(revision=revision, allow_patterns=[MANIFEST], force_download=True)
                version = read_version(folder)
            if damage := find_damage(version):
                # Without force, a second download would reuse the damaged files in the cache.
                version = read_version(Path(fetch(revision=revision, force_download=True)))
                damage = find_damage(version)
        except errors.RevisionNotFoundError:
            hint = f"versions there: {', '.join(_tags(repo)) or 'none'}"
            raise StoreError(f"{repo} has no version {requested}", hint=hint) from None
    if damage:
        hint = "do not use the dataset: a second download was damaged too, so the copy on the Hub is damaged"
        raise StoreError(f"{name} is damaged: {damage[0]}", hint=hint)
    return Version(version.path, version.manifest, repo)


def open_or_download(path: Path | None, *, previews: bool = True) -> Version:
    """Open a local version as `open_dataset` does, or download a version from an object store once.

    Raises StoreError if the version does not exist or is damaged, or the store denies access.
    """
    if path is None or not is_remote(path):
        return open_dataset(path, previews=previews)
    with translate_store_errors(path):
        remote = open_dataset(path, previews=previews)
        home = DatasetDir(dataset_folder(str(dataset_dir_of(remote.path))))
        final = home.path / "versions" / remote.name
        with translate_disk_errors(home.path), home.lock(wait=True):
            if not final.exists():
                _download(remote, home, final)
        local = read_version(final)
    if local.manifest != remote.manifest:
        hint = f"move {home.path} away"
        raise StoreError(f"{final} exists, but differs from {remote.name} in {path}", hint=hint)
    return local


def _download(remote: Version, home: DatasetDir, final: Path) -> None:
    with scratch_folder(final.parent) as draft:
        for name in (*remote.manifest["files"], REJECTIONS_FILE, CARD_FILE, MANIFEST):
            download(remote.path / name, draft / name)
        local = Version(draft, remote.manifest)
        if not remote.holds_pixels and not damaged_files(local):
            ImageStore(home.path).add_from(remote.store, local.sample_ids())
        if damage := find_damage(local):
            hint = f"upload {remote.path} again; if that does not help, do not use the dataset"
            raise StoreError(f"{remote.path} is damaged: {damage[0]}", hint=hint)
        publish(draft, final)


def _tags(repo: str) -> list[str]:
    """Return the version tags on the Hub, oldest first."""
    from huggingface_hub import HfApi

    names = (ref.name for ref in HfApi().list_repo_refs(repo, repo_type="dataset").tags)
    return sorted(filter(VERSION_NAME.fullmatch, names), key=parse_version)
