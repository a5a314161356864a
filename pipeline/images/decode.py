"""Decode untrusted image files safely. No other module decodes them.

Training, engines and the report use `prepare_image`, so that all models see the same pixels.
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
from math import floor, prod
from typing import Any

import numpy as np
import pdqhash
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import ImageError, one_line
from pipeline.images.upright import over_white

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_SUFFIXES = ".jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif .heic .heif .hif"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
ORIENTATION = 0x0112  # EXIF tag
ROTATED_90 = (5, 6, 7, 8)
MAX_IMAGE_BYTES = 100_000_000
PATCH_PX = 28  # one image token of Qwen2.5-VL covers 28 x 28 px: 2 x 2 patches of 14 px
MAX_PIXELS = 50_000_000  # checked before decoding, because a 12 kB file can claim 100 million pixels
MAX_ASPECT_RATIO = 100  # below the limit of Qwen2.5-VL's processor, which is 200
MAX_SCANS = 100  # more take too long to decode; a progressive JPEG usually has about ten
_JPEG_FORMATS = ("JPEG", "MPO")
# This pattern counts scans three times as fast as bytes.count.
_SCAN = re.compile(rb"\xff\xda")
JPEG_QUALITY = 95
HASH_SIDE_PX = 64
MIN_HASHED_SIDE_PX = 1024
# PDQ's authors recommend this limit. The best quality is 100.
MIN_PDQ_QUALITY = 50


def image_id(data: bytes) -> str:
    """Return the id of an image: the sha256 of its file."""
    return hashlib.sha256(data).hexdigest()


def deck_id(page_ids: Sequence[str]) -> str:
    """Return the id of a document: the sha256 of its page ids in order. A single page keeps its own id."""
    return page_ids[0] if len(page_ids) == 1 else hashlib.sha256("".join(page_ids).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The upright size, PDQ hash and contrast of a fully decoded image."""

    width_px: int
    height_px: int
    pdq_hash: bytes
    contrast: float


def check_image(data: bytes) -> ImageInfo:
    """Decode a whole image. Raises ImageError if it is damaged, too large, or too narrow.

    The contrast is the largest difference of a color channel (0 to 255) between two cells of a 64 x 64 grid.
    """
    try:
        image, (width_px, height_px) = _decode_reduced(data)
    except ImageError:  # a lossless JPEG cannot be reduced
        image = prepare_image(data)
        width_px, height_px = image.size
    contrast = float(np.ptp(_small(image), axis=(0, 1)).max())
    return ImageInfo(width_px, height_px, pdq_hash(image), contrast)


def _decode_reduced(data: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """Return an upright RGB image on white, and its full size. A large JPEG is decoded at a reduced size."""
    with open_image(data) as image:
        size_px, upright_px = image.size, _upright_size(image)
        image.draft(None, (MIN_HASHED_SIDE_PX, MIN_HASHED_SIDE_PX))
        is_reduced = image.size != size_px
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = over_white(image)
    return rgb, upright_px if is_reduced else rgb.size


def _small(image: Image.Image) -> "np.ndarray[Any, Any]":
    """Return an RGB image reduced to HASH_SIDE_PX by HASH_SIDE_PX, [64, 64, 3]."""
    return np.asarray(image.resize((HASH_SIDE_PX, HASH_SIDE_PX), Image.Resampling.BOX))


def pdq_hash(image: Image.Image) -> bytes:
    """Return the PDQ hash (Facebook, 2019) of an RGB image (32 bytes), or b"" if it has little detail.

    The image is first reduced to 64 x 64 pixels, as in PDQ itself.
    """
    bits, quality = pdqhash.compute(_small(image))
    return np.packbits(bits).tobytes() if quality >= MIN_PDQ_QUALITY else b""


def prepare_image(
    data: bytes | memoryview, max_pixels: int | None = None, *, for_model: bool = False
) -> Image.Image:
    """Decode to upright RGB on a white background, scaled down to `max_pixels`.

    Raises ImageError as `check_image` does.
    """
    with open_image(data) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = over_white(image)
    size = (sent_size if for_model else scaled_size)(*rgb.size, max_pixels)
    return rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS)


