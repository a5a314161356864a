"""Push a version or a model to the Hugging Face Hub in one commit, with a tag that never moves.

A reader of the Hub sees the old version or the new one, never a mixture. Every attempt first reads the state of the
repository, and continues from where an interrupted attempt stopped.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # which it does not list

from pipeline.dataset.version import CARD_FILE, REJECTIONS_FILE, parse_version
from pipeline.digests import file_digest
from pipeline.errors import ConfigError, PushError, one_line
from pipeline.hub.package import Package, exported_files
from pipeline.progress import NullProgress, Progress

MAX_ATTEMPTS = 6
MAX_PAUSE_SECONDS = 330.0  # the windows of the Hub's rate limits have five minutes
RETRIED = (408, 409, 412, 429, 500, 502, 503, 504)
STATED = ("license", "license_link", "title", "language", "acknowledged")  # of a manifest: what a user says of the data
NEW_REPO = (".gitattributes", "README.md")  # what the Hub may put into a new repository


@dataclass(frozen=True, slots=True)
class PushResult:
    """Where a package lies on the Hub. `is_new` is False if the tag existed before."""

    repo: str
    url: str
    commit: str
    tag: str
    is_new: bool
    is_private: bool
    warning: str = ""


class DamagedPushError(PushError):
    """Raised when a version on the Hub holds other bytes than its manifest says; `files` are those."""

    def __init__(self, repo: str, package: Package, files: list[str]) -> None:
        hint = "a tag never moves: push to a new repository"
        if package.kind == "dataset":
            hint = "a tag never moves: `synth push --repair` makes the next patch of the same rows, which names the damage"
        super().__init__(f"{package.name} in {repo} is damaged: {', '.join(files)} is not what its manifest says", hint=hint)
        self.files = files


def check_repo_name(repo: str) -> None:
    """Raise PushError if this is not a name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        hint = f"it looks like ORG/NAME ({error})"
        if "://" in repo:
            hint = f"without the address: {'/'.join(repo.rstrip('/').split('/')[-2:])}"
        raise PushError(f"not a repository name: {repo}", hint=hint) from None


