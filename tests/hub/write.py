"""The writing part of the Hub's protocol: repositories, commits, tags, branches, and large files by LFS."""

import base64
import binascii
import hashlib
import json

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.app import API, FILES, Handler, Hub, HubError, read_json_lines
from tests.hub.storage import File, Repo

LFS_BYTES = 1_000_000  # files of at least this size, and all Parquet files and weights, are large
LARGE_ENDINGS = (".parquet", ".safetensors", ".bin", ".zip")
PART_BYTES = 20_000_000  # a larger file is uploaded in parts of this size
COMMIT_FILES = 25_000  # limit of one commit; the Hub's documentation asks for far fewer


async def create(hub: Hub, request: Request) -> Response:
    """Create a repository that holds only `.gitattributes`."""
    body = await request.json()
    user, _ = hub.who(request)
    owner = body.get("organization") or user or ""
    hub.require_writer(request, owner)
    repo, kind = f"{owner}/{body['name']}", body.get("type", "model")
    url = {"url": f"{request.base_url}{'' if kind == 'model' else f'{kind}s/'}{repo}", "name": repo, "id": repo}
    if (kind, repo) in hub.storage.repos:
        return JSONResponse({"error": "You already created this repo", **url}, 409)
    repository = Repo(kind, repo, private=body.get("visibility") == "private")
    repository.commit(
        "main", "initial commit", {".gitattributes": hub.storage.put(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")}
    )
    hub.storage.repos[kind, repo] = repository
    return JSONResponse(url)


async def delete(hub: Hub, request: Request) -> Response:
    """Delete a repository."""
    body = await request.json()
    owner = body.get("organization") or hub.who(request)[0] or ""
    hub.require_writer(request, owner)
    if hub.storage.repos.pop((body.get("type", "model"), f"{owner}/{body['name']}"), None) is None:
        raise HubError(404, "RepoNotFound", "Repository not found")
    return JSONResponse({})


async def settings(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    """Set whether a repository is gated or private."""
    repository, body = hub.writable(request, kind, repo), await request.json()
    repository.gated = bool(body.get("gated", repository.gated))
    repository.private = body.get("visibility", "private" if repository.private else "public") == "private"
    return JSONResponse({})


async def validate_yaml(hub: Hub, request: Request) -> Response:
    """Return the errors in the YAML header of a card."""
    content = (await request.json())["content"]
    try:
        header = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = [] if isinstance(header, dict) else [{"message": "the header is no mapping"}]
    except (yaml.YAMLError, IndexError) as error:
        errors = [{"message": str(error)}]
    return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)


async def preupload(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Return the upload mode of each file, and its current id if it exists."""
    files = hub.commit_at(hub.writable(request, kind, repo), revision).files
    answers = []
    for file in (await request.json())["files"]:
        large = file["size"] >= LFS_BYTES or file["path"].endswith(LARGE_ENDINGS)
        stored = files.get(file["path"])
        oid = {} if stored is None else {"oid": stored.sha256 if stored.lfs else stored.git_oid}
        mode = "lfs" if large else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return JSONResponse({"files": answers})


async def lfs_batch(hub: Hub, request: Request, repo: str, kind: str = "models") -> Response:
    """Return the upload URL of each missing large file, or the URLs of its parts."""
    hub.writable(request, kind, repo)
    answers = []
    for pointer in (await request.json())["objects"]:
        href = f"{request.base_url}lfs/{pointer['oid']}"
        upload: dict[str, object] = {}
        if not hub.storage.path(pointer["oid"]).exists():
            upload = {"upload": {"href": href}}
            if pointer["size"] > PART_BYTES:
                parts = range(1, -(-pointer["size"] // PART_BYTES) + 1)
                header = {"chunk_size": str(PART_BYTES)} | {f"{n:05d}": f"{href}/part/{n}" for n in parts}
                upload = {"upload": {"href": href, "header": header}}
        answers.append(pointer | ({"actions": upload} if upload else {}))
    return JSONResponse({"transfer": "basic", "objects": answers})


async def lfs_put(hub: Hub, request: Request, sha256: str) -> Response:
    """Receive a large file. Raises HubError if its bytes do not match the sha256."""
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
    """Join the parts of a large file. Raises HubError if the bytes do not match the sha256."""
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
    """Apply all operations as one commit. Raises HubError if the parent is stale or an operation is invalid."""
    repository = hub.writable(request, kind, repo)
    operations = await read_json_lines(request)
    if revision not in repository.branches:
        raise HubError(404, "RevisionNotFound", f"no branch {revision}: a tag or a commit cannot be written to")
    head = hub.commit_at(repository, revision)
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
            deleted = [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]
            if not deleted:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
            for path in deleted:
                del files[path]
        else:
            raise HubError(400, "BadOperation", f"unknown operation: {key}")
    new_commit = repository.commit(revision, title, files, message)
    return JSONResponse({"commitOid": new_commit.oid, "commitUrl": f"{request.base_url}{kind}/{repo}/commit/{new_commit.oid}"})


def _small(hub: Hub, value: dict[str, str]) -> File:
    try:
        data = base64.b64decode(value["content"], validate=True)
    except (binascii.Error, KeyError):
        raise HubError(400, "BadContent", f"{value.get('path')} is not base64") from None
    if len(data) >= LFS_BYTES * 10:
        raise HubError(400, "TooLarge", f"{value['path']} must be uploaded as a large file")
    return hub.storage.put(data)


async def tag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Tag a commit. Raises HubError if the tag exists."""
    repository = hub.writable(request, kind, repo)
    name = (await request.json())["tag"]
    oid = hub.commit_at(repository, revision).oid
    if name in repository.tags:
        raise HubError(409, "TagExists", f"Tag {name} already exists")
    repository.tags[name] = oid
    return JSONResponse({})


async def untag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Delete a tag."""
    if hub.writable(request, kind, repo).tags.pop(revision, None) is None:
        raise HubError(404, "RevisionNotFound", f"no tag {revision}")
    return JSONResponse({})


async def branch(hub: Hub, request: Request, kind: str, repo: str, name: str) -> Response:
    """Create a branch. Raises HubError if it exists."""
    repository = hub.writable(request, kind, repo)
    body = await request.body()
    start = (json.loads(body) if body else {}).get("startingPoint", "main")
    if name in repository.branches:
        raise HubError(409, "BranchExists", f"Reference {name} already exists")
    repository.branches[name] = hub.commit_at(repository, start).oid
    return JSONResponse({})


async def unbranch(hub: Hub, request: Request, kind: str, repo: str, name: str) -> Response:
    """Delete a branch other than main."""
    if name == "main" or hub.writable(request, kind, repo).branches.pop(name, None) is None:
        raise HubError(404, "RevisionNotFound", f"no branch {name} that could be deleted")
    return JSONResponse({})


async def auth_check(hub: Hub, request: Request, kind: str, repo: str, write: str = "") -> Response:
    """Check that the token may read, or write."""
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
