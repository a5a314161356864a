"""The Hub's protocol over tests.hub.storage: as much of it as huggingface_hub and datasets use.

Paths are matched on the raw URL, since clients send `refs%2Fconvert%2Fparquet` as one segment. Faults can be injected:
each entry of `faults` is spent on the first request that it matches.
"""

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

import yaml
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tests.hub.storage import Commit, File, Repo, Storage

TOKEN = "hf_loopback"  # not a secret: the one token that this server knows
USER = "me"
LFS_BYTES = 1_000_000  # files from this size on, and Parquet always, go through LFS
KINDS = {"datasets": "dataset", "models": "model"}


@dataclass
class Fault:
    """Answer `status` once to the next request whose method and path match."""

    method: str
    path: str
    status: int


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


Handler = Callable[..., Awaitable[Response]]
_ID = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<kind>datasets|models)/{_ID}"


class Hub:
    """The ASGI app. `log` lists (method, path) of every request."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.granted: set[str] = set()  # gated repositories whose terms the user has accepted
        self.sent_bytes = 0
        routes: list[tuple[str, str, Handler]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate_yaml),
            ("GET", rf"{_API}/refs", self.refs),
            ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", self.tree),
            ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", self.paths_info),
            ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", self.commits),
            ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", self.tag),
            ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", self.preupload),
            ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", self.commit),
            ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", self.info),
            ("GET", _API, self.info),
            ("POST", rf"/(?:(?P<kind>datasets)/)?{_ID}\.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", self.lfs_put),
            ("GET", rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.file),
        ]
        self.routes = [(method, re.compile(pattern), handler) for method, pattern, handler in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        path = scope["raw_path"].decode().split("?")[0]
        self.log.append((request.method, path))
        try:
            response = await self._route(request, path)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            response = JSONResponse({"error": error.message}, error.status, headers)
        await response(scope, receive, send)

    async def _route(self, request: Request, path: str) -> Response:
        for fault in self.faults:
            if fault.method == request.method and re.search(fault.path, path):
                self.faults.remove(fault)
                raise HubError(fault.status, "Injected", f"injected {fault.status}")
        method = "GET" if request.method == "HEAD" else request.method
        for wanted, pattern, handler in self.routes:
            found = pattern.fullmatch(path)
            if found and wanted == method:
                values = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                return await handler(request, **values)
        raise HubError(404, "NotFound", f"no such route: {request.method} {path}")

    # --- access ---

    def _user(self, request: Request) -> str | None:
        sent = request.headers.get("authorization")
        if sent is None:
            return None
        if sent != f"Bearer {TOKEN}":
            raise HubError(401, "Unauthorized", "Invalid user token.")
        return USER

    def _repo(self, request: Request, kind: str, repo: str) -> Repo:
        found = self.storage.repos.get((KINDS[kind], repo))
        user = self._user(request)
        if found is None or (found.private and user is None):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def _writable(self, request: Request, kind: str, repo: str) -> Repo:
        if self._user(request) is None:
            raise HubError(401, "Unauthorized", "a token is needed to write")
        return self._repo(request, kind, repo)

    def _commit(self, repo: Repo, revision: str) -> Commit:
        found = repo.resolve(revision)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # --- reading ---

    async def whoami(self, request: Request) -> Response:
        """Who the token belongs to."""
        if self._user(request) is None:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        token = {"accessToken": {"role": "write", "displayName": "loopback"}}
        return JSONResponse({"type": "user", "name": USER, "orgs": [{"name": "ORG"}], "auth": token})

    async def info(self, request: Request, kind: str, repo: str, revision: str = "main") -> Response:
        """A repository at a revision."""
        found = self._repo(request, kind, repo)
        commit = self._commit(found, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        card = self._card(commit)
        about = {
            "id": repo,
            "sha": commit.oid,
            "private": found.private,
            "gated": "auto" if found.gated else False,
            "tags": [],
            "downloads": 0,
            "cardData": card,
        }
        return JSONResponse(about | {"siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"})

    def _card(self, commit: Commit) -> dict[str, object]:
        if "README.md" not in commit.files:
            return {}
        text = self.storage.path(commit.files["README.md"].sha256).read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        return header if isinstance(header, dict) else {}

    async def refs(self, request: Request, kind: str, repo: str) -> Response:
        """Branches and tags."""
        found = self._repo(request, kind, repo)
        named = {"branches": (found.branches, "heads"), "tags": (found.tags, "tags")}
        listed = {
            name: [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": oid} for n, oid in refs.items()]
            for name, (refs, folder) in named.items()
        }
        return JSONResponse(listed | {"converts": []})

    async def commits(self, request: Request, kind: str, repo: str, revision: str) -> Response:
        """History, newest first."""
        found = self._repo(request, kind, repo)
        listed, at = [], self._commit(found, revision)
        while True:
            when = "2026-01-01T00:00:00.000Z"
            listed.append({"id": at.oid, "title": at.title, "message": "", "date": when, "authors": [{"user": USER}]})
            if at.parent is None:
                return JSONResponse(listed)
            at = found.commits[at.parent]

    async def tree(self, request: Request, kind: str, repo: str, revision: str, path: str = "") -> Response:
        """Files and folders, below a folder or all of them."""
        files = self._commit(self._repo(request, kind, repo), revision).files
        under = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(under)}
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = request.query_params.get("recursive", "").lower() == "true"
        direct = {name: file for name, file in inside.items() if recursive or "/" not in name[len(under) :]}
        folders = {under + name[len(under) :].split("/")[0] for name in inside if "/" in name[len(under) :]}
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return JSONResponse(entries + [file.entry(name) for name, file in sorted(direct.items())])

    async def paths_info(self, request: Request, kind: str, repo: str, revision: str) -> Response:
        """The named files; those that do not exist are left out."""
        files = self._commit(self._repo(request, kind, repo), revision).files
        asked = parse_qs((await request.body()).decode())["paths"]
        return JSONResponse([files[path].entry(path) for path in asked if path in files])

    async def file(self, request: Request, repo: str, revision: str, path: str, kind: str = "models") -> Response:
        """The bytes of a file, or of a part of it."""
        found = self._repo(request, kind, repo)
        if found.gated and self._user(request) is None:
            raise HubError(401, "GatedRepo", f"Access to dataset {repo} is restricted. You must have access to it.")
        if found.gated and repo not in self.granted:
            raise HubError(403, "GatedRepo", f"Access to dataset {repo} is restricted and you are not in the authorized list.")
        commit = self._commit(found, revision)
        if path not in commit.files:
            error = HubError(404, "EntryNotFound", f"{path} not found")
            headers = {"X-Error-Code": error.code, "X-Repo-Commit": commit.oid}
            return JSONResponse({"error": error.message}, 404, headers)
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.sha256 if file.lfs else file.git_oid}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if request.method == "GET":
            self.sent_bytes += _range_bytes(request.headers.get("range"), file.size)
        return FileResponse(self.storage.path(file.sha256), headers=headers)

    # --- writing ---

    async def create(self, request: Request) -> Response:
        """A new, empty repository."""
        body = await request.json()
        owner = body.get("organization") or self._user(request)
        if self._user(request) is None:
            raise HubError(401, "Unauthorized", "a token is needed to write")
        repo, kind = f"{owner}/{body['name']}", body.get("type", "model")
        url = {"url": f"{request.base_url}{'datasets/' if kind == 'dataset' else ''}{repo}", "name": repo, "id": repo}
        if (kind, repo) in self.storage.repos:
            return JSONResponse({"error": "You already created this repo", **url}, 409)
        made = Repo(kind, repo, private=body.get("visibility") == "private")
        made.commit("main", "initial commit", {})
        self.storage.repos[kind, repo] = made
        return JSONResponse(url)

    async def validate_yaml(self, request: Request) -> Response:
        """Say what is wrong with the header of a card."""
        content = (await request.json())["content"]
        try:
            header = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(header, dict) else [{"message": "the header is no mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            errors = [{"message": str(error)}]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def preupload(self, request: Request, kind: str, repo: str, revision: str) -> Response:
        """Tell, for each file, whether it goes through LFS, and what is there already."""
        found = self._writable(request, kind, repo)
        files = self._commit(found, revision).files
        answers = []
        for file in (await request.json())["files"]:
            large = file["size"] >= LFS_BYTES or file["path"].endswith((".parquet", ".safetensors"))
            here = files.get(file["path"])
            oid = {} if here is None else {"oid": here.sha256 if here.lfs else here.git_oid}
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return JSONResponse({"files": answers})

    async def lfs_batch(self, request: Request, repo: str, kind: str = "models") -> Response:
        """Where to upload each large file that is not there yet."""
        self._writable(request, kind, repo)
        answers = []
        for wanted in (await request.json())["objects"]:
            here = self.storage.path(wanted["oid"]).exists()
            actions = {} if here else {"actions": {"upload": {"href": f"{request.base_url}lfs/{wanted['oid']}"}}}
            answers.append(wanted | actions)
        return JSONResponse({"transfer": "basic", "objects": answers})

    async def lfs_put(self, request: Request, sha256: str) -> Response:
        """Receive a large file, and refuse other bytes than were announced."""
        aside, digest = self.storage.path(f".{sha256}.tmp"), hashlib.sha256()
        with aside.open("wb") as file:
            async for part in request.stream():
                digest.update(part)
                file.write(part)
        if digest.hexdigest() != sha256:
            aside.unlink()
            raise HubError(400, "BadChecksum", "the bytes are not those announced")
        aside.replace(self.storage.path(sha256))
        return Response()

    async def commit(self, request: Request, kind: str, repo: str, revision: str) -> Response:
        """Apply all operations at once, on top of the parent that the client saw."""
        found = self._writable(request, kind, repo)
        head = self._commit(found, revision)
        files: dict[str, File] = dict(head.files)
        title = "commit"
        for line in (await request.body()).decode().splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubError(412, "StaleParent", "the branch has moved on")
            elif key == "file":
                files[_safe(value["path"])] = self.storage.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                large = self.storage.large(value["oid"])
                if large is None:
                    raise HubError(400, "MissingObject", f"{value['path']} was not uploaded")
                files[_safe(value["path"])] = large
            elif key == "deletedFile":
                files.pop(value["path"], None)
        made = found.commit(revision, title, files)
        return JSONResponse({"commitOid": made.oid, "commitUrl": f"{request.base_url}{kind}/{repo}/commit/{made.oid}"})

    async def tag(self, request: Request, kind: str, repo: str, revision: str) -> Response:
        """Name a commit; a name that is taken stays where it is."""
        found = self._writable(request, kind, repo)
        name = (await request.json())["tag"]
        if name in found.tags:
            raise HubError(409, "TagExists", f"Tag {name} already exists")
        found.tags[name] = self._commit(found, revision).oid
        return JSONResponse({})


def _range_bytes(header: str | None, size: int) -> int:
    """How many bytes a request for `bytes=first-last` gets."""
    if header is None:
        return size
    first, last = header.removeprefix("bytes=").split("-")
    return min(int(last) if last else size - 1, size - 1) - int(first) + 1


def _safe(path: str) -> str:
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or {"", ".", "..", ".git"} & set(parts):
        raise HubError(400, "BadPath", f"not a path within a repository: {path!r}")
    return path
