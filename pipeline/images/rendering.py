"""Render untrusted documents and videos as images, each file in its own process.

The process reads the file from stdin, and cannot open other files. So pages do not depend on the fonts of the
machine. Memory and time are limited as for images (isolation.py).
"""

import ctypes
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pkgutil import walk_packages
from typing import IO, Any, Literal

from PIL import Image

from pipeline.errors import ImageError, one_line
from pipeline.images import isolation
from pipeline.images.decode import MAX_IMAGE_BYTES, MAX_PIXELS
from pipeline.images.isolation import Worker, allow_cpu, limit_resources, stated_reason

Kind = Literal["pdf", "video"]
PACKAGES = {"pdf": "pypdfium2", "video": "av"}
PAGE_SIDE_PX = 1536
MAX_FRAME_SIDE_PX = 2048  # larger frames are scaled down
JPEG_QUALITY = 92
MAX_PNG_BYTES = 1_000_000  # larger pages, such as scans, become JPEGs
# Demuxers by suffix. Without a demuxer, FFmpeg may guess that a file is a playlist, which names other files
# and addresses.
DEMUXERS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".3gp"), "mp4"),
    **dict.fromkeys((".mkv", ".webm"), "matroska"),
    **dict.fromkeys((".mpg", ".mpeg"), "mpeg"),
    **dict.fromkeys((".ts", ".mts"), "mpegts"),
    ".avi": "avi",
    ".flv": "flv",
    ".ogv": "ogg",
    ".wmv": "asf",
}
SUFFIXES: dict[Kind, tuple[str, ...]] = {"pdf": (".pdf",), "video": tuple(DEMUXERS)}
_PR_SET_PDEATHSIG = 1
MAX_PACKETS = 3_000_000  # enough for more than 24 hours of video
HEARTBEAT_PACKETS = 500  # a message is sent after this many packets, even if no frame is due
SPARE_MS = 1_000  # a video may exceed its stated length by this much
Answer = tuple[dict[str, Any], bytes | None]
_SERVE = "from pipeline.images.rendering import serve; serve()"


@dataclass(frozen=True, slots=True)
class Rendered:
    """An encoded image from a file. `place` is the page number from 1, or the time in milliseconds.

    A damaged page or part of a video has a `fault` and no data.
    """

    place: int
    data: bytes = b""
    fault: str = ""


def render(kind: Kind, file: IO[bytes], suffix: str, every_s: float = 1.0) -> Iterator[Rendered]:
    """Yield the pages of a document, or the frames of a video that are `every_s` seconds apart, in order.

    Raises ImageError if the file is damaged or encrypted, or takes too much time or memory. Images may have
    been yielded before the error.
    """
    worker = Worker(_SERVE, file, [kind, suffix, str(every_s)])
    try:
        while True:
            with worker.limited(isolation.WALL_SECONDS):
                header = worker.receive_header()
                reason, fault = stated_reason(header), str(header.get("fault", ""))[:200]
                data = worker.receive(MAX_IMAGE_BYTES) if "place" in header and not fault else b""
            if reason:
                raise reason
            if "end" in header:
                return
            if "place" in header:
                yield Rendered(int(header["place"]), data, fault)
    finally:
        worker.kill()


def serve() -> None:
    """Render the file on stdin to stdout. This is the main function of the process."""
    # Let the system kill this process when its parent ends. Otherwise, only the next write would notice the
    # closed pipe.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    kind, suffix, every_s = sys.argv[1:]
    file, every_ms = os.fdopen(os.dup(0), "rb"), max(1, round(1000 * float(every_s)))
    answers = _open_pdf(file) if kind == "pdf" else _open_video(file, DEMUXERS[suffix], every_ms)
    out = Connection(sys.stdout.fileno(), readable=False)
    try:
        for header, data in _limited(answers):
            out.send_bytes(json.dumps(header).encode())
            if data:
                out.send_bytes(data)
        end: dict[str, Any] = {"end": True}
    except ImageError as error:
        end = {"reason": error.reason, "what": str(error)}
    except MemoryError:
        end = {"reason": "too_much_memory", "what": "not enough memory to decode it"}
    except Exception as error:  # noqa: BLE001  # decoders raise any exception on damaged files
        end = {"reason": "unreadable_file", "what": one_line(error)}
    out.send_bytes(json.dumps(end).encode())


