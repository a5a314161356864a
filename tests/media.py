"""Write images, documents and videos for tests, with other libraries than pipeline.images uses."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple", "black", "gray", "brown")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_pdf(path: Path, pages: int, size_px: tuple[int, int] = (640, 360)) -> None:
    """Write a PDF whose pages show a number, with different bars and colors."""
    images = []
    for number in range(pages):
        image = Image.new("RGB", size_px, "white")
        draw = ImageDraw.Draw(image)
        draw.rectangle((20, 20, 30 + 11 * (number + 1), 150), fill=COLORS[number % len(COLORS)])
        draw.text((40, 200), f"Page {number + 1}", fill="black", font_size=60)
        images.append(image)
    images[0].save(path, "PDF", save_all=True, append_images=images[1:])


def text_pdf(text: str = "Hello", *, more: str = "", media_box: str = "0 0 300 200") -> bytes:
    """Return a PDF of one page with a font that is not embedded. `more` is added to its catalog."""
    content, font = f"BT /F1 48 Tf 20 80 Td ({text}) Tj ET", "/Resources << /Font << /F1 5 0 R >> >>"
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {more} >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [{media_box}] /Contents 4 0 R {font} >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, io.SEEK_END)
    places = []
    for number, body in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    table = out.tell()
    rows = "".join(f"{place:010d} 00000 n \n" for place in places)
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{rows}".encode())
    out.write(f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF".encode())
    return out.getvalue()


def write_video(
    path: Path, seconds: int, size_px: tuple[int, int] = (320, 240), rate: int = 10, shift: int = 0
) -> None:
    """Write a video with another picture in each second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuv420p"
        for picture in _pictures(seconds, size_px, shift):
            for _ in range(rate):
                for packet in stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _pictures(seconds: int, size_px: tuple[int, int], shift: int) -> Iterable[Image.Image]:
    for second in range(seconds):
        rng = np.random.default_rng(second + shift)
        yield Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).resize(size_px)
