"""Decode images safely: all untrusted bytes become pixels here.

Training, every engine and the report use `prepare_image`, so that models always see the same pixels of an image.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
import pdqhash
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import ImageError, one_line
from pipeline.images.upright import over_white

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif"}
)
ORIENTATION = 0x0112  # a tag of EXIF
SIDEWAYS = (5, 6, 7, 8)  # its values of images that are turned by a quarter
MAX_IMAGE_BYTES = 100_000_000  # of a file, or an image in a row of a table
MAX_PIXELS = 50_000_000  # a 12 kB file can claim 100 million; checked before decoding
MAX_ASPECT = 100  # Qwen2.5-VL's processor refuses 200
MAX_SCANS = 100  # of a progressive JPEG: encoders write about ten
_JPEG, _JPEG_FORMATS = b"\xff\xd8", ("JPEG", "MPO")
_SCAN = re.compile(rb"\xff\xda")  # three times as fast as bytes.count
UPRIGHT_QUALITY = 95  # of a JPEG that is encoded anew, since it was turned
HASH_SIDE_PX = 64
MIN_HASHED_SIDE_PX = 512  # the shorter side of a large JPEG that is decoded for its hash (docs/measurements.md)
MIN_PDQ_QUALITY = 50  # of 100, as PDQ's authors advise
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def image_id(data: bytes) -> str:
    """Return the id of an image: the sha256 of its file."""
    return hashlib.sha256(data).hexdigest()


def deck_id(page_ids: Sequence[str]) -> str:
    """Return the id of a deck: the sha256 of its pages' ids, in order. A deck of one page has the id of that page."""
    return page_ids[0] if len(page_ids) == 1 else hashlib.sha256("".join(page_ids).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Facts of an image that decodes in full: its upright size, and its PDQ hash (`pdq_hash`)."""

    width_px: int
    height_px: int
    pdq_hash: bytes


def check_image(data: bytes) -> ImageInfo:
    """Decode all of an image, and return its size and PDQ hash. Raise ImageError if it is damaged, odd or too large."""
    image, (width_px, height_px) = _decode_for_hash(data)
    pdq = pdq_hash(image)
    if not pdq and image.mode == "L":  # its detail may be in its colors
        pdq = pdq_hash(_decode(data)[0])
    return ImageInfo(width_px, height_px, pdq)


def pdq_hash(image: Image.Image) -> bytes:
    """Return the PDQ hash (Facebook, 2019) of an image in RGB or L: 32 bytes, of which few bits change with size or quality.

    The hash is empty if the image has too little detail. It is computed from 64 x 64 pixels, to which PDQ itself downsamples:
    four times as fast as from 256 x 256, and as stable (docs/measurements.md).
    """
    small = image.resize((HASH_SIDE_PX, HASH_SIDE_PX), Image.Resampling.BOX)
    bits, quality = pdqhash.compute(np.asarray(small.convert("RGB")))
    return np.packbits(bits).tobytes() if quality >= MIN_PDQ_QUALITY else b""


def prepare_image(data: bytes | memoryview, max_pixels: int | None = None) -> Image.Image:
    """Decode to upright RGB over white, and scale down (never up) to `max_pixels`. Raise ImageError as `check_image` does."""
    rgb, _ = _decode(data)
    size = scaled_size(*rgb.size, max_pixels)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS)


def decode_for_hash(data: bytes) -> Image.Image:
    """Return an image to hash, upright: the luma of a JPEG, which is reduced if it is large, or RGB over white.

    Raise ImageError as `check_image` does.
    """
    return _decode_for_hash(data)[0]


def _decode_for_hash(data: bytes) -> tuple[Image.Image, tuple[int, int]]:
    try:
        return _decode(data, for_hash=True)
    except ImageError:
        if not data.startswith(_JPEG):
            raise
        return _decode(data)  # a lossless JPEG cannot be decoded as luma; what is damaged is refused again


def _decode(data: bytes | memoryview, *, for_hash: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """Return an image, upright in RGB over white, and its size.

    With `for_hash`, the colors of a JPEG are parsed and not decoded: PDQ looks at the luma alone. The sides of a large one are
    halved up to three times while both keep MIN_HASHED_SIDE_PX. Still what is damaged is found, since all is parsed.
    """
    with open_image(data) as image:
        size_px, upright_px = image.size, _upright_size(image)
        if for_hash:
            image.draft("L" if _has_usual_sampling(image) else None, (MIN_HASHED_SIDE_PX, MIN_HASHED_SIDE_PX))
        is_reduced = image.size != size_px
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a large image would take its memory twice
        is_luma = for_hash and image.format in _JPEG_FORMATS and image.mode == "L"
        upright = image if is_luma else over_white(image)
        return upright, upright_px if is_reduced else upright.size


def _has_usual_sampling(image: Image.Image) -> bool:
    """Return whether the sides of a JPEG's colors are whole fractions of those of its luma: others libjpeg cannot enlarge."""
    layers: list[tuple[int, int, int, int]] = getattr(image, "layer", [])  # number, rows, columns, and table of each
    rows, columns = ([layer[side] for layer in layers] for side in (1, 2))
    return all(max(of_side) % one == 0 for of_side in (rows, columns) for one in of_side)


def upright_file(data: bytes) -> bytes:
    """Return the file of an image whose pixels stand upright: the same, or another of its format, as JPEG of UPRIGHT_QUALITY.

    Raise ImageError as `check_image` does.
    """
    with open_image(data, counts_scans=False) as header:
        if header.getexif().get(ORIENTATION, 1) not in range(2, 9) or header.format == "TIFF":
            return data
    with open_image(data) as image:
        kind, profile = ("JPEG" if image.format == "MPO" else image.format), image.info.get("icc_profile")
        file = io.BytesIO()
        upright = ImageOps.exif_transpose(image)
        options = (
            {"quality": UPRIGHT_QUALITY, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
        )
        upright.save(file, kind, icc_profile=profile, exif=b"", **options)
        return file.getvalue()


def scaled_size(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """Return the size of an image that is scaled down, never up, to at most about so many pixels."""
    if not max_pixels or width * height <= max_pixels:
        return width, height
    scale = (max_pixels / (width * height)) ** 0.5
    return max(1, round(width * scale)), max(1, round(height * scale))


def upright_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return the width and height in pixels of an image as its header says. Raise ImageError as `check_image` does."""
    with open_image(data, counts_scans=False) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":  # Pillow turns its size when it is opened
        return image.size
    is_turned = image.getexif().get(ORIENTATION) in SIDEWAYS  # files hold other numbers, and texts, which mean nothing
    return image.size[::-1] if is_turned else image.size


@contextmanager
def open_image(data: bytes | memoryview, *, counts_scans: bool = True) -> Iterator[Image.Image]:
    """Yield an image whose header is read; its pixels are decoded by `load`. Errors within the context become ImageError.

    Only where pixels are decoded do many scans matter, whose counting takes longer than the header (`counts_scans`).
    """
    formats = (*FORMATS, "HEIF") if is_heic(data) and has_heif() else FORMATS
    try:
        # Pillow warns about every odd tag. `catch_warnings` would set what threads share, and images are read in several.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(image)
            if counts_scans and image.format in _JPEG_FORMATS and any(islice(_SCAN.finditer(data), MAX_SCANS, None)):
                raise too_many_scans()
            if image.mode in ("I", "F"):
                raise ImageError("unsupported_depth", f"pixels of 32 bits ({image.mode}) have no known range")
            yield image
    except Image.DecompressionBombError:
        raise ImageError("too_many_pixels", f"more than {MAX_PIXELS:,} pixels") from None
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("too_much_memory", "it takes more memory than there is to decode it") from None
    except UnidentifiedImageError:
        if is_heic(data) and not has_heif():
            raise ImageError("unsupported_format", "HEIC needs the package pillow-heif") from None
        raise ImageError("unreadable_image", "not an image of a known format") from None
    except Exception as error:  # noqa: BLE001  # Pillow's decoders raise any exception on damaged files
        raise ImageError("unreadable_image", one_line(error)) from None


def too_many_scans() -> ImageError:
    """Return why a JPEG that takes very long to decode is refused."""
    return ImageError("too_many_scans", f"more than {MAX_SCANS} scans, each of which is decoded")


def is_heic(data: bytes | memoryview) -> bool:
    """Return whether a file claims to be HEIC, the format of photos of many phones."""
    return bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in HEIC_BRANDS


@cache
def has_heif() -> bool:
    """Return whether HEIC can be read: by the package pillow-heif, which is registered."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _check_size(image: Image.Image) -> None:
    width_px, height_px = image.size
    if width_px * height_px > MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{width_px} x {height_px} px is more than {MAX_PIXELS:,} pixels")
    if max(width_px, height_px) > MAX_ASPECT * min(width_px, height_px):
        raise ImageError("too_narrow", f"{width_px} x {height_px} px: one side is over {MAX_ASPECT} times the other")
