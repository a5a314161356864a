"""Request images: sent unchanged if possible, or else as upright RGB JPEGs within the pixel limit."""

import asyncio
import base64
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from pipeline.config.files import resolve
from pipeline.inference.protocol import RequestImages, reencode, sendable_format
from pipeline.inference.requests import build_requests
from pipeline.types import Request
from tests import media
from tests.plans import request_plan


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    return media.encoded(Image.effect_noise(size, 50).convert(mode), kind, **options)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "L"), ("PNG", "RGB")])
def test_plain_image_is_sent_unchanged(kind: str, mode: str) -> None:
    assert sendable_format(encoded(kind, mode), None) == kind.lower()


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (encoded("PNG", "RGBA"), (60, 40)),
        (encoded("JPEG", "CMYK"), (60, 40)),
        (encoded("BMP"), (60, 40)),
        (turned(), (40, 60)),
    ],
    ids=["alpha", "cmyk", "bmp", "turned"],
)
def test_unsupported_or_rotated_image_is_reencoded_upright(image: bytes, size: tuple[int, int]) -> None:
    assert sendable_format(image, None) is None
    with Image.open(io.BytesIO(reencode(image, None))) as decoded:
        assert (decoded.format, decoded.mode, decoded.size) == ("JPEG", "RGB", size)


def test_large_image_is_scaled_down_to_whole_patches() -> None:
    image = encoded(size=(600, 400))
    assert sendable_format(image, 60_000) is None
    assert sendable_format(image, 240_000) == "jpeg"
    with Image.open(io.BytesIO(reencode(image, 60_000))) as decoded:
        assert decoded.size == (280, 196)  # whole patches of 28 px


def request(image: bytes, name: str = "a", max_pixels: int | None = None) -> Request:
    (first, *_) = build_requests(name * 64, request_plan(resolve(source="scenes")))
    return replace(first, images=(image,), max_pixels=max_pixels)


@pytest.mark.parametrize("image", [encoded(), turned()], ids=["unchanged", "re-encoded"])
def test_uuid_is_the_hash_of_the_sent_bytes(image: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        images = RequestImages(pool)
        part: dict[str, Any] = json.loads(asyncio.run(images.parts(request(image))))
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert part["uuid"] == hashlib.sha256(base64.b64decode(data)).hexdigest()


def test_requests_of_an_image_share_one_encoding_and_unused_images_are_dropped() -> None:
    images = {name: encoded(size=(30 + number, 30)) for number, name in enumerate("abcd")}

    async def send() -> list[bytes]:
        with ThreadPoolExecutor(1) as pool:
            request_images = RequestImages(pool)
            request_images.keep = 2
            return [await request_images.parts(request(images[name], name)) for name in "abacab"]

    a, b, a_again, _, a_kept, b_new = asyncio.run(send())
    assert a is a_again is a_kept
    assert b == b_new and b is not b_new
