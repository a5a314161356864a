"""The Hub's protocol, Xet: files arrive as chunks in blocks, and as recipes of which chunks make which file.

Sources: the records of `hf_xet` (crate `mdb_shard` for recipes, `cas_object` for blocks). A hash is written as four 64-bit
numbers, so that its hexadecimal form has each eight bytes in reverse.
"""

import hashlib
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.app import API, Handler, Hub, HubError
from tests.hub.storage import Storage

RECORD = 48  # bytes of every record of a recipe
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
STORED, LZ4, GROUPED_LZ4 = 0, 1, 2  # how a chunk is compressed


class Segment(NamedTuple):
    """Some chunks of one block, one after another."""

    block: str
    first: int
    after: int


class Store:
    """Blocks by their hash. A file that is whole lies in the storage, by its sha256, as if LFS had brought it."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def keep(self, block: str, data: bytes) -> None:
        """Keep a block as it came."""
        self.storage.path(f"xet-{block}").write_bytes(data)

    def chunks(self, segment: Segment) -> Iterator[bytes]:
        """Yield the chunks of a segment."""
        try:
            data = self.storage.path(f"xet-{segment.block}").read_bytes()
        except OSError:
            raise HubError(400, "MissingBlock", f"block {segment.block} was not uploaded") from None
        for index, chunk in enumerate(_chunks(data)):
            if index >= segment.after:
                return
            if index >= segment.first:
                yield chunk()

    def assemble(self, sha256: str, segments: list[Segment]) -> None:
        """Write a file from its chunks, and refuse other bytes than were announced."""
        atomic_write, digest = self.storage.path(f".{sha256}.tmp"), hashlib.sha256()
        with atomic_write.open("wb") as file:
            for segment in segments:
                for chunk in self.chunks(segment):
                    digest.update(chunk)
                    file.write(chunk)
        if digest.hexdigest() != sha256:
            atomic_write.unlink()
            raise HubError(400, "BadChecksum", "the chunks do not make the file that was announced")
        atomic_write.replace(self.storage.path(sha256))


def _chunks(block: bytes) -> Iterator["SampleBatch"]:
    """Yield the chunks of a block, each to be unpacked when called."""
    at = 0
    while at + 8 <= len(block) and block[at] == 0:  # the version of a chunk's header; a footer begins otherwise
        packed = int.from_bytes(block[at + 1 : at + 4], "little")
        scheme, size = block[at + 4], int.from_bytes(block[at + 5 : at + 8], "little")
        yield SampleBatch(block[at + 8 : at + 8 + packed], scheme, size)
        at += 8 + packed


class SampleBatch(NamedTuple):
    """A chunk as it lies in a block."""

    data: bytes
    scheme: int
    size: int

    def __call__(self) -> bytes:
        """Return the bytes of the chunk."""
        if self.scheme == STORED:
            return self.data
        plain: bytes = pa.decompress(self.data, decompressed_size=self.size, codec="lz4", asbytes=True)
        if self.scheme == LZ4:
            return plain
        if self.scheme != GROUPED_LZ4:
            raise HubError(400, "BadChunk", f"unknown compression {self.scheme}")
        whole, at = bytearray(self.size), 0  # every fourth byte together: the four groups one after another
        for group in range(4):
            count = (self.size - group + 3) // 4
            whole[group::4] = plain[at : at + count]
            at += count
        return bytes(whole)


def recipes(shard: bytes) -> Iterator[tuple[str, list[Segment]]]:
    """Yield (sha256, segments) of each file that a recipe describes."""
    at = RECORD  # the header of the shard
    while shard[at : at + 32] != b"\xff" * 32:  # a mark after the last file
        flags, count = struct.unpack_from("<II", shard, at + 32)
        entries = [shard[at + RECORD * (n + 1) : at + RECORD * (n + 2)] for n in range(count)]
        at += RECORD * (count + 1)
        if flags & HAS_VERIFICATION:
            at += RECORD * count
        if not flags & HAS_SHA256:
            raise HubError(400, "NoChecksum", "a file came without its sha256")
        sha256 = _hexadecimal(shard[at : at + 32])
        at += RECORD
        yield sha256, [Segment(_hexadecimal(e[:32]), *struct.unpack_from("<II", e, 40)) for e in entries]


def _hexadecimal(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


async def token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Where to send blocks to, and with which token."""
    hub.writable(request, kind, repo)
    until = int(time.time()) + 3600
    url = str(request.base_url).rstrip("/")
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": url, "accessToken": "xet", "exp": until}, headers=headers)


async def block(hub: Hub, request: Request, hash_: str) -> Response:
    """Receive a block."""
    data = await request.body()
    hub.received_bytes += len(data)
    hub.xet.keep(hash_, data)
    return JSONResponse({"was_inserted": True})


async def shard(hub: Hub, request: Request) -> Response:
    """Receive recipes; every file that they describe is there afterwards."""
    data = await request.body()
    hub.received_bytes += len(data)
    for sha256, segments in recipes(data):
        hub.xet.assemble(sha256, segments)
    return JSONResponse({"result": 1})


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", rf"{API}/xet-write-token/(?P<revision>[^/]+)", token),
    ("POST", r"/v1/xorbs/default/(?P<hash_>[0-9a-f]{64})", block),
    ("POST", r"/v1/shards", shard),
]
