"""Render HTML pages with inline style sheets and thumbnails, and curves as SVG.

Model text is untrusted: the template escapes all of it.
"""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, TemplateError
from PIL import Image

from pipeline.errors import StoreError
from pipeline.images.decode import prepare_image

THUMBNAIL_PIXELS = 320 * 320
LOSSLESS_PIXELS = 128 * 128  # images up to this size are stored losslessly if the result is small enough
PIXELS_PER_BYTE = 12  # upper bound for WebP photos, which sets the first size to try
QUALITY = 70
CURVE_WIDTH_PX, CURVE_HEIGHT_PX = 560, 160
CURVE_POINTS = 600

Points = list[tuple[float, float]]


@cache
def _environment() -> Environment:
    """Return the template environment of the pages."""

    def read(name: str) -> str:
        return (files("pipeline.report") / name).read_text(encoding="utf-8")

    return Environment(
        loader=FunctionLoader(read),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(template: str, **values: Any) -> str:
    """Render a template."""
    try:
        return _environment().get_template(template).render(**values)
    except (TypeError, AttributeError, LookupError, TemplateError) as error:  # the manifest is untrusted
        raise StoreError(
            f"cannot write the page: the manifest is invalid: {error}",
            hint="check it with `synth check`, or use another version",
        ) from None


def thumbnail(data: bytes, max_bytes: int, max_pixels: int = THUMBNAIL_PIXELS) -> bytes:
    """Return an image as WebP without metadata, at most `max_bytes` long. Raises ImageError if unreadable."""
    image = prepare_image(data, max_pixels=min(max_pixels, PIXELS_PER_BYTE * max_bytes))
    if (
        image.width * image.height <= LOSSLESS_PIXELS
        and len(webp := _webp(image, lossless=True)) <= max_bytes
    ):
        return webp
    while len(webp := _webp(image)) > max_bytes and min(image.size) > 1:
        # The file size shrinks more slowly than the number of pixels.
        scale = min(0.9, (0.9 * max_bytes / len(webp)) ** 0.5)
        image = image.resize([max(1, int(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    return webp


def data_uri(webp: bytes) -> str:
    """Return a thumbnail as a data URI."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def script_hash(script: str) -> str:
    """Return the hash of a script for a content security policy that allows only listed scripts."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _webp(image: Image.Image, *, lossless: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=lossless, quality=QUALITY, method=2)
    return buffer.getvalue()


def points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Return (step, value) from the log lines that have this value, thinned out to about CURVE_POINTS."""
    values = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    return [*finite[:-1][:: max(1, len(finite) // CURVE_POINTS)], *finite[-1:]]


def chart(title: str, series: Mapping[str, Points]) -> dict[str, Any]:
    """Scale curves to the size of an SVG. x is the step, and y starts at 0 at the bottom."""
    xs = [x for curve in series.values() for x, _ in curve] or [1.0]
    top = max((y for curve in series.values() for _, y in curve), default=1.0) or 1.0

    def place(x: float, y: float) -> str:
        return f"{x / max(xs) * CURVE_WIDTH_PX:.1f},{(1 - y / top) * CURVE_HEIGHT_PX:.1f}"

    lines = [(name, " ".join(place(x, y) for x, y in curve)) for name, curve in series.items()]
    size = {"width": CURVE_WIDTH_PX, "height": CURVE_HEIGHT_PX}
    return {"title": title, "lines": lines, "top": top, "last": max(xs), **size}
