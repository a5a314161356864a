"""Render HTML pages with inline style sheets, scripts and thumbnails, which make no network requests.

Model text is untrusted: the templates escape all of it, and the scripts never parse it as HTML.
"""

import base64
import hashlib
import io
import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipeline.dataset.card import INVALID
from pipeline.dataset.statistics import percent
from pipeline.errors import ImageError, StoreError
from pipeline.images.decode import prepare_image

THUMBNAIL_PIXELS = 320 * 320
# WebP photos have at most this many pixels per byte.
PIXELS_PER_BYTE = 12
QUALITY = 70

_PAGES = Environment(
    loader=PackageLoader("pipeline.report", ""),
    undefined=StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters["percent"] = percent


def render_page(template: str, **values: Any) -> str:
    """Render a template. Raises StoreError if a value is invalid, since manifests are untrusted."""
    try:
        return _PAGES.get_template(template).render(**values)
    except INVALID as error:
        hint = "check it with `synth check`, or use another version"
        raise StoreError(f"cannot write the page: the manifest is invalid: {error}", hint=hint) from None


def thumbnail(data: bytes, max_bytes: int, max_pixels: int = THUMBNAIL_PIXELS) -> bytes:
    """Return an image as WebP without metadata, at most `max_bytes` long. Raises ImageError if unreadable."""
    image = prepare_image(data, max_pixels=min(max_pixels, PIXELS_PER_BYTE * max_bytes))
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY, method=2)
        webp = buffer.getvalue()
        if len(webp) <= max_bytes or min(image.size) == 1:
            return webp
        # Aim below `max_bytes`, since the file size shrinks more slowly than the number of pixels.
        scale = min(0.9, (0.9 * max_bytes / len(webp)) ** 0.5)
        image = image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def thumbnail_uri(image: bytes, max_bytes: int, max_pixels: int = THUMBNAIL_PIXELS) -> str:
    """Return a thumbnail as a data URI, or "" if the image is broken."""
    try:
        webp = thumbnail(image, max_bytes, max_pixels)
    except ImageError:
        # Images of an untrusted version may be broken.
        return ""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def page_script(name: str, **settings: Any) -> str:
    """Return a script of this folder, preceded by its constants and the shared functions."""
    constants = [f"const {key} = {script_literal(value)};\n" for key, value in settings.items()]
    code = [(files("pipeline.report") / file).read_text(encoding="utf-8") for file in ("page.js", name)]
    return "".join([*constants, *code])


def script_literal(value: Any) -> str:
    """Return a value as a JavaScript literal, in ASCII and without `<`, which could end the script."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def script_hash(script: str) -> str:
    """Return the hash of a script for a content security policy that allows only listed scripts."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
