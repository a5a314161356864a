"""The Xet part of the Hub's protocol: blocks of chunks, and recipes that list the chunks of each file.

Source: `hf_xet` (crates `mdb_shard` for recipes, `cas_object` for blocks). Hashes are four little-endian
64-bit numbers, so their hexadecimal form reverses each eight bytes.
"""

import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.app import API, Handler, Hub, HubError
from tests.hub.storage import Storage

RECORD = 48  # bytes of each record of a recipe
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
STORED, LZ4, GROUPED_LZ4 = 0, 1, 2  # compression of a chunk


class Segment(NamedTuple):
    """Chunks `first` to `after` - 1 of one block."""

    block: str
    first: int
    after: int


def read_segment(storage: Storage, segment: Segment) -> Iterator[bytes]:
    """Yield the chunks of a segment of a stored block."""
    try:
        data = storage.path(f"xet-{segment.block}").read_bytes()
    except OSError:
        raise HubError(400, "MissingBlock", f"block {segment.block} was not uploaded") from None
    for chunk in islice(_chunks(data), segment.first, segment.after):
        yield chunk()


def assemble(storage: Storage, sha256: str, segments: list[Segment]) -> None:
    """Store a file from its chunks. Raises HubError if the sha256 does not match."""
    draft, digest = storage.path(f".{sha256}.tmp"), hashlib.sha256()
    with draft.open("wb") as file:
        for segment in segments:
            for chunk in read_segment(storage, segment):
                digest.update(chunk)
                file.write(chunk)
    if digest.hexdigest() != sha256:
        draft.unlink()
        raise HubError(400, "BadChecksum", "the chunks do not make the file that was announced")
    draft.replace(storage.path(sha256))


def _chunks(block: bytes) -> Iterator[Callable[[], bytes]]:
    """Yield functions that unpack the chunks of a block."""
    start = 0
    # version 0 begins a chunk header, other bytes a footer
    while start + 8 <= len(block) and block[start] == 0:
        packed_size = int.from_bytes(block[start + 1 : start + 4], "little")
        scheme, size = block[start + 4], int.from_bytes(block[start + 5 : start + 8], "little")
        yield partial(_unpack, block[start + 8 : start + 8 + packed_size], scheme, size)
        start += 8 + packed_size


def _unpack(data: bytes, scheme: int, size: int) -> bytes:
    """Return the `size` bytes of a packed chunk."""
    if scheme == STORED:
        return data
    plain: bytes = pa.decompress(data, decompressed_size=size, codec="lz4", asbytes=True)
    if scheme == LZ4:
        return plain
    assert scheme == GROUPED_LZ4, f"unknown compression {scheme}"
    # grouped: bytes 0, 4, 8, ... come first, then 1, 5, 9, ...
    whole, offset = bytearray(size), 0
    for group in range(4):
        count = (size - group + 3) // 4
        whole[group::4] = plain[offset : offset + count]
        offset += count
    return bytes(whole)


def recipes(shard: bytes) -> Iterator[tuple[str, list[Segment]]]:
    """Yield (sha256, segments) of each file in a recipe."""
    position = RECORD  # after the header of the shard
    while shard[position : position + 32] != b"\xff" * 32:  # end marker
        flags, count = struct.unpack_from("<II", shard, position + 32)
        starts = [position + RECORD * (index + 1) for index in range(count)]
        entries = [shard[start : start + RECORD] for start in starts]
        position += RECORD * (count + 1)
        if flags & HAS_VERIFICATION:
            position += RECORD * count
        if not flags & HAS_SHA256:
            raise HubError(400, "NoChecksum", "a file came without its sha256")
        sha256 = _hexadecimal(shard[position : position + 32])
        position += RECORD
        yield (
            sha256,
            [Segment(_hexadecimal(entry[:32]), *struct.unpack_from("<II", entry, 40)) for entry in entries],
        )


def _hexadecimal(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


async def token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Return the URL and the token for uploads of blocks."""
    hub.writable(request, kind, repo)
    until = int(time.time()) + 3600
    url = str(request.base_url).rstrip("/")
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": url, "accessToken": "xet", "exp": until}, headers=headers)


async def block(hub: Hub, request: Request, hash_: str) -> Response:
    """Receive a block."""
    data = await request.body()
    hub.received_bytes += len(data)
    hub.storage.path(f"xet-{hash_}").write_bytes(data)
    return JSONResponse({"was_inserted": True})


async def shard(hub: Hub, request: Request) -> Response:
    """Receive recipes, and assemble their files."""
    data = await request.body()
    hub.received_bytes += len(data)
    for sha256, segments in recipes(data):
        assemble(hub.storage, sha256, segments)
    return JSONResponse({"result": 1})


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", rf"{API}/xet-write-token/(?P<revision>[^/]+)", token),
    ("POST", r"/v1/xorbs/default/(?P<hash_>[0-9a-f]{64})", block),
    ("POST", r"/v1/shards", shard),
]
