"""Generate a version with very many images, by default without a model.

    python benchmarks/million_images.py [--images 1000000] [--out DIR]

`synth generate` without a task reads a Parquet file of distinct JPEGs (72 x 56 px, 1.7 kB) with human
captions, searches for near-duplicates, and runs all other steps. Prints seconds, the peak memory of the
command and of its workers, and the size on disk, also for a second run without changes. DIR/memory.csv holds
the memory for each second. A million images take half an hour and 8 GB of disk.

With `--ask`, `synth generate` requests a caption for each image from a mock endpoint without latency
(benchmarks/mock_chat.py, on the same machine). The time of the first request is printed, too. With `--ray`, a
local Ray cluster generates the same version again in two halves. The digests of both versions are printed.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mock_chat import running_mock
from PIL import Image

SCHEMA = pa.schema({"image": pa.binary(), "caption": pa.string()})
NOUNS = (
    *("harbor", "meadow", "tractor", "violin", "lantern", "bridge", "orchard", "kettle", "sailor", "window"),
    *("basket", "ladder", "garden", "market", "stove", "pigeon", "river", "statue", "wagon", "helmet"),
)
KINDS = ("red", "blue", "old", "small", "wooden", "striped", "broken", "shiny", "pale", "narrow")
BATCH = 5000
# The first requests only probe the server.
MAX_PROBES = 20


def caption_of(number: int) -> str:
    """Return a caption that is unique for numbers below three million."""
    a, b, c, d, e = (NOUNS[number // len(NOUNS) ** place % len(NOUNS)] for place in range(5))
    kind, other = KINDS[number % len(KINDS)], KINDS[number // 7 % len(KINDS)]
    return f"A {kind} {a} stands near the {b} while a {other} {c} leans on the {d} beside {number % 97} {e}s."


def make(path: Path, count: int) -> None:
    """Write a Parquet file with distinct images and captions."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, SCHEMA, compression="none") as writer:
        for start in range(0, count, BATCH):
            pixels = rng.integers(0, 255, (min(BATCH, count - start), 7, 9, 3), dtype=np.uint8)
            images = []
            for colors in pixels:
                buffer = io.BytesIO()
                Image.fromarray(colors).resize((72, 56), Image.Resampling.BICUBIC).save(
                    buffer, "JPEG", quality=80
                )
                images.append(buffer.getvalue())
            captions = [caption_of(start + n) for n in range(len(images))]
            writer.write_table(pa.table([images, captions], schema=SCHEMA))


def memory_mb(process: int) -> tuple[float, float]:
    """Return the memory of a process, and the total memory of its children."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    children = " ".join(path.read_text() for path in tasks).split()
    pages = [int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (process, *children)]
    sizes = [count * os.sysconf("SC_PAGE_SIZE") / 1e6 for count in pages]
    return sizes[0], sum(sizes[1:])


def digest_of(dataset: Path) -> str:
    """Return the digest of the only version in a dataset folder."""
    (manifest,) = dataset.glob("versions/v*/manifest.json")
    digest: str = json.loads(manifest.read_text())["digest"]
    return digest


def asked(mock: str) -> int:
    """Return the number of requests that a mock endpoint received, or 0 without an endpoint."""
    if not mock:
        return 0
    with urllib.request.urlopen(f"{mock}/stats") as response:
        return int(json.load(response)["came"])


def watch(
    command: list[str],
    folder: Path,
    mock: str = "",
    kill_after_s: float = float("inf"),
    name: str = "dataset",
) -> None:
    """Run a command, kill it after `kill_after_s` seconds, and print its time and memory."""
    start, peak = time.monotonic(), (0.0, 0.0)
    before, first_s = asked(mock), float("nan")
    with (folder / "memory.csv").open("w") as log, (folder / "log.txt").open("ab") as printed:
        log.write("seconds,command_mb,workers_mb\n")
        process = subprocess.Popen([*command, "--out", str(folder / name)], stdout=printed, stderr=printed)
        while process.poll() is None:
            if time.monotonic() - start > kill_after_s:
                process.kill()
            try:
                now = memory_mb(process.pid)
            except OSError:  # a process has exited
                continue
            peak = max(peak[0], now[0]), max(peak[1], now[1])
            if math.isnan(first_s) and asked(mock) > before + MAX_PROBES:
                first_s = time.monotonic() - start
            log.write(f"{time.monotonic() - start:.0f},{now[0]:.0f},{now[1]:.0f}\n")
            time.sleep(1)
    size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
    memory = f"{peak[0]:,.0f} MB, workers {peak[1]:,.0f} MB"
    requests = f"; {asked(mock) - before:,} requests, the first after {first_s:.0f} s" if mock else ""
    seconds = time.monotonic() - start
    print(
        f"exit code {process.returncode}: {seconds:,.0f} s; {memory}; dataset {size / 1e9:.2f} GB{requests}",
        flush=True,
    )


def main() -> None:
    """Run the command twice, and print the time and memory of each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument(
        "--kill-after-s", type=float, help="seconds after which to kill -9 and restart the first run"
    )
    parser.add_argument("--ask", action="store_true", help="ask a mock model for the captions")
    parser.add_argument(
        "--ray", action="store_true", help="repeat it on a Ray cluster in two halves, and compare"
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "million-images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images = options.out / f"{options.images}.parquet"
    if not images.exists():
        make(images.with_suffix(".part"), options.images)
        images.with_suffix(".part").rename(images)
    print(f"{options.images:,} images of {images.stat().st_size / 1e9:.2f} GB", flush=True)
    command = [sys.executable, "-m", "pipeline", "generate", "--source", f"parquet:{images}"]
    with running_mock() if options.ask else nullcontext("") as mock:
        if options.ask:
            command += ["--tasks", "caption", "--styles", "brief", "--base-url", mock]
        else:
            command += ["--tasks", "none", "--keep-human", "--columns", "references=caption"]
        if options.kill_after_s:
            watch(command, options.out, mock, options.kill_after_s)
        for _ in range(2):
            watch(command, options.out, mock)
        if options.ray:
            halves = ["--executor", "ray", "--shards", "2"]
            watch([*command, *halves], options.out, mock, name="halves")
            digests = {name: digest_of(options.out / name) for name in ("dataset", "halves")}
            print(f"digests: {digests}, {'equal' if len({*digests.values()}) == 1 else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
