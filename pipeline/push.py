"""Stage: push. A version goes to the Hugging Face Hub in one commit, then gets a tag that never moves.

A reader of the Hub sees the old version or the new one, never a mixture; a push that was cut off can be run again.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from pipeline.errors import PushError
from pipeline.fingerprint import file_digest
from pipeline.licence import staying_home
from pipeline.store import Version, write_json, write_text
from pipeline.tables import PIXELS, ROW, features, with_features

TRIES = 5
RETRIED = (409, 412, 429, 500, 502, 503, 504)
EMPTY_REPO = (".gitattributes", "README.md")  # what the Hub may put into a new repository
LEFT_OUT = (
    "**The pixels are not here**: they may not be passed on, or were left out on request. "
    "`sample_id` is the sha256 of each image's file."
)
PLACEHOLDER = "ORG/NAME"  # in the card of a version, for the repository that it is pushed to


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a version lies on the Hub. `is_new` is False where it was there before."""

    repo: str
    url: str
    commit: str
    tag: str
    is_new: bool


def push_version(version: Version, repo: str, *, private: bool = False) -> Pushed:
    """Push a version and tag the commit with its name; the same version twice is pushed once.

    Pixels that may not be passed on are left out, whoever calls this; ids and texts go.

    Raises:
        PushError: no or a bad token, a name that is taken, a Hub that refuses or does not answer.
    """
    api = HfApi()
    try:
        with outgoing(version) as sent:
            return _push(api, sent, repo, private=private)
    except LocalTokenNotFoundError:
        raise PushError("no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise PushError(f"not a repository name: {repo}", hint=f"it looks like ORG/NAME ({error})") from None
    except HfHubHTTPError as error:
        raise _explain(error, repo) from None
    except (OSError, httpx2.TransportError) as error:
        raise PushError(f"cannot reach the Hub at {api.endpoint}: {error}", hint="check the network, then push again") from None


@contextmanager
def outgoing(version: Version, *, no_images: bool = False) -> Iterator[Version]:
    """Yield what leaves this machine: the version itself, or a copy of it without pixels that is removed afterwards."""
    manifest = version.manifest
    if not set(PIXELS) & set(manifest["columns"]) or not (no_images or staying_home(manifest["licences"])):
        yield version
        return
    planned_files(version)  # before anything is copied
    with tempfile.TemporaryDirectory() as folder:
        yield without_pixels(version, Path(folder))


def without_pixels(version: Version, folder: Path) -> Version:
    """Write a copy without pixels, shard by shard; `sample_id` says which image each row is about."""
    files = {}
    kept = [column for column in version.manifest["columns"] if column not in PIXELS]
    schema = with_features(pa.schema([ROW.field(column) for column in kept]))
    for name, about in version.manifest["files"].items():
        source = pq.ParquetFile(version.path / name)
        with pq.ParquetWriter(folder / name, schema, compression="zstd") as writer:
            for batch in source.iter_batches(batch_size=256, columns=kept):
                writer.write_table(pa.Table.from_batches([batch]).select(kept).cast(schema))
        size = (folder / name).stat().st_size
        files[name] = about | {"sha256": file_digest(folder / name), "bytes": size}
    manifest = version.manifest | {"columns": kept, "features": features(schema), "files": files, "pixels": "left out"}
    card = (version.path / "README.md").read_text(encoding="utf-8")
    write_text(folder / "README.md", card.replace("## Load it", f"{LEFT_OUT}\n\n## Load it", 1))
    write_json(folder / "manifest.json", manifest)
    return Version(folder, manifest)


def planned_files(version: Version) -> dict[str, int]:
    """Return what a push of this version sends, as path -> bytes."""
    names = [*sorted(version.manifest["files"]), "README.md", "manifest.json"]
    missing = [name for name in names if not (version.path / name).is_file()]
    if missing:
        raise PushError(f"{version.path} lacks {', '.join(missing)}", hint="a version never changes: generate it again")
    return {name: (version.path / name).stat().st_size for name in names}


def _push(api: HfApi, version: Version, repo: str, *, private: bool) -> Pushed:
    created = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
    repo = created.repo_id
    if private and not api.repo_info(repo, repo_type="dataset").private:
        raise PushError(f"{repo} exists and is public", hint="make it private in its settings, or choose another name")
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo, repo_type="dataset").tags}
    digest = version.manifest["digest"]
    if version.name in tags:
        if _remote_manifest(api, repo, tags[version.name]).get("digest") != digest:
            raise PushError(
                f"{repo} already has another {version.name}", hint="a tag never moves: make a new version, or push elsewhere"
            )
        _verify(api, version, repo, tags[version.name])
        return Pushed(repo, str(created), tags[version.name], version.name, is_new=False)
    commit = _commit(api, version, repo)
    _verify(api, version, repo, commit)
    api.create_tag(repo, repo_type="dataset", tag=version.name, revision=commit, tag_message=f"digest {digest}")
    return Pushed(repo, str(created), commit, version.name, is_new=True)


