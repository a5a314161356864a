"""Test Hub: it refuses the same requests as the real Hub."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.hub.app import READ_TOKEN, TOKEN
from tests.hub.server import running_hub

REPO = "/api/datasets/me/x"
Ask = Callable[..., httpx2.Response]
Operation = tuple[str, dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Send requests to a Hub with one repository."""
    with running_hub(tmp_path / "hub") as hub, httpx2.Client(base_url=hub.endpoint, trust_env=False) as http:

        def ask(method: str, path: str, token: str | None = TOKEN, **options: Any) -> httpx2.Response:
            headers = {"authorization": f"Bearer {token}"} if token else {}
            return http.request(method, path, headers=headers, **options)

        ask("POST", "/api/repos/create", json={"name": "x", "type": "dataset"})
        yield ask


def commit(ask: Ask, *operations: Operation, token: str = TOKEN, **header: str) -> httpx2.Response:
    operations = (("header", {"summary": "s", **header}), *operations)
    lines = [json.dumps({"key": key, "value": value}) for key, value in operations]
    return ask("POST", f"{REPO}/commit/main", token, content="\n".join(lines))


def small(path: str) -> Operation:
    return "file", {"path": path, "content": base64.b64encode(b"x").decode(), "encoding": "base64"}


def test_only_writer_token_writes_and_private_repository_needs_token(ask: Ask) -> None:
    for token, status in ((READ_TOKEN, 403), ("unknown", 401), (TOKEN, 200)):
        assert commit(ask, small("a"), token=token).status_code == status
    other = {"name": "x", "organization": "you", "type": "dataset"}
    assert ask("POST", "/api/repos/create", json=other).status_code == 403
    ask("PUT", f"{REPO}/settings", json={"visibility": "private"})
    assert [ask("GET", REPO, token).status_code for token in (TOKEN, READ_TOKEN, None)] == [200, 200, 401]


def test_commit_on_older_head_is_refused(ask: Ask) -> None:
    head = ask("GET", REPO).json()["sha"]
    commit_oid = commit(ask, small("a"), parentCommit=head).json()["commitOid"]
    assert commit(ask, small("b"), parentCommit=head).status_code == 412
    assert ask("GET", REPO).json()["sha"] == commit_oid


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        (("lfsFile", {"path": "a", "algo": "sha256", "oid": "0" * 64}), 400),
        (("deletedFile", {"path": "nothing"}), 404),
        (("file", {"path": "a", "content": "?", "encoding": "base64"}), 400),
        (("rename", {}), 400),
        *((small(path), 400) for path in ("../a", "a/../b", "/a", "a//b", ".git/config", "")),
    ],
)
def test_invalid_operation_rejects_whole_commit(ask: Ask, operation: Operation, status: int) -> None:
    assert commit(ask, small("good"), operation).status_code == status
    assert ask("HEAD", "/datasets/me/x/resolve/main/good").status_code == 404


def test_upload_with_wrong_digest_is_refused(ask: Ask) -> None:
    path = f"/lfs/{hashlib.sha256(b'right').hexdigest()}"
    assert [ask("PUT", path, content=content).status_code for content in (b"wrong", b"right")] == [400, 200]
