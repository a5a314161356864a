"""The Hub's protocol, writing: repositories, commits, tags, branches, and large files by LFS."""

import base64
import binascii
import hashlib
import json

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.app import API, FILES, Handler, Hub, HubError, read_json_lines
from tests.hub.storage import File, Repo

LFS_BYTES = 1_000_000  # files from this size on, and Parquet and weights always, are large
LARGE_ENDINGS = (".parquet", ".safetensors", ".bin", ".zip")
PART_BYTES = 20_000_000  # a larger file is uploaded in parts of this size
COMMIT_FILES = 25_000  # of one commit; the Hub's documentation asks for far fewer


async def create(hub: Hub, request: Request) -> Response:
    """A new, empty repository."""
    body = await request.json()
    user, _ = hub.who(request)
    owner = body.get("organization") or user or ""
    hub.require_writer(request, owner)
    repo, kind = f"{owner}/{body['name']}", body.get("type", "model")
    url = {"url": f"{request.base_url}{'datasets/' if kind == 'dataset' else ''}{repo}", "name": repo, "id": repo}
    if (kind, repo) in hub.storage.repos:
        return JSONResponse({"error": "You already created this repo", **url}, 409)
    made = Repo(kind, repo, private=body.get("visibility") == "private")
    made.commit(
        "main", "initial commit", {".gitattributes": hub.storage.put(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")}
    )
    hub.storage.repos[kind, repo] = made
    return JSONResponse(url)


async def delete(hub: Hub, request: Request) -> Response:
    """The end of a repository."""
    body = await request.json()
    owner = body.get("organization") or hub.who(request)[0] or ""
    hub.require_writer(request, owner)
    if hub.storage.repos.pop((body.get("type", "model"), f"{owner}/{body['name']}"), None) is None:
        raise HubError(404, "RepoNotFound", "Repository not found")
    return JSONResponse({})


async def settings(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    """Who may see and load a repository."""
    found, body = hub.writable(request, kind, repo), await request.json()
    found.gated = bool(body.get("gated", found.gated))
    found.private = body.get("visibility", "private" if found.private else "public") == "private"
    return JSONResponse({})


async def validate_yaml(hub: Hub, request: Request) -> Response:
    """Say what is wrong with the header of a card."""
    content = (await request.json())["content"]
    try:
        header = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = [] if isinstance(header, dict) else [{"message": "the header is no mapping"}]
    except (yaml.YAMLError, IndexError) as error:
        errors = [{"message": str(error)}]
    return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)


async def preupload(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Tell, for each file, whether it is large, and what is there already."""
    files = hub.commit_at(hub.writable(request, kind, repo), revision).files
    answers = []
    for file in (await request.json())["files"]:
        large = file["size"] >= LFS_BYTES or file["path"].endswith(LARGE_ENDINGS)
        here = files.get(file["path"])
        oid = {} if here is None else {"oid": here.sha256 if here.lfs else here.git_oid}
        mode = "lfs" if large else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return JSONResponse({"files": answers})


async def lfs_batch(hub: Hub, request: Request, repo: str, kind: str = "models") -> Response:
    """Where to upload each large file that is not there yet: at once, or in parts."""
    hub.writable(request, kind, repo)
    answers = []
    for wanted in (await request.json())["objects"]:
        href = f"{request.base_url}lfs/{wanted['oid']}"
        upload: dict[str, object] = {}
        if not hub.storage.path(wanted["oid"]).exists():
            upload = {"upload": {"href": href}}
            if wanted["size"] > PART_BYTES:
                parts = range(1, -(-wanted["size"] // PART_BYTES) + 1)
                header = {"chunk_size": str(PART_BYTES)} | {f"{n:05d}": f"{href}/part/{n}" for n in parts}
                upload = {"upload": {"href": href, "header": header}}
        answers.append(wanted | ({"actions": upload} if upload else {}))
    return JSONResponse({"transfer": "basic", "objects": answers})


async def lfs_put(hub: Hub, request: Request, sha256: str) -> Response:
    """Receive a large file, and refuse other bytes than were announced."""
    draft, digest = hub.storage.path(f".{sha256}.tmp"), hashlib.sha256()
    with draft.open("wb") as file:
        async for part in request.stream():
            digest.update(part)
            file.write(part)
            hub.received_bytes += len(part)
    if digest.hexdigest() != sha256:
        draft.unlink()
        raise HubError(400, "BadChecksum", "the bytes are not those announced")
    draft.replace(hub.storage.path(sha256))
    return Response()


async def lfs_part(hub: Hub, request: Request, sha256: str, number: str) -> Response:
    """Receive one part of a large file."""
    data = await request.body()
    hub.received_bytes += len(data)
    hub.storage.path(f".{sha256}.{number}").write_bytes(data)
    return Response(headers={"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})


async def lfs_complete(hub: Hub, request: Request, sha256: str) -> Response:
    """Put the parts of a large file together."""
    digest, draft = hashlib.sha256(), hub.storage.path(f".{sha256}.tmp")
    parts = [hub.storage.path(f".{sha256}.{part['partNumber']}") for part in (await request.json())["parts"]]
    with draft.open("wb") as file:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            file.write(data)
            part.unlink()
    if digest.hexdigest() != sha256:
        draft.unlink()
        raise HubError(400, "BadChecksum", "the bytes are not those announced")
    draft.replace(hub.storage.path(sha256))
    return JSONResponse({})


async def commit(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Apply all operations at once, on top of the parent that the client saw."""
    found = hub.writable(request, kind, repo)
    operations = await read_json_lines(request)
    if revision not in found.branches:
        raise HubError(404, "RevisionNotFound", f"no branch {revision}: a tag or a commit cannot be written to")
    head = hub.commit_at(found, revision)
    files: dict[str, File] = dict(head.files)
    title, message = "commit", ""
    if len(operations) > COMMIT_FILES:
        raise HubError(413, "TooLarge", "too many files in one commit")
    for operation in operations:
        key, value = operation["key"], operation["value"]
        assert isinstance(value, dict)
        if key == "header":
            title, message = value["summary"], value.get("description") or ""
            if value.get("parentCommit") not in (None, head.oid):
                raise HubError(412, "StaleParent", "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[_safe(value["path"])] = _small(hub, value)
        elif key == "lfsFile":
            large = hub.storage.large(value["oid"])
            if large is None:
                raise HubError(400, "MissingObject", f"{value['path']} was not uploaded")
            files[_safe(value["path"])] = large
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
        elif key == "deletedFolder":
            gone = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
            if not gone:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
            for path in gone:
                del files[path]
        else:
            raise HubError(400, "BadOperation", f"unknown operation: {key}")
    made = found.commit(revision, title, files, message)
    return JSONResponse({"commitOid": made.oid, "commitUrl": f"{request.base_url}{kind}/{repo}/commit/{made.oid}"})


def _small(hub: Hub, value: dict[str, str]) -> File:
    try:
        data = base64.b64decode(value["content"], validate=True)
    except (binascii.Error, KeyError):
        raise HubError(400, "BadContent", f"{value.get('path')} is not base64") from None
    if len(data) >= LFS_BYTES * 10:
        raise HubError(400, "TooLarge", f"{value['path']} must be uploaded as a large file")
    return hub.storage.put(data)


async def tag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Name a commit; a name that is taken stays where it is."""
    found = hub.writable(request, kind, repo)
    name = (await request.json())["tag"]
    oid = hub.commit_at(found, revision).oid
    if name in found.tags:
        raise HubError(409, "TagExists", f"Tag {name} already exists")
    found.tags[name] = oid
    return JSONResponse({})


async def untag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Take a name away."""
    if hub.writable(request, kind, repo).tags.pop(revision, None) is None:
        raise HubError(404, "RevisionNotFound", f"no tag {revision}")
    return JSONResponse({})


async def branch(hub: Hub, request: Request, kind: str, repo: str, name: str) -> Response:
    """Start a branch."""
    found = hub.writable(request, kind, repo)
    body = await request.body()
    start = (json.loads(body) if body else {}).get("startingPoint", "main")
    if name in found.branches:
        raise HubError(409, "BranchExists", f"Reference {name} already exists")
    found.branches[name] = hub.commit_at(found, start).oid
    return JSONResponse({})


async def unbranch(hub: Hub, request: Request, kind: str, repo: str, name: str) -> Response:
    """End a branch."""
    if name == "main" or hub.writable(request, kind, repo).branches.pop(name, None) is None:
        raise HubError(404, "RevisionNotFound", f"no branch {name} that could be deleted")
    return JSONResponse({})


async def auth_check(hub: Hub, request: Request, kind: str, repo: str, write: str = "") -> Response:
    """Say whether the token may read, or write."""
    hub.writable(request, kind, repo) if write else hub.repo(request, kind, repo)
    return JSONResponse({})


def _safe(path: str) -> str:
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or "\0" in path or {"", ".", "..", ".git"} & set(parts):
        raise HubError(400, "BadPath", f"not a path within a repository: {path!r}")
    return path


_SHA256 = r"(?P<sha256>[0-9a-f]{64})"
ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("PUT", rf"{API}/settings", settings),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", tag),
    ("DELETE", rf"{API}/tag/(?P<revision>[^/]+)", untag),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", branch),
    ("DELETE", rf"{API}/branch/(?P<name>[^/]+)", unbranch),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", auth_check),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", rf"/lfs/{_SHA256}", lfs_put),
    ("PUT", rf"/lfs/{_SHA256}/part/(?P<number>\d+)", lfs_part),
    ("POST", rf"/lfs/{_SHA256}", lfs_complete),
]
