"""Measure the cost per annotation of the steps from filter to version, optionally for two checkouts.

    PYTHONPATH=. python benchmarks/steps.py [--images 10000] [--peer FOLDER] [--rounds 3]

Each checkout generates a dataset from a Parquet file with small images. The human texts of each image, taken
from drawn scenes, are captions in two styles and three questions. `synth generate` is then repeated in new
processes, alternating between this checkout and the peer. Each run has another value of
`filter.max_caption_words`, so that only filter and later steps run again. Reports the CPU time and peak
memory of the process, including file access.
The cost of start-up (a run on eight images) is subtracted.
"""

import argparse
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.scenes.questions import ask_number, ask_other, ask_yes_no
from pipeline.scenes.scene import sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.storage.files import write_json

TEXTS = len(STYLES) + 3  # per image
START_IMAGES = 8
MAX_WORDS = 200
CODE = "from pipeline.cli import main; main()"


def plain_png(number: int) -> bytes:
    """Return an image in one color that encodes the number."""
    buffer = io.BytesIO()
    Image.new("RGB", (84, 84), tuple(number.to_bytes(3, "big"))).save(buffer, "PNG")
    return buffer.getvalue()


def make_source(path: Path, count: int) -> None:
    """Write a Parquet file with images, captions and questions."""
    rows = []
    for n in range(count):
        scene = sample_scene(random.Random(n))
        pairs = [ask(scene, random.Random(n)) for ask in (ask_yes_no, ask_number, ask_other)]
        captions = [caption(scene, style) for style in STYLES]
        qa = [{"question": pair.question, "answer": pair.answer} for pair in pairs]
        rows.append({"image": {"bytes": plain_png(n), "path": None}, "captions": captions, "qa": qa})
    pq.write_table(pa.Table.from_pylist(rows), path)


def run(checkout: Path, folder: Path, out: str, max_words: int) -> tuple[float, float]:
    """Run all outdated steps in the folder `out` with a checkout. Returns CPU seconds and peak megabytes."""
    config = folder / "config.yaml"
    write_json(config, {"dedupe": {"images": "none"}, "filter": {"max_caption_words": max_words}})
    arguments = [
        f"--source=parquet:{folder / Path(out).name}.parquet",
        "--columns=references=captions",
        "--no-model",
        "--keep-human",
    ]
    arguments += [f"--config={config}", f"--out={folder / out}", "--license=cc0-1.0"]
    command = [sys.executable, "-c", CODE, "generate", *arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
    )
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(errors.decode())
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def compare(count: int, checkouts: dict[str, Path], rounds: int) -> None:
    """Print the cost per annotation for each checkout, from interleaved rounds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_source(folder / "whole.parquet", count)
        make_source(folder / "start.parquet", START_IMAGES)
        for name, checkout in checkouts.items():
            for source in ("start", "whole"):
                run(checkout, folder, f"{name}/{source}", MAX_WORDS)
        costs: dict[str, list[float]] = {name: [] for name in checkouts}
        for number in range(1, rounds + 1):
            for name, checkout in checkouts.items():
                idle, _ = run(checkout, folder, f"{name}/start", MAX_WORDS + number)
                seconds, megabytes = run(checkout, folder, f"{name}/whole", MAX_WORDS + number)
                costs[name].append(1e6 * (seconds - idle) / (TEXTS * (count - START_IMAGES)))
                print(
                    f"{name:<6} {costs[name][-1]:8.1f} us of CPU an annotation, peak {megabytes:,.0f} MB",
                    flush=True,
                )
        for name, values in costs.items():
            print(f"{name:<6} median {statistics.median(values):.1f} us of CPU an annotation")
        if len(costs) == 2:
            own_us, peer_us = (statistics.median(values) for values in costs.values())
            print(f"ratio  {own_us / peer_us:.2f}")


def main() -> None:
    """Compare this checkout and the peer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--peer", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkouts = {"ours": Path(__file__).parents[1].resolve()}
    if arguments.peer:
        checkouts["peer"] = arguments.peer.resolve()
    compare(arguments.images, checkouts, arguments.rounds)


if __name__ == "__main__":
    main()
