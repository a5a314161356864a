"""Measure `synth diff` of two versions of many rows.

    PYTHONPATH=. python benchmarks/diff.py [--rows 1000000] [--changed 0.01]

A row is an image of 8 bytes, which no diff reads, and a caption and a question of three lines. A share of the rows has another
caption in the second version. Prints seconds, CPU seconds and peak memory of the command. `--code FOLDER` measures that of
another checkout; the versions are kept in `--out`, and made once.
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.builder import Rows, with_split
from pipeline.tables import ROW
from tests.scene_data import publish_tables

WORDS = " ".join(f"word{n}" for n in range(30))


def row(number: int, *, is_other: bool) -> dict[str, Any]:
    """Return one row; `is_other` writes another caption."""
    text = f"{'Another' if is_other else 'A'} caption {number} {WORDS}."
    asked = {"question": f"How many {number}?", "answer": "two", "answer_type": "number", "prompt_id": "qa/v1@test"}
    return {
        "sample_id": hashlib.sha256(str(number).encode()).hexdigest(),
        "image": {"bytes": number.to_bytes(8), "path": None},
        "width_px": 500,
        "height_px": 375,
        "source": "numbers",
        "source_row": str(number),
        "license": "cc0-1.0",
        "references": [f"A reference {number} {WORDS}."],
        "captions": [{"text": text, "style": "brief", "prompt_id": "caption/v1@test"}],
        "qa": [asked],
        "split": "train",
    }


def make(folder: Path, count: int, every: int) -> None:
    """Write the next version, in which one row of `every` has another caption; 0: none has."""
    rows = Rows()

    def tables() -> Iterator[pa.Table]:
        for first in range(0, count, 5000):
            numbers = range(first, min(count, first + 5000))
            made = [row(n, is_other=every > 0 and n % every == 0) for n in numbers]
            table = pa.Table.from_pylist(made, schema=with_split(ROW))
            rows.add(table)
            yield table

    publish_tables(folder, tables(), rows)


def main() -> None:
    """Make the versions, and measure the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--changed", type=float, default=0.01)
    parser.add_argument("--code", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "diff-of-versions")
    options = parser.parse_args()
    folder = options.out / f"{options.rows}-{options.changed}"
    if not (folder / "versions" / "v1.0.1").exists():
        make(folder, options.rows, 0)
        make(folder, options.rows, round(1 / options.changed))
    command = [sys.executable, "-m", "pipeline.cli", "diff", str(folder), "v1.0.0", "v1.0.1", "--rows", "0"]
    start = time.monotonic()
    subprocess.run(command, check=True, cwd=options.code, env=os.environ | {"PYTHONPATH": str(options.code)})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = used.ru_utime + used.ru_stime
    print(f"{time.monotonic() - start:.1f} s, {cpu_s:.1f} CPU s, {used.ru_maxrss / 1000:,.0f} MB")


if __name__ == "__main__":
    main()
