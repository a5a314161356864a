"""Remove metadata from image files: EXIF, XMP, IPTC, comments, thumbnails, and data after the image.

Ordinary JPEG and PNG files lose only these parts, and other files are encoded again. Only the first frame of
an animated GIF or WebP is kept.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator

from PIL import ImageOps

from pipeline.images.decode import JPEG_QUALITY, ORIENTATION, open_image

_ICC_PROFILE = b"ICC_PROFILE\0"
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # FF 00 and FF D0 to FF D7 are part of the scan
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that are needed to decode pixels and their colors. The last three (acTL, fcTL and fdAT) hold the
# frames of animations.
_PNG_NAMES = b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD pHYs acTL fcTL fdAT"
_PNG_CHUNKS = frozenset(_PNG_NAMES.split())
_LOSSY_FORMATS = ("AVIF", "HEIF", "JPEG", "WEBP")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
# For a photo of 6 megapixels, this level is 2.6 times as fast as the default, and the file is 4 % larger.
_PNG_COMPRESS_LEVEL = 4


def strip_metadata(data: bytes) -> bytes:
    """Return an image file without metadata, or the same object if it has none.

    Raises ImageError if a file must be encoded again but is damaged.
    """
    if not data.startswith((_JPEG_SIGNATURE, _PNG_SIGNATURE)):
        return _encode(data)
    strip = _strip_jpeg if data.startswith(_JPEG_SIGNATURE) else _strip_png
    try:
        parts = b"".join(strip(data))
    except (ValueError, IndexError, struct.error):
        # A decoder may tolerate this damage.
        return _encode(data)
    return data if parts == data else parts


def _strip_jpeg(data: bytes) -> Iterator[bytes]:
    """Yield the parts of a JPEG file that are needed to decode its first image (ITU T.81, annex B)."""
    yield b"\xff\xd8"
    start, has_orientation = 2, False
    while True:
        if data[start] != 0xFF:
            raise ValueError("a segment was expected")
        while data[start + 1] == 0xFF:  # padding
            start += 1
        kind = data[start + 1]
        if kind == 0xD9:  # end of image
            yield b"\xff\xd9"
            return
        (length,) = struct.unpack_from(">H", data, start + 2)
        end = start + 2 + length
        if end > len(data) or kind < 0xC0 or 0xD0 <= kind <= 0xD8:
            raise ValueError("not a segment")
        content = data[start + 4 : end]
        if kind == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14:
            # Leave out the JFIF thumbnail.
            yield b"\xff\xe0\x00\x10" + content[:12] + b"\0\0"
        elif kind == 0xE1 and not has_orientation:  # EXIF or XMP: write the orientation only once
            has_orientation = True
            if (orientation := _orientation(data)) != 1:
                exif = b"Exif\0\0" + _tiff_orientation(orientation)
                yield b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        elif kind == 0xEE and content.startswith(b"Adobe") and len(content) >= 12:
            yield b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + content[11:12]  # color transform
        elif (kind == 0xE2 and content.startswith(_ICC_PROFILE)) or not (
            0xE0 <= kind <= 0xEF or kind == 0xFE
        ):
            yield data[start:end]
        start = end
        if kind == 0xDA:  # start of a scan, followed by its data
            marker = _MARKER_AFTER_SCAN.search(data, start)
            if marker is None:
                raise ValueError("no end of image")
            yield data[start : marker.start()]
            start = marker.start()


def _tiff_orientation(orientation: int) -> bytes:
    # A big-endian TIFF header, and one directory with one entry of the type SHORT.
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


def _strip_png(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG file that are needed to decode its pixels (W3C PNG, third edition)."""
    chunks: list[bytes] = []
    start, may_be_rotated = len(_PNG_SIGNATURE), False
    while True:
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            raise ValueError("a chunk is cut off")
        if kind == b"iCCP":  # the profile's name may identify a device
            chunks.append(_png_chunk(kind, b"ICC Profile" + data[data.index(b"\0", start + 8) : end - 4]))
        elif kind in _PNG_CHUNKS:
            chunks.append(data[start:end])
        may_be_rotated = may_be_rotated or kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
        if kind == b"IEND":
            break
        start = end
    if may_be_rotated and (orientation := _orientation(data)) != 1:
        chunks.insert(1, _png_chunk(b"eXIf", _tiff_orientation(orientation)))
    yield _PNG_SIGNATURE
    yield from chunks


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image (2 to 8), or 1 if it is upright or the value is invalid."""
    with open_image(data) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1


def _encode(data: bytes) -> bytes:
    """Encode an image upright, as JPEG if its format is lossy and it is opaque, else as PNG."""
    out = io.BytesIO()
    # Encoders may raise any exception on unusual profiles. `open_image` turns it into ImageError.
    with open_image(data) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        profile = upright.info.get("icc_profile")
        profile = profile if isinstance(profile, bytes) else None
        if upright.mode.startswith("I;16"):
            upright = upright.convert("I").convert("I;16")
        elif upright.mode == "PA":
            upright = upright.convert("RGBA")
        elif upright.mode not in _PNG_MODES:
            upright, profile = upright.convert("RGB"), None  # the profile may be for CMYK
        transparency = {name: upright.info[name] for name in upright.info.keys() & {"transparency"}}
        upright.info = transparency  # encoders would write comments from this dict
        # A lossless WebP has a chunk named VP8L.
        is_lossy = image.format in _LOSSY_FORMATS and b"VP8L" not in data
        if is_lossy and not transparency and upright.mode in ("L", "RGB"):
            upright.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0, icc_profile=profile)
        else:
            upright.save(out, "PNG", icc_profile=profile, compress_level=_PNG_COMPRESS_LEVEL)
    return out.getvalue()
