"""Measure the CPU time per image of `synth generate`, from the image file to the version.

    python benchmarks/whole_client.py [--peer DIR]

`synth generate` reads a folder of distinct JPEGs (500 x 375 px, 56 kB) and writes a version. For each image,
it requests two captions and one set of four questions from a mock endpoint without latency
(benchmarks/mock_chat.py). CPU seconds include the command and its workers, but not the endpoint. The cost per
image is the slope between a small and a large folder, which excludes start-up.

--peer names the root of another checkout of `synth`. It alternates with this one in the same environment.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mock_chat import running_mock
from read_images import make

HERE = Path(__file__).parent


def run(checkout: Path, images: Path, url: str, out: Path) -> float:
    """Generate a version from an image folder. Returns the CPU seconds."""
    options = ["--source", f"folder:{images}", "--base-url", url, "--out", str(out)]
    command = [sys.executable, "-m", "pipeline", "generate", *options]
    log = out.with_suffix(".log")
    with log.open("w") as printed:
        process = subprocess.Popen(command, cwd=checkout, stdout=printed, stderr=printed)
        _, status, used = os.wait4(process.pid, 0)
    if status or not list(out.glob("versions/v*/manifest.json")):
        raise SystemExit(f"no version: {' '.join(command)}\n{log.read_text()[-2000:]}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print CPU milliseconds per image for each round, and the median."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, nargs=2, default=[500, 2500], help="images of the small and of the large folder"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="root of another checkout")
    options = parser.parse_args()
    checkouts = {"this checkout": HERE.parent} | (
        {str(options.peer): options.peer.resolve()} if options.peer else {}
    )
    costs_ms: dict[str, list[float]] = {name: [] for name in checkouts}
    with running_mock() as url, tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / f"images-{count}" for count in options.images]
        for folder, count in zip(folders, options.images, strict=True):
            folder.mkdir()
            make(folder, count)
        for number in range(options.rounds):
            for place, (name, checkout) in enumerate(checkouts.items()):
                outs = [Path(temporary) / f"{number}-{place}-{folder.name}" for folder in folders]
                small, large = (
                    run(checkout, folder, url, out) for folder, out in zip(folders, outs, strict=True)
                )
                costs_ms[name].append((large - small) / (options.images[1] - options.images[0]) * 1e3)
                print(
                    f"{name}: {costs_ms[name][-1]:.2f} CPU ms an image ({small:.1f} and {large:.1f} s)",
                    flush=True,
                )
    for name, costs in costs_ms.items():
        print(f"{name}: median {statistics.median(costs):.2f} CPU ms an image")


if __name__ == "__main__":
    main()
