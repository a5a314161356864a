"""The test Hub refuses the same requests as the real Hub; the tests use plain HTTP."""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.hub.app import OTHER_TOKEN, READ_TOKEN, TOKEN, Fault
from tests.hub.server import RunningHub, running_hub

REPO = "/api/datasets/me/x"


class Client:
    """Plain HTTP requests with a token."""

    def __init__(self, hub: RunningHub) -> None:
        self.hub = hub.hub
        self.http = httpx2.Client(base_url=hub.endpoint, trust_env=False)

    def ask(self, method: str, path: str, token: str | None = TOKEN, **options: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return self.http.request(method, path, headers=headers | options.pop("headers", {}), **options)

    def create(self, **fields: Any) -> httpx2.Response:
        return self.ask("POST", "/api/repos/create", json={"name": "x", "organization": "me", "type": "dataset", **fields})

    def commit(self, *operations: tuple[str, dict[str, Any]], parent: str | None = None, token: str = TOKEN) -> httpx2.Response:
        header = ("header", {"summary": "s", **({"parentCommit": parent} if parent else {})})
        lines = [json.dumps({"key": key, "value": value}) for key, value in (header, *operations)]
        return self.ask("POST", f"{REPO}/commit/main", token, content="\n".join(lines))


def small(path: str, data: bytes = b"x") -> tuple[str, dict[str, Any]]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running_hub(tmp_path / "hub") as hub:
        client = Client(hub)
        client.create()
        yield client


def test_a_read_token_and_a_strangers_token_cannot_write(client: Client) -> None:
    assert client.commit(small("a"), token=READ_TOKEN).status_code == 403
    assert client.commit(small("a"), token=OTHER_TOKEN).status_code == 403
    assert client.commit(small("a"), token="hf_nobody").status_code == 401
    assert client.commit(small("a")).status_code == 200


def test_a_private_repository_is_not_there_for_others(client: Client) -> None:
    client.ask("PUT", f"{REPO}/settings", json={"visibility": "private"})
    answers = {token: client.ask("GET", REPO, token) for token in (TOKEN, READ_TOKEN, OTHER_TOKEN, None)}
    assert [answer.status_code for answer in answers.values()] == [200, 200, 404, 401]
    assert {answer.headers["X-Error-Code"] for answer in list(answers.values())[2:]} == {"RepoNotFound"}


@pytest.mark.parametrize("path", ["../a", "a/../b", "/a", "a//b", "a\\b", ".git/config", "a\0b", ""])
def test_a_path_that_leaves_the_repository_is_refused(client: Client, path: str) -> None:
    assert client.commit(small(path)).status_code == 400
    assert set(client.hub.storage.repos["dataset", "me/x"].resolve("main").files) == {".gitattributes"}  # type: ignore[union-attr]


def test_a_commit_on_an_older_head_is_refused_and_changes_nothing(client: Client) -> None:
    head = client.ask("GET", REPO).json()["sha"]
    commit_oid = client.commit(small("a"), parent=head).json()["commitOid"]
    assert client.commit(small("b"), parent=head).status_code == 412
    assert client.ask("GET", REPO).json()["sha"] == commit_oid


@pytest.mark.parametrize(
    ("operation", "status"),
    [
        (("lfsFile", {"path": "a", "algo": "sha256", "oid": "0" * 64}), 400),
        (("deletedFile", {"path": "nothing"}), 404),
        (("file", {"path": "a", "content": "?", "encoding": "base64"}), 400),
        (("rename", {}), 400),
    ],
)
def test_one_bad_operation_spoils_the_whole_commit(client: Client, operation: tuple[str, dict[str, Any]], status: int) -> None:
    assert client.commit(small("good"), operation).status_code == status
    assert client.ask("HEAD", "/datasets/me/x/resolve/main/good").status_code == 404


def test_other_bytes_than_announced_are_refused(client: Client) -> None:
    sha256 = hashlib.sha256(b"right").hexdigest()
    assert client.ask("PUT", f"/lfs/{sha256}", None, content=b"wrong").status_code == 400
    assert client.ask("PUT", f"/lfs/{sha256}", None, content=b"right").status_code == 200


def test_a_fault_happens_once_where_it_should(client: Client) -> None:
    client.hub.faults = [Fault("GET", "/refs", 503, skip=1), Fault("GET", "/tree/")]
    assert [client.ask("GET", f"{REPO}/refs").status_code for _ in range(3)] == [200, 503, 200]
    with pytest.raises(httpx2.RemoteProtocolError):
        client.ask("GET", f"{REPO}/tree/main")
    assert client.ask("GET", f"{REPO}/tree/main").status_code == 200


def test_an_answer_can_be_lost_after_the_deed(client: Client) -> None:
    client.hub.faults = [Fault("POST", "/commit/", after=True)]
    with pytest.raises(httpx2.RemoteProtocolError):
        client.commit(small("a"))
    assert client.ask("HEAD", "/datasets/me/x/resolve/main/a").status_code == 200
