"""Decode a folder of images in worker processes with limits, and in this process: seconds, CPU seconds, and their ratios.

    python benchmarks/decode.py FOLDER [ROUNDS]

Both do what a source does to each image: remove metadata, decode in full, hash. The workers are started before the clock is.
"""

import os
import statistics
import sys
import time
from pathlib import Path

from pipeline.images import isolation
from pipeline.images.decode import check_image
from pipeline.images.isolation import check_all
from pipeline.images.metadata import strip_metadata


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU seconds of this process and of its workers."""
    ticks = sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in pids)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def in_workers(images: list[bytes]) -> None:
    """Check images as sources do."""
    for _, result in check_all(iter([(n, (image,)) for n, image in enumerate(images)])):
        assert isinstance(result, list)


def in_process(images: list[bytes]) -> None:
    """Check images as sources did before."""
    for image in images:
        check_image(strip_metadata(image))


def main() -> None:
    """Print both, and their ratios."""
    paths = [path for path in sorted(Path(sys.argv[1]).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    images = [path.read_bytes() for path in paths]
    images = images * max(1, 400 // len(images))
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    pool = isolation._pool()
    in_workers(images[: 2 * pool.size])
    results: dict[str, list[tuple[float, float]]] = {"in workers": [], "one worker": [], "in process": []}
    for _ in range(rounds):
        for name, run in (("in workers", in_workers), ("one worker", in_workers), ("in process", in_process)):
            pids = [worker._process.pid for worker in pool._workers if worker.is_alive()]
            if name == "one worker":
                affinity = os.sched_getaffinity(0)
                for pid in [0, *pids]:
                    os.sched_setaffinity(pid, {min(affinity)})
            started, before = time.monotonic(), cpu_seconds(pids)
            run(images)
            results[name].append((time.monotonic() - started, cpu_seconds(pids) - before))
            if name == "one worker":
                for pid in [0, *pids]:
                    os.sched_setaffinity(pid, affinity)
    medians = {name: [statistics.median(values) for values in zip(*runs, strict=True)] for name, runs in results.items()}
    print(f"{len(images)} images, {sum(map(len, images)) / len(images) / 1e3:.0f} kB on average, {rounds} rounds")
    for name, (wall, cpu) in medians.items():
        base_wall, base_cpu = medians["in process"]
        print(f"{name:<11} {wall:6.2f} s ({wall / base_wall:.2f} of in process), {cpu:6.2f} CPU s ({cpu / base_cpu:.2f})")


main()
