"""Request images: sent unchanged if possible, or else as upright RGB JPEGs within the pixel limit."""

import asyncio
import base64
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.inference.protocol import RequestImages, reencode, sendable_format


def encoded(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(out, kind, **options)
    return out.getvalue()


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


def test_large_image_is_scaled_down_and_keeps_its_aspect() -> None:
    image = encoded(size=(600, 400))
    assert sendable_format(image, 60_000) is None
    assert sendable_format(image, 240_000) == "jpeg"
    with Image.open(io.BytesIO(reencode(image, 60_000))) as decoded:
        assert decoded.width * decoded.height <= 60_000
        assert decoded.width / decoded.height == pytest.approx(1.5, abs=0.02)


def part(request_images: RequestImages, image: bytes) -> dict[str, Any]:
    parts = asyncio.run(request_images.parts(hashlib.sha256(image).hexdigest(), (image,)))
    content: dict[str, Any] = json.loads(parts)
    return content


@pytest.mark.parametrize("image", [encoded(), turned()], ids=["unchanged", "re-encoded"])
def test_uuid_is_the_hash_of_the_sent_bytes(tmp_path: Path, image: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:
        inline = part(RequestImages(None, None, None, pool), image)
        by_path = part(RequestImages(tmp_path, None, None, pool), image)
    head, _, data = inline["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    sent = base64.b64decode(data)
    assert inline["uuid"] == hashlib.sha256(sent).hexdigest()
    assert by_path["uuid"] == inline["uuid"]
    assert Path(by_path["image_url"]["url"].removeprefix("file://")).read_bytes() == sent


def test_requests_of_an_image_share_one_encoding_and_old_images_are_dropped(tmp_path: Path) -> None:
    images = [encoded(size=(30 + n, 30)) for n in range(5)]

    async def all_parts() -> None:
        with ThreadPoolExecutor(1) as pool:
            request_images = RequestImages(tmp_path, None, None, pool)
            request_images.keep = 3
            for image in images:
                name = hashlib.sha256(image).hexdigest()
                first, second = await asyncio.gather(
                    request_images.parts(name, (image,)), request_images.parts(name, (image,))
                )
                assert first is second

    asyncio.run(all_parts())
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{hashlib.sha256(image).hexdigest()}-0" for image in images[2:]
    }


def test_reused_image_is_dropped_last(tmp_path: Path) -> None:
    images = {name: encoded(size=(30 + number, 30)) for number, name in enumerate("abc")}

    async def send(names: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            request_images = RequestImages(tmp_path, None, None, pool)
            request_images.keep = 2
            for name in names:
                await request_images.parts(name, (images[name],))

    asyncio.run(send("abac"))
    assert {path.name for path in tmp_path.iterdir()} == {"a-0", "c-0"}
