"""Measure how fast images are read and checked.

    python benchmarks/read_images.py [--images 400] [--photos FOLDER]

JPEGs of 500 x 375 px, or your own photos, are read, decoded, checked and hashed as in every source. The
baselines are a Pillow loop that only reads and decodes (`bare`), and one that also converts to RGB
(`convert`). Two more steps measure the work before an image is sent to a model: the check whether its
bytes can be sent unchanged, and re-encoding. Rounds are interleaved, and the first one is a warm-up. Each
step has its own process, because reused memory can halve the time of a step. CPU seconds include that process
and its decoding workers.
"""

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from photos import noise_jpeg
from PIL import Image

from pipeline.config.files import resolve
from pipeline.inference.protocol import reencode, sendable_format
from pipeline.sources import open_source


def make(folder: Path, count: int) -> None:
    """Write distinct noisy photos."""
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(noise_jpeg(number))


def bare(folder: Path) -> None:
    """Read and decode images with Pillow."""
    for path in sorted(folder.iterdir()):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()


def convert(folder: Path) -> None:
    """Read and decode images, and convert them to RGB."""
    for path in sorted(folder.iterdir()):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.convert("RGB")


def source(folder: Path) -> None:
    """Read images through the folder source."""
    for _ in open_source(resolve(source=f"folder:{folder}")).rows:
        pass


def send(folder: Path) -> None:
    """Check whether the bytes can be sent unchanged, which needs only the header of each image."""
    for path in sorted(folder.iterdir()):
        assert sendable_format(path.read_bytes(), None)


def shrink(folder: Path) -> None:
    """Reduce images to 100,000 pixels and re-encode them."""
    for path in sorted(folder.iterdir()):
        reencode(path.read_bytes(), 100_000)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its running children."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    ticks = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13] for child in children]
    return time.process_time() + sum(int(count) for used in ticks for count in used) / os.sysconf(
        "SC_CLK_TCK"
    )


STEPS: dict[str, Callable[[Path], None]] = {
    "bare": bare,
    "convert": convert,
    "source": source,
    "send": send,
    "shrink": shrink,
}


def serve(step: str, folder: Path) -> None:
    """Run a step for each line on stdin, and print its CPU seconds."""
    for _ in sys.stdin:
        started = cpu_seconds()
        STEPS[step](folder)
        print(cpu_seconds() - started, flush=True)


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each step."""
    command = [sys.executable, __file__, "--folder", str(folder), "--step"]
    runners = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in STEPS
    }
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(rounds + 1):
        for name, runner in runners.items():
            assert runner.stdin and runner.stdout
            print(file=runner.stdin, flush=True)
            seconds[name].append(float(runner.stdout.readline()))
    for runner in runners.values():
        runner.communicate()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Print images per CPU second, and the ratio to the bare loop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs, repeated until there are --images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        serve(arguments.step, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.photos:
            photos = sorted(
                path for path in arguments.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
            )
            if not photos:
                raise SystemExit(f"no JPEG in {arguments.photos}")
            for number in range(arguments.images):
                shutil.copy(photos[number % len(photos)], folder / f"{number:05d}.jpg")
        else:
            make(folder, arguments.images)
        middle = measure(folder, arguments.rounds)
    what = f"photos of {arguments.photos}" if arguments.photos else "JPEGs of 500 x 375 px"
    print(f"{arguments.images} {what}, medians of {arguments.rounds} rounds")
    for name, value in middle.items():
        print(
            f"{name:<8} {arguments.images / value:8.0f} images a CPU second, {value / middle['bare']:.2f} "
            "of the bare loop"
        )


if __name__ == "__main__":
    main()
