"""The Hub's storage: commits in memory, content-addressed files on disk."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A file of a commit. Large files are identified by sha256, small ones by git blob id."""

    sha256: str
    git_oid: str
    size: int
    lfs: bool

    def entry(self, path: str) -> dict[str, object]:
        """Return the entry of a file in tree and paths-info responses."""
        fields: dict[str, object] = {"type": "file", "path": path, "oid": self.git_oid, "size": self.size}
        if self.lfs:
            fields["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 130}
        return fields


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]
    message: str = ""


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File], message: str = "") -> Commit:
        parent = self.branches.get(branch)
        content = repr((self.kind, self.id, parent, title, len(self.commits), sorted(files.items())))
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, files, message)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def resolve(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a tag or a full commit id."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)


class Storage:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[tuple[str, str], Repo] = {}
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / sha256

    def put(self, data: bytes) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        git_oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's blob id
        return File(sha256, git_oid, len(data), lfs=False)

    def seed(
        self, kind: str, repo: str, files: dict[str, bytes], branch: str = "main", *, gated: bool = False
    ) -> Repo:
        """Commit files on a branch as a push does: Parquet and safetensors through LFS."""
        repository = self.repos.setdefault((kind, repo), Repo(kind, repo, private=False))
        repository.gated = repository.gated or gated
        stored = {path: self.put(data) for path, data in files.items()}
        large = {path for path in files if path.endswith((".parquet", ".safetensors"))}
        stored |= {path: replace(stored[path], lfs=True) for path in large}
        repository.commit(branch, "seed", stored)
        return repository

    def large(self, sha256: str) -> File | None:
        """Return a large file, or None if it was not uploaded."""
        if not self.path(sha256).exists():
            return None
        return File(sha256, sha256[:40], self.path(sha256).stat().st_size, lfs=True)
