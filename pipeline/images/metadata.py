"""Remove the metadata of image files: EXIF with its GPS position, XMP, IPTC, comments, thumbnails, and data after the image.

JPEG, PNG, WebP and GIF files lose these parts of the file; their compressed pixels, color profile and orientation stay as they
are. Formats whose metadata lies between the pixels (TIFF, BMP), that many readers cannot open (AVIF, HEIC), and files that are
put together in an unexpected way are encoded anew.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from PIL import ImageOps

from pipeline.images.decode import ORIENTATION, open_image

REMOVED = "removed"  # what provenance and manifests say of images without metadata; earlier releases kept it, and said nothing
_ICC_PROFILE = b"ICC_PROFILE\0"
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # 00 and D0 to D7 belong to the scan's data
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = frozenset(  # what pixels and their colors are decoded with; acTL, fcTL and fdAT are frames of an animation
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD pHYs acTL fcTL fdAT".split()
)
_WEBP_CHUNKS = frozenset({b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"})
_VP8X_EXIF, _VP8X_XMP = 0x08, 0x04
_GIF_LOOPS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")  # application extensions that say how often an animation repeats
_LOSSY_FORMATS = ("AVIF", "HEIF", "JPEG", "WEBP")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_QUALITY = 95


def strip_metadata(data: bytes) -> bytes:
    """Return an image file without metadata, with the same pixels; the very same bytes if it has none.

    Raises ImageError if the image cannot be decoded.
    """
    strip = next((strip for signature, strip in _FORMATS.items() if signature.match(data)), None)
    if strip is not None:
        try:
            parts = b"".join(strip(data))
            return data if parts == data else parts
        except (ValueError, IndexError, struct.error):
            pass  # decoders are more tolerant
    return _encode(data)


def _strip_jpeg(data: bytes) -> Iterator[bytes]:
    """Yield the parts of a JPEG file that its pixels are decoded from (ITU T.81, annex B), up to the end of its first image."""
    yield b"\xff\xd8"
    at, has_orientation = 2, False
    while True:
        if data[at] != 0xFF:
            raise ValueError("a segment was expected")
        while data[at + 1] == 0xFF:  # padding
            at += 1
        kind = data[at + 1]
        if kind == 0xD9:  # end of image
            yield b"\xff\xd9"
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        if end > len(data) or kind < 0xC0 or 0xD0 <= kind <= 0xD8:
            raise ValueError("not a segment")
        content = data[at + 4 : end]
        is_application, is_comment = 0xE0 <= kind <= 0xEF, kind == 0xFE
        if kind == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14:
            yield b"\xff\xe0\x00\x10" + content[:12] + b"\0\0"  # without its thumbnail
        elif kind == 0xE1 and not has_orientation and (orientation := _orientation(data)) != 1:
            yield _jpeg_exif(orientation)
            has_orientation = True
        elif _is_color_profile(kind, content) or not (is_application or is_comment):
            yield data[at:end]
        at = end
        if kind == 0xDA:  # start of scan: its data follows
            found = _MARKER_AFTER_SCAN.search(data, at)
            if found is None:
                raise ValueError("no end of image")
            yield data[at : found.start()]
            at = found.start()


def _is_color_profile(kind: int, content: bytes) -> bool:
    """Return whether a segment of an application says how colors are decoded: an ICC profile, or Adobe's transform."""
    is_adobe = kind == 0xEE and content.startswith(b"Adobe") and len(content) == 12
    return is_adobe or (kind == 0xE2 and content.startswith(_ICC_PROFILE))


def _jpeg_exif(orientation: int) -> bytes:
    """Return an EXIF segment that holds an orientation and nothing else."""
    content = b"Exif\0\0" + _tiff_orientation(orientation)
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def _tiff_orientation(orientation: int) -> bytes:
    # A big-endian TIFF header, and one directory with one entry: a SHORT.
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