def _commit(api: HfApi, version: Version, repo: str) -> str:
    """Make the one commit; where somebody else was faster or the Hub is busy, look again and try again."""
    for attempt in range(1, TRIES + 1):
        try:
            head = str(api.repo_info(repo, repo_type="dataset").sha)
            remote = _remote_manifest(api, repo, head)
            if all(remote.get(key) == version.manifest[key] for key in ("digest", "version")):
                return head  # an earlier push was cut off between its commit and its tag
            if not remote and len(api.list_repo_files(repo, repo_type="dataset", revision=head)) > len(EMPTY_REPO):
                raise PushError(f"{repo} holds data that is not ours", hint="push to a new or an empty repository")
            made = api.create_commit(
                repo,
                _operations(api, version, repo, head),
                repo_type="dataset",
                commit_message=f"{version.name}: {sum(version.manifest['rows'].values())} images",
                commit_description=f"digest {version.manifest['digest']}",
                parent_commit=head,
            )
            return str(made.oid)
        except HfHubHTTPError as error:
            if attempt == TRIES or error.response.status_code not in RETRIED:
                raise
            time.sleep(_pause_seconds(error, attempt))
    raise AssertionError("the last attempt returns or raises")


def _operations(api: HfApi, version: Version, repo: str, head: str) -> list[Any]:
    ours = planned_files(version)
    card = (version.path / "README.md").read_text(encoding="utf-8").replace(PLACEHOLDER, repo)
    stale = [path for path in api.list_repo_files(repo, repo_type="dataset", revision=head) if path.endswith(".parquet")]
    return [
        *(CommitOperationAdd(name, str(version.path / name)) for name in ours if name != "README.md"),
        CommitOperationAdd("README.md", card.encode()),
        *(CommitOperationDelete(path) for path in stale if path not in ours),
    ]


def _remote_manifest(api: HfApi, repo: str, revision: str) -> dict[str, Any]:
    """Return the manifest at a revision; nothing where there is none of ours."""
    if not api.file_exists(repo, "manifest.json", repo_type="dataset", revision=revision):
        return {}
    path = hf_hub_download(repo, "manifest.json", repo_type="dataset", revision=revision)
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return {}  # somebody else's file of the same name
    return manifest if isinstance(manifest, dict) and "digest" in manifest else {}


def _verify(api: HfApi, version: Version, repo: str, commit: str) -> None:
    """Compare what lies on the Hub with the manifest, by checksum."""
    wanted = {name: str(file["sha256"]) for name, file in version.manifest["files"].items()}
    found: dict[str, str] = {}
    for entry in api.get_paths_info(repo, list(wanted), repo_type="dataset", revision=commit):
        if not isinstance(entry, RepoFile):
            continue
        if entry.lfs is not None:
            found[entry.path] = str(entry.lfs.sha256)
        elif entry.blob_id == _git_oid(version.path / entry.path):
            found[entry.path] = wanted[entry.path]
    wrong = sorted(name for name, sha256 in wanted.items() if found.get(name) != sha256)
    if wrong:
        raise PushError(f"{repo} holds other bytes than this version: {', '.join(wrong)}", hint="push again")


def _git_oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  # how git names content


def _pause_seconds(error: HfHubHTTPError, attempt: int) -> float:
    # 429 says in its ratelimit header how long the window lasts: "api";r=0;t=1
    told = error.response.headers.get("ratelimit", "").rpartition("t=")[2]
    return float(told) + 1 if told.isdigit() else min(2.0 ** (attempt - 2), 8.0)


def _explain(error: HfHubHTTPError, repo: str) -> PushError:
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PushError("the Hub does not accept the token", hint="log in with `hf auth login`, or set HF_TOKEN")
    if status == 403:
        return PushError(f"the token may not write to {repo}", hint="use a token with write access to that account")
    if status in (401, 404):
        return PushError(f"no repository {repo}, or no access to it", hint="check the name, and that the token may see it")
    message = error.server_message or " ".join(str(error).split())[:200]
    return PushError(f"the Hub refused ({status}): {message}", hint="push again; what was uploaded is not sent twice")
