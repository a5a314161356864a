"""Push a version or a model to the Hugging Face Hub in one commit, with a tag that never moves.

Readers see either the old version or the new one, never a mixture. Every attempt first reads the state of
the repository, and resumes an interrupted attempt.
"""

import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id  # type: ignore[attr-defined]

from pipeline.dataset.version import REJECTIONS_FILE, parse_version
from pipeline.digests import file_digest
from pipeline.errors import ConfigError, PushError
from pipeline.hub.package import Package
from pipeline.hub_errors import translate_hub_errors
from pipeline.progress import NullProgress, Progress

PAUSES_S = (0.5, 1, 2, 4, 8)  # between attempts
MAX_PAUSE_S = 330.0  # the Hub's rate limits apply to windows of five minutes
RETRIED_STATUSES = (408, 409, 412, 429, 500, 502, 503, 504)
# Manifest keys whose values the user states about the data.
STATED_KEYS = ("license", "license_link", "title", "language", "acknowledged")
# The Hub may add these files to a new repository.
NEW_REPO_FILES = (".gitattributes", "README.md")
_TAG_HINT = "tags never move: make a new version, or push to another repository"


@dataclass(frozen=True, slots=True)
class PushResult:
    """A package on the Hub. `is_new` is False if the tag already existed."""

    repo: str
    url: str
    commit: str
    tag: str
    is_new: bool
    is_private: bool
    warning: str = ""