def push_package(package: Package, repo: str, *, private: bool = False, progress: Progress | None = None) -> PushResult:
    """Push a package and tag its commit, once. Raise PushError if the Hub refuses, does not answer, or holds other content."""
    check_repo_name(repo)
    # By Xet, one block of 64 MB is uploaded while the next is filled: this bounds the memory of an upload.
    os.environ.setdefault("HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY", "1")
    os.environ.setdefault("HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "1")
    os.environ.setdefault("HF_XET_DATA_INGESTION_BLOCK_SIZE", "1mb")
    api = HfApi()
    try:
        return _retry(lambda: _push(api, package, repo, private=private, progress=progress or NullProgress()))
    except LocalTokenNotFoundError:
        raise PushError("no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise _explain(error, repo) from None
    except RuntimeError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _explain(error.__cause__, repo) from None
        if not isinstance(error.__cause__, OSError | httpx2.TransportError):
            raise
        raise _unreachable(api, error.__cause__) from None
    except (ConnectionError, TimeoutError, httpx2.TransportError) as error:
        raise _unreachable(api, error) from None
    except OSError as error:
        raise PushError(f"cannot read or keep a file: {error}", hint="check the disk, then push again") from None


def _retry(attempt: Callable[[], PushResult]) -> PushResult:
    """Retry while the Hub is busy, another push came first, or a connection broke; MAX_ATTEMPTS attempts in all."""
    for tried in range(1, MAX_ATTEMPTS):
        try:
            return attempt()
        except (HfHubHTTPError, OSError, RuntimeError, httpx2.TransportError) as error:
            if not _is_transient(error):
                raise
            time.sleep(_pause_seconds(error, tried))
    return attempt()


def _is_transient(error: BaseException) -> bool:
    """Return whether an error is transient; an upload by LFS wraps the cause in a RuntimeError."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED
    if isinstance(error, RuntimeError):
        return error.__cause__ is not None and _is_transient(error.__cause__)
    broken = isinstance(error, ConnectionError | TimeoutError | httpx2.TransportError)
    return broken and not isinstance(error, httpx2.ConnectError)  # no server listens there


def _push(api: HfApi, package: Package, repo: str, *, private: bool, progress: Progress) -> PushResult:
    sdk = "gradio" if package.kind == "space" else None
    created = api.create_repo(repo, repo_type=package.kind, private=private, exist_ok=True, space_sdk=sdk)
    repo, name = created.repo_id, package.name
    is_private = bool(api.repo_info(repo, repo_type=package.kind).private)
    if private and not is_private:
        hint = "make it private in its settings, choose another name, or pass --public if everyone may see the images"
        raise PushError(f"{repo} exists and is public", hint=hint)
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo, repo_type=package.kind).tags}
    is_new = name not in tags
    commit, warning = _commit(api, package, repo, tags, progress) if is_new else (tags[name], "")
    remote = _verify(api, package, repo, commit)
    if is_new:
        message = f"digest {package.manifest['digest']}"
        api.create_tag(repo, repo_type=package.kind, tag=name, revision=commit, tag_message=message)
    else:
        warning = _stated_otherwise(package, remote)
    return PushResult(repo, str(created), commit, name, is_new, is_private, warning)


def _stated_otherwise(package: Package, remote: dict[str, Any]) -> str:
    """Return a warning if the Hub has this version with other statements about its data than this push makes."""
    names = [name for name in STATED if name in package.manifest and package.manifest[name] != remote.get(name)]
    changes = ", ".join(f"{name} {remote.get(name) or 'not stated'}, now {package.manifest[name]}" for name in names)
    if not changes or package.kind != "dataset":
        return ""
    hint = "A tag never moves: push a new version, or to another repository"
    return f"{package.name} lies there with other statements ({changes}). {hint}"


def _edited_card(api: HfApi, package: Package, repo: str, head: str, earlier: str | None) -> str:
    """Return a warning if the card at the head is another than that of the `earlier` version, as `push` made it."""
    if earlier is None:
        return ""
    revisions = (head, earlier)
    entries = [api.get_paths_info(repo, CARD_FILE, repo_type=package.kind, revision=revision) for revision in revisions]
    now, before = ([entry.blob_id for entry in of_one if isinstance(entry, RepoFile)] for of_one in entries)
    if not now or now == before:
        return ""
    return f"the card of {repo} was edited on the Hub, and is replaced: its {CARD_FILE} at the revision {head} holds the edits"


def _commit(api: HfApi, package: Package, repo: str, tags: dict[str, str], progress: Progress) -> tuple[str, str]:
    """Upload large files, then make one commit on top of the head that was read; return its id, and a warning or nothing."""
    manifest, name = package.manifest, package.name
    head = str(api.repo_info(repo, repo_type=package.kind).sha)
    remote = _remote_manifest(api, package, repo, head)
    files = set(api.list_repo_files(repo, repo_type=package.kind, revision=head))
    if remote and remote["version"] == name:
        _require_same(package, remote, repo)
        if not _stated_otherwise(package, remote):
            return head, ""  # an earlier push was cut off between its commit and its tag
    if remote and package.kind == "dataset" and parse_version(remote["version"]) > parse_version(name):
        hint = "push the newest version, or an older one to a repository of its own"
        raise PushError(f"{repo} already holds {remote['version']}, which is newer than {name}", hint=hint)
    if not remote and files - {*NEW_REPO}:
        raise PushError(f"{repo} holds data that is not ours", hint="push to a new or an empty repository")
    warning = _edited_card(api, package, repo, head, tags.get(remote.get("version", "")))
    # Created anew in each attempt: an operation remembers the branch's files at its upload, and would be dropped from the
    # commit as unchanged even if the file has changed since.
    additions = [CommitOperationAdd(path, content) for path, content in package.files.items()]
    large = [addition for addition in additions if isinstance(addition.path_or_fileobj, str)]
    for done, addition in enumerate(large):
        progress("push", done, len(large))
        api.preupload_lfs_files(repo, [addition], repo_type=package.kind, free_memory=False)
    progress("push", len(large), len(large))
    known = [*remote.get("files", ()), *exported_files(remote)]
    stale = [path for path in known if path in files and path not in package.files]
    commit = api.create_commit(
        repo,
        [*additions, *map(CommitOperationDelete, stale)],
        repo_type=package.kind,
        commit_message=package.title,
        commit_description=f"digest {manifest['digest']}",
        parent_commit=head,
    )
    return str(commit.oid), warning


def _require_same(package: Package, remote: dict[str, Any], repo: str) -> None:
    """Raise PushError if the Hub has other content under the name of this version."""
    name = package.name
    if remote.get("digest") != package.manifest["digest"]:
        hint = "a tag never moves: make a new version, or push to another repository"
        raise PushError(f"{repo} already has another {name}", hint=hint)
    if missing := sorted({*package.manifest.get("exports", {})} - {*remote.get("exports", {})}):
        hint = "a tag never moves: make a new version, or push to another repository"
        raise PushError(f"{repo} already has {name} without {', '.join(missing)}", hint=hint)
    if remote.get("pixels") != package.manifest.get("pixels"):
        which = "without its images" if remote.get("pixels") else "with its images"
        raise PushError(f"{repo} already has {name} {which}", hint="a tag never moves: push to another repository")


def _remote_manifest(api: HfApi, package: Package, repo: str, revision: str) -> dict[str, Any]:
    """Return the manifest at a revision; empty if there is none, or another tool wrote it."""
    if not api.file_exists(repo, "manifest.json", repo_type=package.kind, revision=revision):
        return {}
    path = hf_hub_download(repo, "manifest.json", repo_type=package.kind, revision=revision)
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        is_manifest = isinstance(manifest["digest"], str) and isinstance(manifest["files"], dict) and "version" in manifest
        if package.kind == "dataset":
            parse_version(manifest["version"])
    except (ValueError, KeyError, TypeError, ConfigError):
        return {}  # another tool's file of the same name
    return manifest if is_manifest else {}


def _verify(api: HfApi, package: Package, repo: str, commit: str) -> dict[str, Any]:
    """Compare the checksums of the files on the Hub with their manifest, and return it. Raises PushError if they differ."""
    manifest = _remote_manifest(api, package, repo, commit)
    _require_same(package, manifest, repo)
    files = (
        manifest["files"]
        | ({REJECTIONS_FILE: manifest["rejections"]} if "rejections" in manifest else {})
        | exported_files(manifest)
    )
    expected = {name: file["sha256"] for name, file in files.items()}
    actual: dict[str, str] = {}
    for entry in api.get_paths_info(repo, list(expected), repo_type=package.kind, revision=commit):
        if isinstance(entry, RepoFile):
            fetch = partial(hf_hub_download, repo, entry.path, repo_type=package.kind, revision=commit)
            actual[entry.path] = entry.lfs.sha256 if entry.lfs else file_digest(Path(fetch()))
    wrong = sorted(name for name, sha256 in expected.items() if actual.get(name) != sha256)
    if wrong:
        raise DamagedPushError(repo, package, wrong)
    return manifest


def _pause_seconds(error: Exception, tried: int) -> float:
    # The ratelimit header of a 429 holds the seconds until the window ends, as t: "api";r=0;t=1
    reset = error.response.headers.get("ratelimit", "").rpartition("t=")[2] if isinstance(error, HfHubHTTPError) else ""
    if re.fullmatch("[0-9]{1,9}", reset):
        return min(float(reset) + 1, MAX_PAUSE_SECONDS)
    return min(2.0 ** (tried - 2), 8.0)


def _unreachable(api: HfApi, error: BaseException) -> PushError:
    return PushError(f"cannot reach the Hub at {api.endpoint}: {error}", hint="check the network, then push again")


def _explain(error: HfHubHTTPError, repo: str) -> PushError:
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PushError("the Hub does not accept the token", hint="log in with `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return PushError(f"the token may not write to {repo}", hint="use a token with write access to that account")
    if status in (401, 404):
        return PushError(f"no repository {repo}, or no access to it", hint="check the name, and that the token may see it")
    message = error.server_message or one_line(error)
    return PushError(f"the Hub refused ({status}): {message}", hint="push again; what was uploaded is not sent twice")