def _strip_png(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG file that its pixels are decoded from (W3C PNG, third edition)."""
    yield _PNG_SIGNATURE
    orientation = _orientation(data)
    at = len(_PNG_SIGNATURE)
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise ValueError("a chunk is cut off")
        if kind in _PNG_CHUNKS:
            yield data[at:end]
        if kind == b"IHDR" and orientation != 1:
            yield _png_chunk(b"eXIf", _tiff_orientation(orientation))
        if kind == b"IEND":
            return
        at = end


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _strip_webp(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a WebP file that its pixels are decoded from (RFC 9649)."""
    (size,) = struct.unpack_from("<I", data, 4)
    at, end = 12, 8 + size
    orientation = _orientation(data)
    chunks: list[bytes] = []
    while at < end:
        kind, length = struct.unpack_from("<4sI", data, at)
        after = at + 8 + length + length % 2
        if at + 8 + length > len(data):
            raise ValueError("a chunk is cut off")
        if kind == b"VP8X":
            flags = data[at + 8] & ~(_VP8X_EXIF | _VP8X_XMP) | (_VP8X_EXIF if orientation != 1 else 0)
            chunks.append(data[at : at + 8] + bytes([flags]) + data[at + 9 : after])
        elif kind in _WEBP_CHUNKS:
            chunks.append(data[at:after])
        at = after
    if orientation != 1:
        exif = _tiff_orientation(orientation)
        chunks.append(b"EXIF" + struct.pack("<I", len(exif)) + exif)
    content = b"".join(chunks)
    yield b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


def _strip_gif(data: bytes) -> Iterator[bytes]:
    """Yield the blocks of a GIF file that its frames are decoded from (GIF89a): no comments, no texts, no XMP."""
    if _orientation(data) != 1:
        raise ValueError("only its XMP says how it is turned")
    at = 13 + _color_table_bytes(data[10])
    yield data[:at]
    control = b""
    while True:
        kind = data[at]
        if kind == 0x3B:  # trailer
            yield b";"
            return
        if kind == 0x21:  # extension
            end = _end_of_blocks(data, at + 2)
            label = data[at + 1]
            if label == 0xF9:  # graphic control: belongs to the next image
                control = data[at:end]
            elif label == 0xFF and data[at + 3 : at + 14] in _GIF_LOOPS:
                yield data[at:end]
            elif label == 0x01:  # a text to draw, which no decoder draws
                control = b""
        elif kind == 0x2C:  # image
            end = _end_of_blocks(data, at + 11 + _color_table_bytes(data[at + 9]))
            yield control + data[at:end]
            control = b""
        else:
            raise ValueError("not a block")
        at = end


def _color_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _end_of_blocks(data: bytes, at: int) -> int:
    """Return where a list of sub-blocks ends, each with its length before it and the last one empty."""
    while data[at]:
        at += data[at] + 1
    return at + 1


_FORMATS: dict[re.Pattern[bytes], Callable[[bytes], Iterator[bytes]]] = {
    re.compile(rb"\xff\xd8\xff"): _strip_jpeg,
    re.compile(re.escape(_PNG_SIGNATURE)): _strip_png,
    re.compile(rb"RIFF....WEBP", re.DOTALL): _strip_webp,
    re.compile(rb"GIF8[79]a"): _strip_gif,
}


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation of an image: 2 to 8, or 1 for an upright or undefined one."""
    with open_image(data) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1


def _encode(data: bytes) -> bytes:
    """Encode an image anew, upright: as JPEG where its format has loss and it is not transparent, else as PNG."""
    with open_image(data) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        is_lossy = image.format in _LOSSY_FORMATS
    profile = upright.info.get("icc_profile")
    if upright.mode.startswith("I;16"):
        upright = upright.convert("I").convert("I;16")
    elif upright.mode == "PA":
        upright = upright.convert("RGBA")
    elif upright.mode not in _PNG_MODES:
        upright, profile = upright.convert("RGB"), None  # a profile of CMYK, say
    transparency: dict[Any, Any] = {name: value for name, value in upright.info.items() if name == "transparency"}
    upright.info = transparency  # encoders write comments that stand here
    out = io.BytesIO()
    if is_lossy and not transparency and upright.mode in ("L", "RGB"):
        upright.save(out, "JPEG", quality=_QUALITY, subsampling=0, icc_profile=profile)
    else:
        upright.save(out, "PNG", icc_profile=profile)
    return out.getvalue()
