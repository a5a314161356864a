"""Download a version from the Hub or an object store once, check it against its manifest, and open it."""

from functools import partial
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, errors, scan_cache_dir, snapshot_download

from pipeline.dataset.directory import DatasetDir, open_dataset, split_version
from pipeline.dataset.images import ImageStore
from pipeline.dataset.integrity import find_damage
from pipeline.dataset.publishing import publish
from pipeline.dataset.version import (
    CARD_FILE,
    IMAGES_FILE,
    MANIFEST,
    REJECTIONS_FILE,
    VERSION_NAME,
    Version,
    dataset_dir_of,
    dataset_folder,
    parse_version,
    read_version,
)
from pipeline.errors import StoreError
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from pipeline.storage.files import read_json, read_table, scratch_folder, translate_disk_errors, write_json
from pipeline.storage.object_store import download, is_remote, translate_store_errors
from pipeline.tables import SPLITS

DOWNLOAD_PATTERNS = [MANIFEST, CARD_FILE, REJECTIONS_FILE, *(f"{split}-*.parquet" for split in SPLITS)]  # no exports


def is_hub_name(text: str) -> bool:
    """Return whether a text names a dataset of the Hub, ORG/NAME or ORG/NAME@VERSION, and is not a local path."""
    return bool(HUB_NAME.fullmatch(text)) and not split_version(Path(text))[0].exists()


def pull_version(name: str) -> Version:
    """Download ORG/NAME@VERSION from the Hub into its cache, and check every file; a cached version needs no network.

    VERSION is a tag, a branch or a commit; without one, the newest tag. Raise StoreError if the version does not exist, is
    damaged, was not made by synth, or is not cached and the Hub does not answer.
    """
    if not (match := HUB_NAME.fullmatch(name)):
        raise StoreError(f"not a dataset of the Hub: {name}", hint="it looks like ORG/NAME@v1.0.0")
    repo, requested = match[1], match[2]
    offline = "check the network, then try again; what was fetched is kept"
    with translate_hub_errors(name, "dataset", StoreError, offline, or_folder=True):
        revision = requested or next(reversed(_tags(repo)), None)
        if revision is None:
            hint = "name a folder that `synth generate` has made, or a commit of the Hub: ORG/NAME@COMMIT"
            raise StoreError(f"{repo} is not a folder here, and no version of it is known", hint=hint)
        fetch = partial(snapshot_download, repo, repo_type="dataset", revision=revision, allow_patterns=DOWNLOAD_PATTERNS)
        try:
            folder = Path(fetch())
            damage = _damage_of(folder)
            if damage:  # its files are links to others in the cache, which would be linked again
                folder = Path(fetch(force_download=True))
                damage = _damage_of(folder)
        except errors.RevisionNotFoundError:
            versions = ", ".join(_tags(repo)) or "none"
            raise StoreError(f"{repo} has no version {requested}", hint=f"versions there: {versions}") from None
    if damage:
        raise StoreError(
            f"{name} is damaged: {damage}", hint="it was fetched anew, and is so on the Hub: do not use the dataset"
        )
    version = read_version(folder)
    return Version(version.path, version.manifest, repo)


def open_or_download(path: Path | None, version: str | None = None, *, previews: bool = True) -> Version:
    """Open a version in a local folder, as `open_dataset` does, or in an object store: that is downloaded once and checked.

    A download is kept in a dataset folder under `data/` that is named after its origin. Raise StoreError if the dataset or
    version does not exist, it is damaged, or the store refuses.
    """
    if path is None or not is_remote(path):
        return open_dataset(path, version, previews=previews)
    with translate_store_errors(path):
        remote = open_dataset(path, version, previews=previews)
        origin = str(dataset_dir_of(remote.path))
        home = DatasetDir(dataset_folder(origin))
        final = home.path / "versions" / remote.name
        with translate_disk_errors(home.path), home.lock(wait=True):
            _require_origin(origin, home)
            if not final.exists():
                with scratch_folder(final.parent) as draft:
                    for name in (*remote.manifest["files"], REJECTIONS_FILE, IMAGES_FILE, CARD_FILE, MANIFEST):
                        if name != IMAGES_FILE or remote.manifest.get("images"):
                            download(remote.path / name, draft / name)
                    if remote.manifest.get("images"):
                        ids = read_table(draft / IMAGES_FILE, ["sample_id"])["sample_id"].to_pylist()
                        ImageStore(home.path).add_from(remote.store, ids)
                    _check(Version(draft, remote.manifest), str(remote.path), f"compare {remote.path} with what was put there")
                    publish(draft, final)
        local = read_version(final)
    if local.manifest != remote.manifest:
        raise StoreError(f"{final} is another {remote.name} than the one in {path}", hint=f"move {home.path} away")
    return local


def _require_origin(origin: str, home: DatasetDir) -> None:
    """Raise StoreError if a folder holds versions of another origin: two origins may have the same folder name."""
    file = home.path / "origin.json"
    known = read_json(file)["origin"] if file.exists() else None
    if known not in (None, origin) or (known is None and home.versions()):
        raise StoreError(f"{home.path} holds versions from {known or 'here'}, not from {origin}", hint=f"move {home.path} away")
    if known is None:
        write_json(file, {"origin": origin})


def _tags(repo: str) -> list[str]:
    """Return the version tags of a dataset in order: those on the Hub, or if it does not answer those in the cache."""
    try:
        names = [ref.name for ref in HfApi().list_repo_refs(repo, repo_type="dataset").tags]
    except (errors.OfflineModeIsEnabled, httpx2.TransportError):
        if not Path(constants.HF_HUB_CACHE).is_dir():
            return []
        cached = [entry for entry in scan_cache_dir().repos if entry.repo_id == repo and entry.repo_type == "dataset"]
        names = [name for entry in cached for name in entry.refs]
    return sorted(filter(VERSION_NAME.fullmatch, names), key=parse_version)


def _damage_of(folder: Path) -> str:
    """Return what is wrong with the files of a version; "" if nothing is. Raise StoreError if it is none."""
    return next(iter(find_damage(read_version(folder))), "")


def _check(version: Version, name: str, hint: str) -> None:
    if damage := find_damage(version):
        raise StoreError(f"{name} is damaged: {damage[0]}", hint=f"{hint}; if that does not help, do not use the dataset")
