"""The writing part of the Hub's protocol: repositories, commits, tags, and large files by LFS."""

import base64
import hashlib
import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.app import API, FILES, USER, Handler, Hub, HubError
from tests.hub.storage import File, Repo

# Larger files, and files with these endings, are stored in LFS.
LFS_BYTES = 1_000_000
LARGE_ENDINGS = (".parquet", ".safetensors", ".bin", ".zip")


async def create(hub: Hub, request: Request) -> Response:
    """Create a repository that holds only `.gitattributes`."""
    body = await request.json()
    owner = body.get("organization") or USER
    repo, kind = f"{owner}/{body['name']}", body.get("type", "model")
    address = f"{request.base_url}{'' if kind == 'model' else f'{kind}s/'}{repo}"
    url = {"url": address, "name": repo, "id": repo}
    if (kind, repo) in hub.storage.repos:
        return JSONResponse({"error": "You already created this repo", **url}, 409)
    repository = Repo(kind, repo, private=body.get("visibility") == "private")
    attributes = hub.storage.put(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    repository.commit("main", "initial commit", {".gitattributes": attributes})
    hub.storage.repos[kind, repo] = repository
    return JSONResponse(url)


async def validate_yaml(hub: Hub, request: Request) -> Response:
    """Accept the header of a card, which the client sends before a commit."""
    return JSONResponse({"errors": [], "warnings": []})


async def preupload(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Return the upload mode of each file, and its id if it exists."""
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
    """Return the upload URL of each missing large file."""
    hub.writable(request, kind, repo)
    answers = []
    for pointer in (await request.json())["objects"]:
        href = f"{request.base_url}lfs/{pointer['oid']}"
        is_stored = hub.storage.path(pointer["oid"]).exists()
        answers.append(pointer | ({} if is_stored else {"actions": {"upload": {"href": href}}}))
    return JSONResponse({"transfer": "basic", "objects": answers})


async def lfs_put(hub: Hub, request: Request, sha256: str) -> Response:
    """Receive a large file. Raises HubError if the sha256 does not match."""
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


async def commit(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Apply operations as one commit. Raises HubError for an outdated parent or an invalid operation."""
    repository = hub.writable(request, kind, repo)
    operations = [json.loads(line) for line in (await request.body()).splitlines()]
    if revision not in repository.branches:
        raise HubError(404, "RevisionNotFound", f"{revision} is not a branch")
    head = hub.commit_at(repository, revision)
    files: dict[str, File] = dict(head.files)
    title, message = "commit", ""
    for operation in operations:
        key, value = operation["key"], operation["value"]
        if key == "header":
            title, message = value["summary"], value.get("description") or ""
            if value.get("parentCommit") not in (None, head.oid):
                raise HubError(412, "StaleParent", "A commit has happened since.")
        elif key == "file":
            files[value["path"]] = hub.storage.put(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            large = hub.storage.large(value["oid"])
            if large is None:
                raise HubError(400, "MissingObject", f"{value['path']} was not uploaded")
            files[value["path"]] = large
        else:  # deletedFile
            del files[value["path"]]
    new_commit = repository.commit(revision, title, files, message)
    url = f"{request.base_url}{kind}/{repo}/commit/{new_commit.oid}"
    return JSONResponse({"commitOid": new_commit.oid, "commitUrl": url})


async def tag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = hub.writable(request, kind, repo)
    name = (await request.json())["tag"]
    oid = hub.commit_at(repository, revision).oid
    if name in repository.tags:
        raise HubError(409, "TagExists", f"Tag {name} already exists")
    repository.tags[name] = oid
    return JSONResponse({})


ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", tag),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", lfs_put),
]
