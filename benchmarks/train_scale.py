"""Measure training in several processes, and on more images than fit in memory.

    PYTHONPATH=. python benchmarks/train_scale.py processes     # images per second of two processes and of one
    PYTHONPATH=. python benchmarks/train_scale.py memory        # 3 GB of images, in a process that may hold 2 GB

Memory: a version of 30,000 images of 100 kB (a small photograph with random bytes behind its end, which decoders skip) is
trained for some steps with an encoder that is not frozen. The private memory of the process is limited (RLIMIT_DATA); pages of
the mapped files do not count, since the system can reclaim them. The baseline reads all images into memory under the same
limit, as most datasets do.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from report import photo

from pipeline.dataset.version import Version
from pipeline.tables import SAMPLE
from tests.scene_data import make_version, publish_rows, scene_samples, true_captions

TRAIN = ("train", "--steps", "60", "--json")
SYNTH = [sys.executable, "-m", "pipeline.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.cli"]
READ_ALL_SCRIPT = """
import sys
from pathlib import Path
from pipeline.dataset.version import read_version
version = read_version(Path(sys.argv[1]))
images = {row["sample_id"]: row["image"]["bytes"] for row in version.read("train", ["sample_id", "image"]).to_pylist()}
print(len(images))
"""


def images_per_s(command: list[str], data: Path, out: Path, threads: int) -> float:
    """Train, and return the images per second over the last half of the steps."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    options = ["--data", str(data), "--encoder", "tiny-clip", "--out", str(out)]
    subprocess.run([*command, *TRAIN, *options], env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    first, last = steps[len(steps) // 2], steps[-1]
    images = last["images_per_s"] * last["seconds"] - first["images_per_s"] * first["seconds"]
    return float(images / (last["seconds"] - first["seconds"]))


def processes(folder: Path, rounds: int) -> None:
    """Print images per second of one process with one thread, one with two threads, and two with one thread each."""
    version, _ = make_version(folder / "d", scene_samples(600))
    kinds = {"one process, one thread": (SYNTH, 1), "one process, two threads": (SYNTH, 2), "two processes": (TORCHRUN, 1)}
    throughputs: dict[str, list[float]] = {name: [] for name in kinds}
    for round_index in range(rounds):
        for name, (command, threads) in kinds.items():
            throughputs[name].append(images_per_s(command, version.path, folder / f"{round_index}-{name}", threads))
    base = statistics.median(throughputs["one process, one thread"])
    for name, rates in throughputs.items():
        shown = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"{name:<26} {statistics.median(rates):>6.0f} images/s  {statistics.median(rates) / base:.2f} times  ({shown})")


def padded_version(folder: Path, count: int, image_bytes: int) -> Version:
    """Write a version of `count` photographs of `image_bytes` bytes each."""
    rng, photos = random.Random(0), [photo(n) for n in range(50)]
    samples = scene_samples(count)

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, count, 500):
            rows = [
                {
                    "sample_id": s.id,
                    "images": [(jpeg := photos[n % 50]) + rng.randbytes(image_bytes - len(jpeg))],
                    "pdq_hashes": [b""],
                }
                | {"width_px": 500, "height_px": 375, "source_row": s.source_row, "license": s.license, "split": None}
                | {"references": list(s.references)}
                for n, s in enumerate(samples[first : first + 500])
            ]
            yield from pa.Table.from_pylist(rows, schema=SAMPLE).to_batches()

    version, _ = publish_rows(folder, [true_captions(samples)], batches(), source="photos")
    return version


def memory(folder: Path, count: int, limit_mb: int) -> None:
    """Print whether a training, and reading all images, succeed within `limit_mb` of private memory."""
    version = padded_version(folder / "d", count, 100_000)
    size = sum(entry["bytes"] for entry in version.manifest["files"].values())
    print(f"{count:,} images, {size / 1e6:,.0f} MB; {limit_mb:,} MB allowed")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * 1_000_000, limit_mb * 1_000_000))

    train = [*SYNTH, *TRAIN, "--data", str(version.path), "--encoder", "tiny-vit", "--out", str(folder / "c")]
    config = folder / "train.yaml"
    config.write_text("evaluate_images: 32\nbeams: 1\n", encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    for name, command in (
        ("training", [*train, "--config", str(config)]),
        ("all read", [sys.executable, "-c", READ_ALL_SCRIPT, str(version.path)]),
    ):
        done = subprocess.run(command, preexec_fn=limited, env=environment, capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        print(f"{name:<10} {'done' if done.returncode == 0 else f'ended with {done.returncode}: {last[:100]}'}")


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("processes", "memory"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--limit-mb", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.what == "processes":
            processes(Path(name), arguments.rounds)
        else:
            memory(Path(name), arguments.images, arguments.limit_mb)


if __name__ == "__main__":
    main()