def _limited(answers: Iterator[Answer]) -> Iterator[Answer]:
    """Limit this process, and yield answers. The limit on CPU time applies to each answer."""
    # Load the encoders while files can still be opened.
    for format_name in ("JPEG", "PNG"):
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format_name)
    limit_resources()
    # Forbid new descriptors, even if malicious code in this process closes one first.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    while True:
        allow_cpu()
        answer = next(answers, None)
        if answer is None:
            return
        yield answer


def _open_pdf(file: IO[bytes]) -> Iterator[Answer]:
    import pypdfium2

    # Load the library now, because no file can be opened later.
    pypdfium2.PdfDocument.new().close()
    return _pages(pypdfium2, file.read())


def _pages(pdfium: Any, data: bytes) -> Iterator[Answer]:
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise ImageError("encrypted", "it needs a password") from None
        raise ImageError("unreadable_file", one_line(error)) from None
    if len(document) == 0:
        raise ImageError("empty_file", "it has no pages")
    # Without this call, filled forms are not rendered.
    document.init_forms()
    for number in range(len(document)):
        try:
            page = document[number]
            width, height = page.get_size()
            if not min(width, height) > 0 or max(width, height) / min(width, height) > PAGE_SIDE_PX:
                raise ValueError(f"its size is {width:.0f} by {height:.0f} points")
            image = page.render(scale=PAGE_SIDE_PX / max(width, height)).to_pil().convert("RGB")
        except (pdfium.PdfiumError, ValueError) as error:
            yield {"place": number + 1, "fault": f"page {number + 1}: {one_line(error)}"}, None
            continue
        yield {"place": number + 1}, _encode(image, may_be_png=True)
        page.close()


def _open_video(file: IO[bytes], demuxer: str, every_ms: int) -> Iterator[Answer]:
    import av

    # Load all modules now, because no file can be opened later.
    for module in walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    av.logging.set_level(av.logging.PANIC)
    return _frames(av, file, demuxer, every_ms)


def _frames(av: Any, file: IO[bytes], demuxer: str, every_ms: int) -> Iterator[Answer]:
    try:
        container = av.open(file, mode="r", format=demuxer)
    except av.FFmpegError as error:
        detail = f"not a valid {demuxer} video: {one_line(error.strerror or error)}"
        raise ImageError("unreadable_file", detail) from None
    with container:
        if not container.streams.video:
            raise ImageError("empty_file", "it has no video frames")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
            raise ImageError("too_many_pixels", f"more than {MAX_PIXELS:,} pixels")
        stated_ms = (container.duration or 0) // 1000  # FFmpeg counts microseconds
        width_by_height = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
        first_s, due_ms, has_any = None, 0, False
        for frame in _decoded(av, container, stream):
            if isinstance(frame, str):
                yield {"place": due_ms, "fault": frame}, None
                continue
            if frame is None or frame.time is None:
                yield {}, None  # heartbeat
                continue
            first_s = frame.time if first_s is None else first_s
            at_ms = round(1000 * (frame.time - first_s))
            if at_ms < due_ms:
                continue
            has_any, due_ms = True, (at_ms // every_ms + 1) * every_ms
            yield {"place": at_ms}, _encode(_upright(frame, width_by_height))
            if stated_ms and due_ms > stated_ms + SPARE_MS:
                return
        if not has_any:
            raise ImageError("empty_file", "it has no video frames")


def _decoded(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a video, None as a heartbeat, and a message at the first damaged packet."""
    is_damaged = False
    for count, packet in enumerate(container.demux(stream)):
        allow_cpu()
        if count == MAX_PACKETS:
            raise ImageError("too_slow", f"more than {MAX_PACKETS:,} frames")
        if count % HEARTBEAT_PACKETS == 0:
            yield None
        try:
            yield from packet.decode()
        except av.InvalidDataError as error:
            if not is_damaged:
                yield f"damaged from this frame on: {one_line(error.strerror or error)}"
            is_damaged = True


def _upright(frame: Any, width_by_height: float) -> Image.Image:
    """Return a frame with square pixels, rotated as players show it. Mirroring is ignored."""
    image: Image.Image = frame.to_image()
    if not 0.1 < width_by_height < 10:
        width_by_height = 1.0
    if width_by_height != 1:
        image = image.resize((max(1, round(image.width * width_by_height)), image.height))
    image.thumbnail((MAX_FRAME_SIDE_PX, MAX_FRAME_SIDE_PX))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _encode(image: Image.Image, *, may_be_png: bool = False) -> bytes:
    out = io.BytesIO()
    if may_be_png:
        image.save(out, "PNG")
        if out.tell() <= MAX_PNG_BYTES:
            return out.getvalue()
        out = io.BytesIO()
    image.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()
