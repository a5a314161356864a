"""The process that decodes images of strangers for others: what breaks a decoder ends it alone (isolation.py)."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ImageError
from pipeline.images.decode import check_image
from pipeline.images.metadata import read_exif, strip_metadata
from pipeline.images.pipes import receive_message, write_messages

MEMORY_BYTES = 1_500_000_000  # beyond what a worker has when it starts
CPU_SECONDS = 30
FLUSH_SECONDS = 0.02  # answers wait so long for those to the images after them, which may end the worker
MAX_STRIPPED_BYTES = 400_000_000  # of a TIFF, say, that became a PNG


def serve() -> None:
    """Answer the requests of a `_Worker` on stdin and stdout until stdin ends: the main function of the process."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    limit_resources()
    while True:
        try:
            request = json.loads(receive_message(source, 1_000_000) or b"")
            batch = [[receive_message(source, 1 << 40) or b"" for _ in range(count)] for count in request["jobs"]]
        except EOFError:
            return
        flushed = time.monotonic()
        for images in batch:
            write_messages(target, _check(images, request["exif"]))
            if time.monotonic() > flushed + FLUSH_SECONDS:
                target.flush()
                flushed = time.monotonic()
        target.flush()


def limit_resources() -> None:
    """Limit the memory of this process to MEMORY_BYTES beyond what it has, and let it write no data to files."""
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
            infos.append(check_image(stripped[-1], is_stripped=True))
            fields.append(read_exif(image, exif) if exif else {})
    except ImageError as error:
        return [json.dumps({"reason": error.reason, "what": str(error)}).encode()]
    except MemoryError:
        return [json.dumps({"reason": "too_much_memory", "what": f"it takes more than {MEMORY_BYTES:,} bytes"}).encode()]
    facts = [[info.width_px, info.height_px, info.pdq_hash.hex(), of] for info, of in zip(infos, fields, strict=True)]
    changed = [None if new is old else new for new, old in zip(stripped, images, strict=True)]
    return [json.dumps({"images": facts}).encode(), *changed]
