"""Metadata: only pixels, color profile and orientation are left, and pixels are unchanged."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin

from pipeline.errors import ImageError
from pipeline.images import metadata
from pipeline.images.decode import ORIENTATION, check_image, has_heif, open_image, prepare_image
from pipeline.images.metadata import strip_metadata
from pipeline.images.near_duplicates import as_hashes, image_distances
from tests import media
from tests.pipeline.images.test_similarity import photo

GPS = 0x8825
SECRETS = (
    b"52.5200", b"PhotoSerial-4711", b"Ada Example", b"a private remark", b"ns.adobe.com/xap", b"8BIM",
    b"THUMBNAIL",
)  # fmt: skip
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:Description xmlns:xap="http://ns.adobe.com/xap/1.0/">52.5200 13.4000'
    b"</rdf:Description></x:xmpmeta>"
)


def exif_of(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x013B], exif[0x010E] = "PhotoSerial-4711", "Ada Example", "a private remark"
    if orientation != 1:
        exif[ORIENTATION] = orientation
    exif.get_ifd(GPS)[2] = (52.0, 31.0, 12.0)
    exif.get_ifd(GPS)[29] = "52.5200"
    return exif


def encoded(kind: str, image: Image.Image | None = None, **more: object) -> bytes:
    return media.encoded(image or photo(1), kind, **more)


def indexed(image: Image.Image, colors: int = 32) -> Image.Image:
    """Return an image with a palette, by the fast quantization method."""
    return image.quantize(colors, method=Image.Quantize.FASTOCTREE)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(orientation: int = 1, image: Image.Image | None = None, **more: object) -> bytes:
    """Return a photo with all kinds of metadata of a phone, and a second image after it."""
    more |= {"exif": exif_of(orientation), "icc_profile": PROFILE, "comment": b"a private remark"}
    plain = encoded("JPEG", image, **more)
    jfif = segment(0xE0, b"JFIF\0\x01\x02\0\0\1\0\1\1\1" + b"TNL") + segment(0xE0, b"JFXX\0\x10THUMBNAIL")
    apps = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    apps += segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + b"Ada Example")
    multi_picture = segment(0xE2, b"MPF\0PhotoSerial-4711")
    body = plain[2:]
    if body.startswith(b"\xff\xe0"):
        body = body[2 + struct.unpack(">H", body[2:4])[0] :]
    return b"\xff\xd8" + jfif + apps + multi_picture + body + b"THUMBNAIL" + encoded("JPEG", photo(2))


def png(orientation: int = 1, image: Image.Image | None = None, **more: object) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a private remark")
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    more |= {"exif": exif_of(orientation), "icc_profile": PROFILE}
    return encoded("PNG", image, pnginfo=info, **more) + b"THUMBNAIL"


def webp(orientation: int = 1, image: Image.Image | None = None, **more: object) -> bytes:
    more |= {"exif": exif_of(orientation), "icc_profile": PROFILE}
    return encoded("WEBP", image, xmp=XMP, **more) + b"THUMBNAIL"


def gif(image: Image.Image | None = None, **more: object) -> bytes:
    plain = encoded("GIF", indexed(image or photo(1), 64), comment=b"a private remark", **more)
    extension = b"\x21\xff\x0bXMP DataXMP" + bytes([len(XMP)]) + XMP + b"\0" + b"\x21\x01\x02a\x00\x00"
    header = 13 + (3 << (plain[10] & 7) + 1 if plain[10] & 0x80 else 0)
    return plain[:header] + extension + plain[header:] + b"THUMBNAIL"


def tiff(orientation: int = 1, image: Image.Image | None = None, **more: object) -> bytes:
    more |= {"exif": exif_of(orientation), "description": "a private remark"}
    return encoded("TIFF", image, **more) + b"THUMBNAIL"


def avif(orientation: int = 1) -> bytes:
    return encoded("AVIF", exif=exif_of(orientation), xmp=XMP)


def heic() -> bytes:
    has_heif()  # registers the HEIF encoder, which the extra `dev` installs
    return encoded("HEIF", exif=exif_of(), xmp=XMP)


Maker = Callable[..., bytes]
LOSSY = (webp, avif, heic)  # encoded again as JPEG


def leaked(data: bytes) -> list[bytes]:
    return [secret for secret in SECRETS if secret in data]


def bits_apart(data: bytes, other: bytes) -> int:
    hashes = [as_hashes([check_image(image).pdq_hash]) for image in (data, other)]
    return int(image_distances(*hashes, mirrored=False)[0, 0])


@pytest.mark.parametrize("make", [jpeg, png, webp, gif, tiff, avif, heic])
def test_metadata_is_removed_and_pixels_are_unchanged(make: Maker) -> None:
    data = make()
    assert leaked(data)
    clean = strip_metadata(data)
    assert leaked(clean) == []
    with Image.open(io.BytesIO(clean)) as image:
        assert not image.getexif()
        assert {"exif", "xmp", "comment", "photoshop"} & image.info.keys() == set()
        assert make not in LOSSY or image.format == "JPEG"
        if make in (jpeg, png, webp):
            assert image.info["icc_profile"] == PROFILE
    if make in LOSSY:
        assert bits_apart(clean, data) <= 8
    else:
        assert prepare_image(clean).tobytes() == prepare_image(data).tobytes()
    assert strip_metadata(clean) == clean


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("make", [jpeg, png, webp, tiff, avif])
def test_each_orientation_is_kept(make: Maker, orientation: int) -> None:
    data = make(orientation)
    clean = strip_metadata(data)
    assert leaked(clean) == []
    with Image.open(io.BytesIO(clean)) as image:
        assert set(image.getexif()) <= {ORIENTATION}
        upright = ImageOps.exif_transpose(image).convert("RGB")  # `datasets` does the same
    expected = prepare_image(data)
    assert upright.size == expected.size
    if make in LOSSY:
        assert bits_apart(clean, data) <= 8
    else:
        assert upright.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "plain",
    [
        encoded("JPEG"),
        encoded("JPEG", progressive=True),
        encoded("JPEG", photo(1).convert("L")),
        encoded("JPEG", photo(1).convert("CMYK")),
        encoded("JPEG", icc_profile=PROFILE * 40),  # the profile takes several segments
        encoded("PNG"),
        encoded("PNG", photo(1).convert("RGBA")),
    ],
)
def test_file_without_metadata_is_unchanged(plain: bytes) -> None:
    assert strip_metadata(plain) == plain


def test_all_frames_of_an_animated_png_are_kept() -> None:
    frames = [photo(n) for n in (1, 2, 3)]
    more = {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}
    data = encoded("PNG", frames[0], exif=exif_of(), **more)
    clean = strip_metadata(data)
    assert leaked(data) and leaked(clean) == []
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(clean)) as after:
        pairs = zip(ImageSequence.Iterator(before), ImageSequence.Iterator(after), strict=True)
        assert all(old.convert("RGB").tobytes() == new.convert("RGB").tobytes() for old, new in pairs)
        assert getattr(after, "n_frames", 1) == 3 and after.info.get("loop") == before.info.get("loop")


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (tiff(image=photo(1).convert("CMYK")), "RGB"),
        (tiff(image=photo(1).convert("RGBA")), "RGBA"),
        (tiff(image=indexed(photo(1)).convert("PA")), "RGBA"),
        (tiff(image=Image.new("I;16", (40, 30), 40_000)), "I;16"),
        (encoded("BMP"), "RGB"),
        (webp(lossless=True), "RGB"),
        (encoded("WEBP", Image.new("RGBA", (40, 30), (9, 99, 200, 128)), lossless=True), "RGBA"),
        (gif(), "P"),
        (encoded("GIF", indexed(photo(1)), save_all=True, append_images=[indexed(photo(2))]), "P"),
        (encoded("GIF", indexed(photo(1)), transparency=3), "P"),
    ],
)
def test_lossless_formats_other_than_png_become_png(data: bytes, mode: str) -> None:
    clean = strip_metadata(data)
    with Image.open(io.BytesIO(clean)) as image:
        assert (image.format, image.mode) == ("PNG", mode)
    assert prepare_image(clean).tobytes() == prepare_image(data).tobytes()


@pytest.mark.parametrize("make", [jpeg, png, webp, gif, tiff, heic])
def test_damaged_file_never_leaks_metadata(make: Maker) -> None:
    data, draw = make(), random.Random(7)
    for _ in range(150):
        damaged = bytearray(data[: draw.choice([len(data), draw.randrange(20, len(data))])])
        for _ in range(draw.randrange(1, 6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            clean = strip_metadata(bytes(damaged))
            check_image(clean)  # sources reject files that fail here, so metadata in them does no harm
        except ImageError:
            continue
        assert leaked(clean) == []


def test_file_with_many_segments_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def count(data: bytes) -> Any:
        opened.append(len(data))
        return open_image(data)

    monkeypatch.setattr(metadata, "open_image", count)
    plain = encoded("JPEG", exif=exif_of())
    data = plain[:2] + segment(0xE1, b"") * 3000 + plain[2:]
    assert leaked(strip_metadata(data)) == []
    assert len(opened) == 1


def test_only_color_transform_is_kept_from_adobe_segment() -> None:
    cmyk = encoded("JPEG", photo(1).convert("CMYK"))
    start = cmyk.index(b"Adobe") - 4
    secret = segment(0xEE, b"Adobe" + b"\0\x64SECR\0" + b"PhotoSerial-4711")
    data = cmyk[:start] + secret + cmyk[start + 16 :]
    clean = strip_metadata(data)
    assert b"SECR" not in clean and leaked(clean) == []
    assert prepare_image(clean).tobytes() == prepare_image(data).tobytes()
    assert strip_metadata(cmyk) == cmyk


def test_profile_name_and_trailing_data_in_icc_chunk_are_removed() -> None:
    named = encoded("PNG", icc_profile=PROFILE)
    profile = zlib.compress(PROFILE)
    content = b"Ada Example\0\0" + profile
    chunk = metadata._png_chunk(b"iCCP", content)
    start = named.index(b"iCCP") - 4
    (length,) = struct.unpack_from(">I", named, start)
    clean = strip_metadata(named[:start] + chunk + named[start + 12 + length :])
    assert leaked(clean) == []
    with Image.open(io.BytesIO(clean)) as image:
        assert image.info["icc_profile"] == PROFILE
