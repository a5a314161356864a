"""Images as sent to a server: the bytes of the source if usable, else re-encoded as upright RGB JPEG within bounds.

To a server that keeps images an image may be named by its uuid alone.
"""

import asyncio
import base64
import hashlib
import io
import json
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ImageError
from pipeline.images.decode import ORIENTATION, open_image, prepare_image
from pipeline.tasks.prompts import user_content

MAX_BYTES = 1_000_000  # a larger file is re-encoded, since the server decodes it on one thread
QUALITY = 92
_SENDABLE_FORMATS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class ImageParts:
    """The JSON of the message parts of images, joined by commas: with their bytes, and with their names alone."""

    whole: bytes
    named: bytes


class RequestImages:
    """Encodes the images of requests in flight, once for all requests about the same images.

    `keep` image sets are cached; older ones are dropped, and encoded again if needed. `media` is a folder that the server
    reads: images are then sent as file:// URLs and not within the request. An image above `max_pixels` is scaled down, and the
    pages of a deck to `max_sample_pixels` in total.
    """

    def __init__(self, media: Path | None, max_pixels: int | None, max_sample_pixels: int | None, pool: Executor) -> None:
        self.keep = 256
        self._media = media
        self._max_pixels = max_pixels
        self._max_sample_pixels = max_sample_pixels
        self._pool = pool
        self._encoded: dict[str, asyncio.Future[ImageParts]] = {}
        self._files: dict[str, list[Path]] = {}
        self._encoded_count = self._encoded_bytes = 0

    def bound(self, in_flight_bytes: int) -> int:
        """Return how many requests may be in flight for their images to have about `in_flight_bytes` at most."""
        mean = self._encoded_bytes / self._encoded_count if self._encoded_count else 1
        return max(4, int(in_flight_bytes / max(mean, 1)))

    async def parts(self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None = None) -> ImageParts:
        """Return the message parts of images, in the order of tasks.prompts.user_content.

        `shown` is the key of the images (Request.shown), which may be empty; `pages` are their numbers within a document.
        The uuid of an image is the sha256 of the sent bytes, by which a server may find it in its cache.
        """
        future = self._encoded.get(shown)
        if future is None or (future.done() and future.exception()):
            future = asyncio.ensure_future(self._make(shown, images, pages))
            self._encoded[shown] = future
            while len(self._encoded) > self.keep:
                self._drop(next(iter(self._encoded)))
        elif shown:  # one that is used again is dropped last: a server may not have read its file yet
            self._encoded[shown] = self._encoded.pop(shown)
        return await asyncio.shield(future)

    def max_pixels(self, num_images: int) -> int | None:
        """Return the pixels to which each image of a request is scaled down; None if no image is."""
        bounds = [self._max_pixels, self._max_sample_pixels and self._max_sample_pixels // max(1, num_images)]
        return min((limit for limit in bounds if limit), default=None)

    async def _make(self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None) -> ImageParts:
        bound = self.max_pixels(len(images))
        encoded = [await self._part(image, bound, shown) for image in images]
        self._encoded_count += 1
        return ImageParts(*(_joined([getattr(part, kind) for part in encoded], pages) for kind in ("whole", "named")))

    async def _part(self, image: bytes, bound: int | None, shown: str) -> ImageParts:
        kind = sendable_format(image, bound)
        data = image  # the source step has removed its metadata
        if kind is None:
            data = await asyncio.get_running_loop().run_in_executor(self._pool, reencode, image, bound)
        uuid = hashlib.sha256(data).hexdigest()
        named = named_image(uuid)
        if self._media is None:
            values = (kind or "jpeg").encode(), base64.b64encode(data), uuid.encode()
            whole = b'{"type":"image_url","image_url":{"url":"data:image/%s;base64,%s"},"uuid":"%s"}' % values
            self._encoded_bytes += len(whole)
            return ImageParts(whole, named)
        files = self._files.setdefault(shown, [])
        files.append(self._media / f"{shown}-{len(files)}")
        files[-1].write_bytes(data)
        self._encoded_bytes += len(data)  # the folder is in memory, too
        url = {"type": "image_url", "image_url": {"url": files[-1].as_uri()}, "uuid": uuid}
        return ImageParts(json.dumps(url).encode(), named)

    def _drop(self, shown: str) -> None:
        del self._encoded[shown]
        for file in self._files.pop(shown, []):
            file.unlink(missing_ok=True)


def named_image(uuid: str) -> bytes:
    """Return the JSON of the message part of an image that the server has under this uuid."""
    return b'{"type":"image_url","image_url":null,"uuid":"%s"}' % uuid.encode()


def _joined(images: list[bytes], pages: tuple[int, ...] | None) -> bytes:
    parts = user_content(images, "", pages)[:-1]
    return b",".join(part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts)


def sendable_format(image: bytes, max_pixels: int | None) -> str | None:
    """Return the format of an image that can be sent unchanged, from its header alone; None if it must be re-encoded."""
    # A second frame may be damaged: the first one is re-encoded.
    with suppress(ImageError), open_image(image, counts_scans=False) as header:
        kind = _SENDABLE_FORMATS.get(header.format or "")
        plain = header.mode == "RGB" or (header.mode == "L" and kind == "jpeg")
        turned = "exif" in header.info and header.getexif().get(ORIENTATION, 1) != 1
        moving = getattr(header, "is_animated", False)
        small = len(image) <= MAX_BYTES and (max_pixels is None or header.width * header.height <= max_pixels)
        return kind if plain and small and not turned and not moving and "transparency" not in header.info else None
    return None


def reencode(image: bytes, max_pixels: int | None) -> bytes:
    """Return the image as an upright RGB JPEG of at most `max_pixels`."""
    out = io.BytesIO()
    prepare_image(image, max_pixels).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
