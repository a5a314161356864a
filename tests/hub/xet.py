"""The Xet part of the Hub's protocol: chunks arrive in blocks, and recipes list the chunks of each file.

Sources: the records of `hf_xet` (crate `mdb_shard` for recipes, `cas_object` for blocks). A hash is written as four 64-bit
little-endian numbers, so its hexadecimal form reverses each eight bytes.
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
    """The consecutive chunks `first` to `after` - 1 of one block."""

    block: str
    first: int
    after: int


class Store:
    """Blocks by their hash. A complete file is stored by its sha256, like a file from LFS."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def keep(self, block: str, data: bytes) -> None:
        """Store a block unchanged."""
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
        """Write a file from its chunks. Raises HubError if its bytes do not match the sha256."""
        draft, digest = self.storage.path(f".{sha256}.tmp"), hashlib.sha256()
        with draft.open("wb") as file:
            for segment in segments:
                for chunk in self.chunks(segment):
                    digest.update(chunk)
                    file.write(chunk)
        if digest.hexdigest() != sha256:
            draft.unlink()
            raise HubError(400, "BadChecksum", "the chunks do not make the file that was announced")
        draft.replace(self.storage.path(sha256))


def _chunks(block: bytes) -> Iterator["XetChunk"]:
    """Yield the chunks of a block; calling a chunk unpacks it."""
    start = 0
    while start + 8 <= len(block) and block[start] == 0:  # version 0 begins a chunk header, not a footer
        packed_size = int.from_bytes(block[start + 1 : start + 4], "little")
        scheme, size = block[start + 4], int.from_bytes(block[start + 5 : start + 8], "little")
        yield XetChunk(block[start + 8 : start + 8 + packed_size], scheme, size)
        start += 8 + packed_size


class XetChunk(NamedTuple):
    """A packed chunk of a block; `size` is its unpacked size in bytes."""

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
        whole, offset = bytearray(self.size), 0  # grouped: bytes 0, 4, 8, ... come first, then 1, 5, 9, ...
        for group in range(4):
            count = (self.size - group + 3) // 4
            whole[group::4] = plain[offset : offset + count]
            offset += count
        return bytes(whole)


def recipes(shard: bytes) -> Iterator[tuple[str, list[Segment]]]:
    """Yield (sha256, segments) of each file that a recipe describes."""
    position = RECORD  # the header of the shard
    while shard[position : position + 32] != b"\xff" * 32:  # the end marker after the last file
        flags, count = struct.unpack_from("<II", shard, position + 32)
        entries = [shard[position + RECORD * (index + 1) : position + RECORD * (index + 2)] for index in range(count)]
        position += RECORD * (count + 1)
        if flags & HAS_VERIFICATION:
            position += RECORD * count
        if not flags & HAS_SHA256:
            raise HubError(400, "NoChecksum", "a file came without its sha256")
        sha256 = _hexadecimal(shard[position : position + 32])
        position += RECORD
        yield sha256, [Segment(_hexadecimal(entry[:32]), *struct.unpack_from("<II", entry, 40)) for entry in entries]


def _hexadecimal(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


async def token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Return the URL and the token for uploading blocks."""
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
    """Receive recipes, and assemble every file that they describe."""
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