def upright_file(data: bytes) -> tuple[bytes, str]:
    """Return an image file and its format. The file is encoded again in this format if EXIF rotates it.

    Raises ImageError as `check_image` does.
    """
    with open_image(data, counts_scans=False) as header:
        if header.getexif().get(ORIENTATION, 1) not in range(2, 9) or header.format == "TIFF":
            return data, header.format or ""
    with open_image(data) as image:
        kind, profile = ("JPEG" if image.format == "MPO" else image.format), image.info.get("icc_profile")
        file = io.BytesIO()
        options: dict[str, dict[str, Any]] = {
            "JPEG": {"quality": JPEG_QUALITY, "subsampling": 0},
            "WEBP": {"lossless": True},
        }
        upright = ImageOps.exif_transpose(image)
        upright.save(file, kind, icc_profile=profile, exif=b"", **options.get(kind or "", {}))
        return file.getvalue(), kind or ""


def scaled_size(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """Return the size of an image after it is scaled down to `max_pixels`. It is never scaled up."""
    if not max_pixels or width * height <= max_pixels:
        return width, height
    scale = (max_pixels / (width * height)) ** 0.5
    return max(1, floor(width * scale)), max(1, floor(height * scale))


def sent_size(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """Return the size at which a model receives an image.

    A larger image than `max_pixels` is scaled down to whole patches, so that no server scales it again.
    """
    if not max_pixels or prod(round_to_patches(width, height)) <= max_pixels:
        return width, height
    return shrink_to_patches(width, height, max_pixels)


def round_to_patches(width: int, height: int) -> tuple[int, int]:
    """Return the nearest size of whole patches."""
    across, down = (max(PATCH_PX, round(side / PATCH_PX) * PATCH_PX) for side in (width, height))
    return across, down


def shrink_to_patches(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the largest size in whole patches with the same aspect and at most `max_pixels`."""
    shrink = (width * height / max_pixels) ** 0.5
    across, down = (max(PATCH_PX, floor(side / shrink / PATCH_PX) * PATCH_PX) for side in (width, height))
    return across, down


def upright_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return the upright size from an image's header. Raises ImageError as `check_image` does."""
    with open_image(data, counts_scans=False) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Pillow has already swapped width and height of a rotated TIFF.
    is_rotated = image.format != "TIFF" and image.getexif().get(ORIENTATION) in ROTATED_90
    return image.size[::-1] if is_rotated else image.size


@contextmanager
def open_image(data: bytes | memoryview, *, counts_scans: bool = True) -> Iterator[Image.Image]:
    """Read an image's header, and yield the image. Its method `load` decodes the pixels.

    Errors within the context become ImageError. Turn `counts_scans` off if no pixels are decoded, because
    counting takes longer than reading the header.
    """
    formats = (*FORMATS, "HEIF") if is_heic(data) and has_heif() else FORMATS
    try:
        # Pillow warns about every unusual tag. `catch_warnings` is not thread-safe.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with Image.open(io.BytesIO(data), formats=formats) as image:
            size = f"{image.width} x {image.height} px"
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("too_many_pixels", f"{size} is more than {MAX_PIXELS:,} pixels")
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ImageError("too_narrow", f"{size}: the aspect ratio is over {MAX_ASPECT_RATIO}")
            is_counted = counts_scans and image.format in _JPEG_FORMATS
            if is_counted and any(islice(_SCAN.finditer(data), MAX_SCANS, None)):
                raise ImageError("too_many_scans", f"more than {MAX_SCANS} scans")
            if image.mode in ("I", "F"):
                detail = f"the value range of 32-bit pixels ({image.mode}) is unknown"
                raise ImageError("unsupported_depth", detail)
            yield image
    except Image.DecompressionBombError:
        raise ImageError("too_many_pixels", f"more than {MAX_PIXELS:,} pixels") from None
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("too_much_memory", "not enough memory to decode it") from None
    except UnidentifiedImageError:
        if is_heic(data) and not has_heif():
            raise ImageError("unsupported_format", "HEIC needs the package pillow-heif") from None
        raise ImageError("unreadable_image", "unknown image format") from None
    except Exception as error:  # noqa: BLE001  # Pillow's decoders raise any exception on damaged files
        raise ImageError("unreadable_image", one_line(error)) from None


def is_heic(data: bytes | memoryview) -> bool:
    """Return whether a file claims to be HEIC, the format of many phones."""
    return bytes(data[4:8]) == b"ftyp" and bytes(data[8:12]) in HEIC_BRANDS


@cache
def has_heif() -> bool:
    """Register pillow-heif with Pillow, and return whether it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
