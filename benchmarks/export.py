"""Measure exports beside a bare copy loop: `python benchmarks/export.py [--images 5000] [--rounds 3] [--formats csv ...]`.

A version of JPEGs of about 46 kB, with one caption each. The loop reads the same rows and writes each image to a file, without
texts and checksums. CPU time of the process, the least of some rounds in turn; memory is the peak of each, in processes of
their own.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.dataset.builder import Rows
from pipeline.dataset.version import Version, read_version
from pipeline.export.export import export_version
from pipeline.export.formats import FORMATS
from pipeline.types import Sample
from tests.scene_data import publish_rows, sample_table

BARE = "bare"
SIDE_PX = 200


def peak_mb() -> float:
    """Return the peak memory of this process since it began; that of `getrusage` holds its parent's as well."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def make_version(folder: Path, images: int) -> Path:
    """Write a version of noise, and return its folder."""
    rng, samples = np.random.default_rng(0), []
    for number in range(images):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)).save(out, "JPEG", quality=95)
        data = out.getvalue()
        name, row = hashlib.sha256(data).hexdigest(), f"{number}.jpg"
        samples.append(Sample(id=name, source_row=row, images=(data,), width_px=SIDE_PX, height_px=SIDE_PX, license="cc0-1.0"))
    fixed = {"style": "plain", "task": "caption", "prompt_id": "p", "split": "train"}
    captions = [{"sample_id": s.id, "text": f"Noise of picture number {n}.", **fixed} for n, s in enumerate(samples)]
    version, _ = publish_rows(folder, [pa.Table.from_pylist(captions)], sample_table(samples).to_batches(), rows=Rows())
    return version.path


def copy(version: Version, out: Path) -> None:
    """Write each image to a file."""
    out.mkdir()
    for _, batch in version.batches(["sample_id", "image"], 64):
        for row in batch.to_pylist():
            (out / f"{row['sample_id']}.jpg").write_bytes(row["image"]["bytes"])


def main() -> None:
    """Measure all formats in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], choices=[*FORMATS])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        version, out = read_version(Path(options.one[0])), Path(options.one[0]).parents[2] / "out"
        started = time.process_time()
        if options.one[1] == BARE:
            copy(version, out)
        else:
            export_version(version, options.one[1], out)
        seconds = time.process_time() - started
        shutil.rmtree(out)
        print(json.dumps([seconds, peak_mb()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make_version(Path(folder) / "d", options.images)
        kinds = [BARE, *options.formats]
        runs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind in kinds:
                command = [sys.executable, __file__, "--one", str(path), kind]
                runs[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        bare = min(seconds for seconds, _ in runs[BARE])
        print(f"{'format':<12} CPU ms/image  of bare  peak MB")
        for kind in kinds:
            seconds, memory = min(seconds for seconds, _ in runs[kind]), max(memory for _, memory in runs[kind])
            print(f"{kind:<12} {seconds / options.images * 1e3:12.3f} {seconds / bare:8.2f} {memory:8.0f}")


if __name__ == "__main__":
    main()