def check_repo_name(repo: str) -> None:
    """Raise PushError if the name of a repository is invalid."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        hint = f"use ORG/NAME ({error})"
        if "://" in repo:
            hint = f"use {'/'.join(repo.rstrip('/').split('/')[-2:])}"
        raise PushError(f"not a repository name: {repo}", hint=hint) from None


def push_package(
    package: Package, repo: str, *, private: bool = False, progress: Progress | None = None
) -> PushResult:
    """Push a package and tag its commit. Raises PushError if the Hub refuses or the tag has other content."""
    check_repo_name(repo)
    # Limit the memory that an upload needs: Xet uploads one block of 64 MB while it fills the next.
    os.environ.setdefault("HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY", "1")
    os.environ.setdefault("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "1")
    os.environ.setdefault("HF_XET_DATA_INGESTION_BLOCK_SIZE", "1mb")
    api = HfApi()

    def attempt() -> PushResult:
        try:
            return _push(api, package, repo, private=private, progress=progress or NullProgress())
        except RuntimeError as error:
            # LFS uploads wrap the error of the request in a RuntimeError.
            raise (error.__cause__ or error) from None

    with translate_hub_errors(repo, package.kind, PushError, "check the network, then push again"):
        for pause_s in PAUSES_S:
            try:
                return attempt()
            except (HfHubHTTPError, ConnectionError, TimeoutError, httpx2.TransportError) as error:
                response = error.response if isinstance(error, HfHubHTTPError) else None
                status = response.status_code if response else 0
                # After a ConnectError, do not retry: no server is listening.
                if status not in (0, *RETRIED_STATUSES) or isinstance(error, httpx2.ConnectError):
                    raise
                limit = parse_ratelimit_headers(response.headers) if response else None
                time.sleep(min(limit.reset_in_seconds + 1, MAX_PAUSE_S) if limit else pause_s)
        return attempt()


def _push(api: HfApi, package: Package, repo: str, *, private: bool, progress: Progress) -> PushResult:
    created = api.create_repo(repo, repo_type=package.kind, private=private, exist_ok=True)
    repo, name = created.repo_id, package.name
    is_private = bool(api.repo_info(repo, repo_type=package.kind).private)
    if private and not is_private:
        hint = "make it private in its settings, choose another name, or pass --public to publish the images"
        raise PushError(f"{repo} exists and is public", hint=hint)
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo, repo_type=package.kind).tags}
    is_new = name not in tags
    commit = _commit(api, package, repo, progress) if is_new else tags[name]
    remote = _verify(api, package, repo, commit)
    if is_new:
        message = f"digest {package.manifest['digest']}"
        api.create_tag(repo, repo_type=package.kind, tag=name, revision=commit, tag_message=message)
    changed = "" if is_new else ", ".join(_changed_statements(package, remote))
    warning = f"the published {name} has a different {changed}: {_TAG_HINT}" if changed else ""
    return PushResult(repo, str(created), commit, name, is_new, is_private, warning)


def _changed_statements(package: Package, remote: dict[str, Any]) -> list[str]:
    """Return the STATED_KEYS whose values in the package differ from those in a manifest on the Hub."""
    return [key for key in STATED_KEYS if package.manifest.get(key, remote.get(key)) != remote.get(key)]


def _commit(api: HfApi, package: Package, repo: str, progress: Progress) -> str:
    """Upload large files, and commit on top of the current head. Return the commit id."""
    head = str(api.repo_info(repo, repo_type=package.kind).sha)
    remote = _remote_manifest(api, package, repo, head)
    files = set(api.list_repo_files(repo, repo_type=package.kind, revision=head))
    if remote and remote["version"] == package.name:
        _require_same(package, remote, repo)
        # The tag is missing because an earlier push was interrupted between its commit and its tag.
        if not _changed_statements(package, remote):
            return head
    is_dataset = package.kind == "dataset"
    if remote and is_dataset and parse_version(remote["version"]) > parse_version(package.name):
        hint = "push the newest version, or push to another repository"
        problem = f"{repo} already has {remote['version']}, which is newer than {package.name}"
        raise PushError(problem, hint=hint)
    if not remote and files - {*NEW_REPO_FILES}:
        hint = "push to a new or an empty repository"
        raise PushError(f"{repo} has files that synth did not push", hint=hint)
    # Create new operations for each attempt, because an operation stores whether its file was unchanged on
    # the branch.
    additions = [CommitOperationAdd(path, content) for path, content in package.files.items()]
    large = [addition for addition in additions if isinstance(addition.path_or_fileobj, str)]
    for done, addition in enumerate(large):
        progress("push", done, len(large))
        api.preupload_lfs_files(repo, [addition], repo_type=package.kind, free_memory=False)
    progress("push", len(large), len(large))
    stale = [path for path in remote.get("files", ()) if path in files and path not in package.files]
    commit = api.create_commit(
        repo,
        [*additions, *map(CommitOperationDelete, stale)],
        repo_type=package.kind,
        commit_message=package.title,
        commit_description=f"digest {package.manifest['digest']}",
        parent_commit=head,
    )
    return str(commit.oid)


def _require_same(package: Package, remote: dict[str, Any], repo: str) -> None:
    name = package.name
    if remote.get("digest") != package.manifest["digest"]:
        raise PushError(f"{repo} already has a different {name}", hint=_TAG_HINT)
    if remote.get("pixels") != package.manifest.get("pixels"):
        images = "without its images" if remote.get("pixels") else "with its images"
        raise PushError(f"{repo} already has {name} {images}", hint=_TAG_HINT)


def _remote_manifest(api: HfApi, package: Package, repo: str, revision: str) -> dict[str, Any]:
    """Return the manifest at a revision, or {} if synth wrote no manifest there."""
    if not api.file_exists(repo, "manifest.json", repo_type=package.kind, revision=revision):
        return {}
    path = hf_hub_download(repo, "manifest.json", repo_type=package.kind, revision=revision)
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        is_ours = isinstance(manifest["digest"], str) and isinstance(manifest["files"], dict)
        if package.kind == "dataset":
            parse_version(manifest["version"])
    except (ValueError, KeyError, TypeError, ConfigError):
        return {}
    return manifest if is_ours and "version" in manifest else {}


def _verify(api: HfApi, package: Package, repo: str, commit: str) -> dict[str, Any]:
    """Return the manifest on the Hub. Raises PushError if a file there does not match the manifest."""
    manifest = _remote_manifest(api, package, repo, commit)
    _require_same(package, manifest, repo)
    rejections = {REJECTIONS_FILE: manifest["rejections"]} if "rejections" in manifest else {}
    expected = {name: file["sha256"] for name, file in (manifest["files"] | rejections).items()}
    actual: dict[str, str] = {}
    for entry in api.get_paths_info(repo, list(expected), repo_type=package.kind, revision=commit):
        if isinstance(entry, RepoFile):
            fetch = partial(hf_hub_download, repo, entry.path, repo_type=package.kind, revision=commit)
            actual[entry.path] = entry.lfs.sha256 if entry.lfs else file_digest(Path(fetch()))
    if damaged := sorted(name for name, sha256 in expected.items() if actual.get(name) != sha256):
        problem = f"{package.name} in {repo} is damaged: {', '.join(damaged)} does not match its manifest"
        raise PushError(problem, hint="tags never move: push to a new repository")
    return manifest
