"""An image as a server gets it: the bytes of the source where they will do, else upright RGB within bounds, as JPEG."""

import asyncio
import base64
import hashlib
import io
import json
from concurrent.futures import Executor
from pathlib import Path

from PIL import Image

from pipeline.images.decode import prepare_image
from pipeline.tasks.prompts import user_content

MAX_BYTES = 1_000_000  # above this a photo is encoded anew: the server decodes it on one thread
QUALITY = 92
_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112  # EXIF


class RequestImages:
    """The images of requests that are under way, each sample's made once for all that is asked of it.

    Args:
        media: a folder that the server reads; images then travel as file:// and not within the request.
        max_pixels: a larger image is scaled down.
        max_sample_pixels: pages of a deck are scaled down further, so that all of them together have no more than this.
        keep: how many samples may be in use at once; older ones are dropped, and made again if need be.
    """

    def __init__(self, media: Path | None, max_pixels: int | None, max_sample_pixels: int | None, pool: Executor) -> None:
        self.keep = 256
        self._media = media
        self._max_pixels = max_pixels
        self._max_sample_pixels = max_sample_pixels
        self._pool = pool
        self._made: dict[str, asyncio.Future[bytes]] = {}
        self._files: dict[str, list[Path]] = {}
        self._made_count = self._made_bytes = 0

    def bound(self, in_flight_bytes: int) -> int:
        """Return how many requests may be under way at once, for their images to have about so many bytes at most."""
        mean = self._made_bytes / self._made_count if self._made_count else 1
        return max(4, int(in_flight_bytes / max(mean, 1)))

    async def parts(self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None = None) -> bytes:
        """Return the JSON of the message parts that show images, joined by commas, in the order of prompt.user_content.

        `shown` names the images (Request.shown), of which there may be none; `pages` are their numbers within a document.

        The uuid of an image is the hash of the bytes that are sent: a server may show a cached image for it without looking.
        """
        made = self._made.get(shown)
        if made is None or (made.done() and made.exception()):
            made = asyncio.ensure_future(self._make(shown, images, pages))
            self._made[shown] = made
            while len(self._made) > self.keep:
                self._drop(next(iter(self._made)))
        return await asyncio.shield(made)

    async def _make(self, shown: str, images: tuple[bytes, ...], pages: tuple[int, ...] | None) -> bytes:
        bounds = [self._max_pixels, self._max_sample_pixels and self._max_sample_pixels // max(1, len(images))]
        bound = min((each for each in bounds if each), default=None)
        parts = user_content([await self._part(image, bound, shown) for image in images], "", pages)[:-1]
        joined = b",".join(part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts)
        self._made_count += 1
        self._made_bytes += len(joined)
        return joined

    async def _part(self, image: bytes, bound: int | None, shown: str) -> bytes:
        data, kind = image, fits(image, bound)
        if kind is None:
            loop = asyncio.get_running_loop()
            data, kind = await loop.run_in_executor(self._pool, reencode, image, bound), "jpeg"
        uuid = hashlib.sha256(data).hexdigest()
        if self._media is None:
            return b'{"type":"image_url","image_url":{"url":"data:image/%s;base64,%s"},"uuid":"%s"}' % (
                kind.encode(),
                base64.b64encode(data),
                uuid.encode(),
            )
        files = self._files.setdefault(shown, [])
        files.append(self._media / f"{shown}-{len(files)}")
        files[-1].write_bytes(data)
        return json.dumps({"type": "image_url", "image_url": {"url": files[-1].as_uri()}, "uuid": uuid}).encode()

    def _drop(self, shown: str) -> None:
        del self._made[shown]
        for file in self._files.pop(shown, []):
            file.unlink(missing_ok=True)


def fits(image: bytes, max_pixels: int | None) -> str | None:
    """Return the type of an image that can be sent as it is, from its header alone; None where it must be made anew."""
    with Image.open(io.BytesIO(image)) as header:
        kind = _AS_THEY_ARE.get(header.format or "")
        plain = header.mode == "RGB" or (header.mode == "L" and kind == "jpeg")
        turned = "exif" in header.info and header.getexif().get(_ORIENTATION, 1) != 1
        moving = getattr(header, "is_animated", False)
        small = len(image) <= MAX_BYTES and (max_pixels is None or header.width * header.height <= max_pixels)
        return kind if plain and small and not turned and not moving and "transparency" not in header.info else None


def reencode(image: bytes, max_pixels: int | None) -> bytes:
    """Return the image as JPEG, upright, RGB, within the bound."""
    out = io.BytesIO()
    prepare_image(image, max_pixels).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
