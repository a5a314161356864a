"""The Hub's protocol as used by huggingface_hub and datasets, over tests.hub.storage.

Routes match the raw URL, because clients send `refs%2Fconvert%2Fparquet` as one segment.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

import yaml
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tests.hub.storage import Commit, Repo, Storage

USER = "me"
TOKEN = "hf_loopback"  # token of the only user, not secret
KINDS = {"datasets": "dataset", "models": "model"}


@dataclass
class Fault:
    """A fault in one request that matches `method` and `path`, after `skip` such requests.

    With `status`, the server returns this error status. Without, it drops the connection, and with `after`
    only when it has handled the request. With `before`, it calls `before`, and answers normally.
    """

    method: str
    path: str
    status: int = 0
    after: bool = False
    skip: int = 0
    call: Callable[[], None] | None = None
    before: Callable[[], object] | None = None


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def answer(self) -> Response:
        headers = {"X-Error-Code": self.code, "X-Error-Message": self.message}
        return JSONResponse({"error": self.message}, self.status, headers)


Handler = Callable[..., Awaitable[Response]]
ID = r"(?P<repo>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<kind>datasets|models)/{ID}"
FILES = rf"/(?:(?P<kind>datasets)/)?{ID}"


class Hub:
    """The ASGI app of the test Hub."""

    def __init__(self, storage: Storage) -> None:
        from tests.hub.write import ROUTES

        self.storage = storage
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        # gated repositories whose terms the user has accepted
        self.granted: set[str] = set()
        self.sent_bytes = 0
        self.received_bytes = 0
        routes = (*READING, *ROUTES)
        self.routes = [(method, re.compile(path), handler) for method, path, handler in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        path = scope["raw_path"].decode().split("?")[0]
        self.log.append((request.method, path))
        fault = self._fault(request.method, path)
        if fault is not None and fault.before:
            await asyncio.to_thread(fault.before)
            fault = None
        if fault is not None and not fault.status and not fault.after:
            _drop(send, fault)
            return
        try:
            if fault is not None and fault.status:
                raise HubError(fault.status, "Injected", f"injected {fault.status}")
            response = await self._route(request, path)
        except HubError as error:
            response = error.answer()
        if fault is not None and fault.after:
            _drop(send, fault)
            return
        await response(scope, receive, send)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                if fault.skip:
                    fault.skip -= 1
                    continue
                self.faults.remove(fault)
                return fault
        return None

    async def _route(self, request: Request, path: str) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, handler in self.routes:
            match = pattern.fullmatch(path)
            if match and route_method == method:
                values = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                return await handler(self, request, **values)
        raise HubError(404, "NotFound", f"no such route: {request.method} {path}")

    def token(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, ""):
            raise HubError(401, "Unauthorized", "Invalid user token.")
        return token or None

    def repo(self, request: Request, kind: str, repo: str) -> Repo:
        repository, token = self.storage.repos.get((KINDS[kind], repo)), self.token(request)
        if repository is None or (repository.private and token is None):
            raise HubError(404 if token else 401, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, request: Request, kind: str, repo: str) -> Repo:
        if self.token(request) is None:
            raise HubError(401, "Unauthorized", "a token is needed to write")
        return self.repo(request, kind, repo)

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


def _drop(send: Send, fault: Fault) -> None:
    if fault.call:
        fault.call()
    send.__self__.transport.abort()  # type: ignore[attr-defined]  # uvicorn's connection: the client gets no answer


async def info(hub: Hub, request: Request, kind: str, repo: str, revision: str = "main") -> Response:
    repository = hub.repo(request, kind, repo)
    commit = hub.commit_at(repository, revision)
    fields = {
        "id": repo, "sha": commit.oid, "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "tags": [], "downloads": 0, "cardData": _card(hub, commit),
        "lastModified": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip
    with_sizes = request.query_params.get("blobs", "").lower() == "true"
    siblings = [
        {"rfilename": path, **({"size": stored.size, "blobId": stored.git_oid} if with_sizes else {})}
        for path, stored in sorted(commit.files.items())
    ]
    return JSONResponse(fields | {"siblings": siblings})


def _card(hub: Hub, commit: Commit) -> dict[str, object]:
    if "README.md" not in commit.files:
        return {}
    text = hub.storage.path(commit.files["README.md"].sha256).read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    return header if isinstance(header, dict) else {}


async def refs(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = hub.repo(request, kind, repo)
    converts = {name: oid for name, oid in repository.branches.items() if name.startswith("refs/convert/")}
    branches = {name: oid for name, oid in repository.branches.items() if name not in converts}
    return JSONResponse(
        {
            "branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in branches.items()],
            "converts": [_ref(name.rpartition("/")[2], name, oid) for name, oid in converts.items()],
            "tags": [_ref(name, f"refs/tags/{name}", oid) for name, oid in repository.tags.items()],
        }
    )


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


async def tree(hub: Hub, request: Request, kind: str, repo: str, revision: str, path: str = "") -> Response:
    """List the files and folders of a repository or of a folder in it."""
    files = hub.commit_at(hub.repo(request, kind, repo), revision).files
    under = f"{path}/" if path else ""
    inside = {name: file for name, file in files.items() if name.startswith(under)}
    if path and not inside:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
    recursive = request.query_params.get("recursive", "").lower() == "true"
    direct = {name: file for name, file in inside.items() if recursive or "/" not in name[len(under) :]}
    folders = {under + name[len(under) :].split("/")[0] for name in inside if "/" in name[len(under) :]}
    entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
    return JSONResponse(entries + [file.entry(name) for name, file in sorted(direct.items())])


async def paths_info(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    files = hub.commit_at(hub.repo(request, kind, repo), revision).files
    paths = parse_qs((await request.body()).decode())["paths"]
    return JSONResponse([files[path].entry(path) for path in paths if path in files])


async def file(
    hub: Hub, request: Request, repo: str, revision: str, path: str, kind: str = "models"
) -> Response:
    """Return a file, or the requested range of it."""
    repository = hub.repo(request, kind, repo)
    if repository.gated and hub.token(request) is None:
        raise HubError(401, "GatedRepo", f"Access to dataset {repo} is restricted.")
    if repository.gated and repo not in hub.granted:
        raise HubError(403, "GatedRepo", f"You are not in the authorized list of dataset {repo}.")
    commit = hub.commit_at(repository, revision)
    if path not in commit.files:
        missing = HubError(404, "EntryNotFound", f"{path} not found").answer()
        missing.headers["X-Repo-Commit"] = commit.oid
        return missing
    stored = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{stored.sha256 if stored.lfs else stored.git_oid}"'}
    if stored.lfs:
        headers |= {"X-Linked-Etag": f'"{stored.sha256}"', "X-Linked-Size": str(stored.size)}
    if request.method == "GET":
        hub.sent_bytes += _range_bytes(request.headers.get("range"), stored.size)
    return FileResponse(hub.storage.path(stored.sha256), headers=headers)


def _range_bytes(header: str | None, size: int) -> int:
    """Return the size of the response to `Range: bytes=first-last`."""
    if header is None:
        return size
    first, last = header.removeprefix("bytes=").split("-")
    return min(int(last) if last else size - 1, size - 1) - int(first) + 1


READING: list[tuple[str, str, Handler]] = [
    ("GET", rf"{API}/refs", refs),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", info),
    ("GET", API, info),
    ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", file),
]
