"""The child process that decodes untrusted images (isolation.py): its messages, its limits and its loop."""

import json
import resource
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pipeline.errors import ImageError
from pipeline.images.decode import check_image
from pipeline.images.metadata import read_exif, strip_metadata

MEMORY_BYTES = 1_500_000_000  # in addition to the memory of a worker at its start
CPU_SECONDS = 30
MAX_HEADER_BYTES = 1_000_000
MAX_STRIPPED_BYTES = 400_000_000  # of a TIFF, say, that became a PNG
_LENGTH = struct.Struct(">q")  # before each message; -1 for an image that has not changed


def send_messages(target: IO[bytes], messages: Sequence[bytes | None]) -> None:
    """Send messages, each after its length; None means that an image has not changed."""
    for message in messages:
        target.write(_LENGTH.pack(-1 if message is None else len(message)))
        if message:
            target.write(message)
    target.flush()


def receive_message(source: IO[bytes], max_bytes: int) -> bytes | None:
    """Return a message; None for an image that has not changed. Raise EOFError at the end, ValueError for a large message."""
    (length,) = _LENGTH.unpack(_read_exactly(source, _LENGTH.size))
    if length > max_bytes:
        raise ValueError("a message is too large")
    return None if length < 0 else _read_exactly(source, length)


def _read_exactly(source: IO[bytes], count: int) -> bytes:
    data = source.read(count)
    if len(data) < count:
        raise EOFError
    return data


def serve() -> None:
    """Answer requests on stdin and stdout until stdin ends: the main function of the process."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    limit_resources()
    while True:
        try:
            request = json.loads(receive_message(source, MAX_HEADER_BYTES) or b"")
            images = [receive_message(source, 1 << 40) or b"" for _ in range(request["images"])]
        except EOFError:
            return
        send_messages(target, _check(images, request["exif"]))


def limit_resources() -> None:
    """Limit the memory of this process to MEMORY_BYTES more than it has, and let it write no data to files."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_cpu() -> None:
    """Let this process use CPU_SECONDS more before the system ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _check(images: list[bytes], exif: Sequence[str]) -> list[bytes | None]:
    """Return the messages that answer a request: facts as JSON, then the images that have changed."""
    try:
        stripped, infos, fields = [], [], []
        for image in images:
            allow_cpu()
            stripped.append(strip_metadata(image))
            infos.append(check_image(stripped[-1]))
            fields.append(read_exif(image, exif) if exif else {})
    except ImageError as error:
        return [json.dumps({"reason": error.reason, "what": str(error)}).encode()]
    except MemoryError:
        return [json.dumps({"reason": "too_much_memory", "what": f"it takes more than {MEMORY_BYTES:,} bytes"}).encode()]
    facts = [[info.width_px, info.height_px, info.pdq_hash.hex(), of] for info, of in zip(infos, fields, strict=True)]
    changed = [None if new is old else new for new, old in zip(stripped, images, strict=True)]
    return [json.dumps({"images": facts}).encode(), *changed]
