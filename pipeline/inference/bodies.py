"""Read the bodies of HTTP responses with bounds: a server may send without end, or a megabyte that inflates to gigabytes.

Sessions must be made with `auto_decompress=False`: aiohttp inflates a body before anybody can count its bytes.
"""

import json
import zlib
from typing import Any

import aiohttp

MAX_BODY_BYTES = 8_000_000  # of a list of models, or a page of metrics
MAX_ERROR_BYTES = 100_000
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_WINDOW_BITS = {"gzip": _GZIP_OR_ZLIB, "x-gzip": _GZIP_OR_ZLIB, "deflate": _GZIP_OR_ZLIB}


class BodyError(aiohttp.ClientError):
    """Raised for a body that is too large, or encoded in a way that was not asked for."""


async def read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body of a response, inflated, of at most `max_bytes`; of an error (status 400 and above), its beginning.

    Raise BodyError if it is larger, damaged, or in an unknown encoding. The time is bounded by the timeout of the session.
    """
    is_error = response.status >= 400
    bound = min(max_bytes, MAX_ERROR_BYTES) if is_error else max_bytes
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", *_WINDOW_BITS):
        raise BodyError(f"the body is encoded as {encoding[:40]}, which was not asked for")
    inflate = zlib.decompressobj(_WINDOW_BITS[encoding]) if encoding in _WINDOW_BITS else None
    body, sent_bytes = bytearray(), 0
    async for chunk in response.content.iter_any():
        sent_bytes += len(chunk)
        try:
            body += inflate.decompress(chunk, bound + 1 - len(body)) if inflate else chunk
        except zlib.error as error:
            raise BodyError(f"the body is not {encoding}: {error}") from None
        if inflate and inflate.eof:  # what follows would only be kept by the decompressor
            response.close()
            break
        if len(body) > bound or sent_bytes > bound + MAX_BODY_BYTES:
            response.close()  # the rest is not wanted: the connection cannot be used again
            if is_error:
                break
            raise BodyError(f"the body has more than {max_bytes:,} bytes")
    if inflate and not inflate.eof and not is_error:
        raise BodyError(f"the body ends within its {encoding} stream")
    return bytes(body[:bound])


def parse_json(body: bytes | str) -> Any:
    """Parse JSON. Raise ValueError for anything else, also if it is nested more deeply than Python's stack."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
