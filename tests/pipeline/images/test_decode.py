"""Image decoding: valid images become upright RGB, and unusable images are refused with a reason."""

import io
import struct
import zlib

import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images import decode
from pipeline.images.decode import (
    MAX_SCANS,
    MIN_HASHED_SIDE_PX,
    check_image,
    pdq_hash,
    prepare_image,
    upright_size,
)
from pipeline.images.near_duplicates import MAX_COPY_BITS, as_hashes, image_distances
from tests.media import encoded
from tests.pipeline.images.test_metadata import segment
from tests.pipeline.images.test_similarity import photo


def test_16_bit_image_is_scaled_and_32_bit_image_is_refused() -> None:
    assert prepare_image(encoded(Image.new("I;16", (4, 4), 128 * 257))).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ImageError) as caught:
        prepare_image(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))
    assert caught.value.reason == "unsupported_depth"


def test_only_large_image_is_scaled_down() -> None:
    data = encoded(Image.new("RGB", (200, 100)))
    assert prepare_image(data, max_pixels=5000).size == (100, 50)
    assert prepare_image(data, max_pixels=50_000).size == (200, 100)


def bomb(width_px: int, height_px: int) -> bytes:
    """Return a small PNG whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width_px.to_bytes(4, "big") + height_px.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b""), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks.items())


GOOD = encoded(Image.effect_noise((64, 64), 50), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_image"), (b"not an image", "unreadable_image"),
        (GOOD[: len(GOOD) // 2], "unreadable_image"), (bomb(10_000, 10_000), "too_many_pixels"),
        (bomb(100_000, 100_000), "too_many_pixels"), (encoded(Image.new("RGB", (500, 2))), "too_narrow"),
    ],
)  # fmt: skip
def test_unusable_file_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        check_image(data)
    assert caught.value.reason == reason
    assert "0x" not in str(caught.value)  # the message contains no memory address


def test_limit_of_pillow_is_unchanged_for_other_code_in_the_process() -> None:
    assert Image.MAX_IMAGE_PIXELS == (1 << 30) // 4 // 3


def distance(pdq_hash: bytes, other: bytes) -> int:
    return int(image_distances(as_hashes([pdq_hash]), as_hashes([other]), mirrored=False)[0, 0])


@pytest.fixture(scope="module")
def large() -> Image.Image:
    """A photo of six megapixels."""
    return photo(3).resize((2880, 2160), Image.Resampling.BICUBIC)


def test_hash_from_decoding_at_reduced_size_is_near_the_hash_at_full_size(
    large: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This function decodes at full size, and must not be called.
    monkeypatch.setattr(decode, "prepare_image", None)
    info = check_image(encoded(large, "JPEG", quality=90))
    assert (info.width_px, info.height_px) == large.size
    assert distance(info.pdq_hash, pdq_hash(large)) <= MAX_COPY_BITS // 4


def test_large_sideways_photo_is_rotated(large: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = check_image(encoded(large, "JPEG", exif=exif))
    assert (info.width_px, info.height_px) == large.size[::-1]
    upright = check_image(encoded(large.transpose(Image.Transpose.ROTATE_270), "JPEG"))
    assert distance(info.pdq_hash, upright.pdq_hash) <= MAX_COPY_BITS


@pytest.mark.parametrize(
    "sampling", [(0x31, 0x21, 0x11), (0x13, 0x12, 0x11)], ids=["in a row", "in a column"]
)
def test_jpeg_with_fractional_subsampling_is_refused(sampling: tuple[int, ...]) -> None:
    data = bytearray(encoded(photo(3).resize((96, 72)), "JPEG", subsampling=0))
    frame = data.find(b"\xff\xc0")
    for component, of_component in enumerate(sampling):
        data[frame + 11 + 3 * component] = of_component
    for decoder in (check_image, prepare_image):
        with pytest.raises(ImageError):
            decoder(bytes(data))


def test_large_lossless_jpeg_is_decoded_in_full() -> None:
    side_px = 2 * MIN_HASHED_SIDE_PX  # lossy JPEGs of this size are decoded at reduced size
    frame = segment(0xC3, struct.pack(">BHHB", 8, side_px, side_px, 3) + b"R\x11\0G\x11\0B\x11\0")
    table = segment(0xC4, b"\0\1" + bytes(16))
    scan = segment(0xDA, b"\3R\0G\0B\0\1\0\0") + bytes(3 * side_px**2 // 8)
    info = check_image(b"\xff\xd8" + frame + table + scan + b"\xff\xd9")
    assert (info.width_px, info.height_px) == (side_px, side_px)


def test_mpo_with_many_scans_is_refused() -> None:
    jpeg = encoded(photo(3), "JPEG", progressive=True)
    last_scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    many = jpeg[:-2] + last_scan * MAX_SCANS + jpeg[-2:]
    mpo = encoded(photo(3), "MPO", save_all=True, append_images=[photo(4)])
    start = mpo.find(b"\xff\xe2")
    index = mpo[start : start + 2 + int.from_bytes(mpo[start + 2 : start + 4])]
    for data, kind in ((many, "JPEG"), (many[:2] + index + many[2:], "MPO")):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == kind
        with pytest.raises(ImageError) as caught:
            check_image(data)
        assert caught.value.reason == "too_many_scans"


def test_truncated_large_jpeg_is_refused(large: Image.Image) -> None:
    data = encoded(large, "JPEG")
    with pytest.raises(ImageError) as caught:
        check_image(data[: int(len(data) * 0.999)])
    assert caught.value.reason == "unreadable_image"


def exif_of(orientation: int, kind: int) -> bytes:
    """Return EXIF data whose orientation has the TIFF type `kind` (2: text, 3: number, 7: bytes)."""
    entry = struct.pack("<HHIHH", 0x0112, kind, 1, orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)


@pytest.mark.parametrize(("orientation", "kind"), [(9, 3), (ord("6"), 2)])
def test_invalid_orientation_is_ignored(orientation: int, kind: int, large: Image.Image) -> None:
    info = check_image(encoded(large.resize((80, 60)), "JPEG", exif=exif_of(orientation, kind)))
    assert (info.width_px, info.height_px) == (80, 60)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_upright_size_matches_rotated_pixels(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(1).resize((60, 40)), kind, exif=exif)
    info = check_image(data)
    assert (info.width_px, info.height_px) == prepare_image(data).size == upright_size(data)
