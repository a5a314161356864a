"""Parquet: bombs, damage and odd schemas end as rejected rows or one error, in bounded memory."""

import io
import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.files import resolve
from pipeline.errors import SynthError
from pipeline.sources import open_source
from pipeline.types import Rejected, Sample
from tests.hostile import bounded_memory, damaged, part_of

LIMIT_BYTES = 2_500_000_000  # of the address space of a process that reads one file; the packages alone reserve 1.5 GB


def png(color: str = "red", side_px: int = 16) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side_px, side_px), color).save(out, "PNG")
    return out.getvalue()


def read(path: Path, **settings: Any) -> list[Sample | Rejected]:
    return list(open_source(resolve(source=f"parquet:{path}", **settings)).rows)


def reasons(rows: list[Sample | Rejected]) -> set[str]:
    return {row.reason for row in rows if isinstance(row, Rejected)}


def repeated(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    """Return a column that stores one value, and names it in every row."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], kind))


def write(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(
        pa.table(columns), path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False, **options
    )


@pytest.mark.parametrize("size_bytes", [1_000_000, 99_000_000, 101_000_000, 300_000_000])
def test_one_image_that_every_row_names_is_decoded_one_row_at_a_time(size_bytes: int, tmp_path: Path) -> None:
    cells = repeated(png() + bytes(size_bytes), pa.binary(), 6)
    write(
        tmp_path / "bomb.parquet", {"image": pa.StructArray.from_arrays([cells, pa.nulls(6, pa.string())], ["bytes", "path"])}
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 50_000
    with bounded_memory(1_300_000_000 if size_bytes > 200_000_000 else 700_000_000):
        source = open_source(resolve(source=f"parquet:{tmp_path / 'bomb.parquet'}"))
        found = [type(row).__name__ if isinstance(row, Sample) else row.reason for row in source.rows]
    kind = "Sample" if size_bytes < 100_000_000 else "file_too_large" if size_bytes < 256_000_000 else "row_too_large"
    assert found == [kind] * 6


def test_one_caption_that_every_row_names_is_rejected_without_filling_the_memory(tmp_path: Path) -> None:
    rows = 200
    columns = {"image": [png()] * rows, "caption": repeated("long " * 10_000_000, pa.string(), rows)}
    write(tmp_path / "bomb.parquet", columns)
    with bounded_memory(700_000_000):
        source = open_source(resolve(source=f"parquet:{tmp_path / 'bomb.parquet'}"))
        assert all(isinstance(row, Sample) for row in islice(source.rows, 10))


def test_text_that_is_no_utf8_costs_its_own_row_alone(tmp_path: Path) -> None:
    texts = pa.array([b"A red wall.", b"\xff\xfe", b"A red door."], pa.binary()).view(pa.string())
    write(tmp_path / "odd.parquet", {"image": [png("red"), png("blue"), png("green")], "caption": texts})
    rows = read(tmp_path / "odd.parquet")
    assert [type(row).__name__ for row in rows] == ["Sample", "Rejected", "Sample"]
    assert reasons(rows) == {"unreadable_row"}


def test_a_name_of_a_column_that_is_no_utf8_is_one_error(tmp_path: Path) -> None:
    write(tmp_path / "odd.parquet", {"image": [png()], "caption": ["a"]})
    data = (tmp_path / "odd.parquet").read_bytes()
    (tmp_path / "odd.parquet").write_bytes(data.replace(b"caption", b"capt\xf9on"))
    with pytest.raises(SynthError, match="cannot read"):
        read(tmp_path / "odd.parquet")


SCHEMAS: dict[str, Any] = {
    "no columns": {},
    "an image that is a number": {"image": [1, 2]},
    "an image that is a list of numbers": {"image": [[1], [2]]},
    "an image that is a date": {"image": pa.array([0, 1], pa.timestamp("ns"))},
    "bytes that are a list of lists": {"image": [[[b"x"]], [[b"y"]]]},
    "a struct without bytes": {"image": [{"path": "/etc/passwd"}, {"path": "/etc/shadow"}]},
    "bytes that are text": {"image": [{"bytes": "x", "path": None}, {"bytes": "y", "path": None}]},
    "bytes that are numbers": {"image": [{"bytes": 1, "path": None}, {"bytes": 2, "path": None}]},
    "paths in place of bytes": {"image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": "/dev/zero"}]},
    "URLs in place of bytes": {"image": [{"bytes": None, "path": "http://169.254.169.254/"}] * 2},
    "only nulls": {"image": pa.nulls(2, pa.binary())},
    "empty bytes": {"image": [b"", b""]},
    "captions that are numbers": {"image": [png(), png()], "caption": [1, 2]},
    "captions that are bytes": {"image": [png(), png()], "caption": [b"a", b"b"]},
    "captions that are a map": {
        "image": [png(), png()],
        "caption": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
    },
    "a split that is a number": {"image": [png(), png()], "split": [1, 2]},
    "a split of nonsense": {"image": [png(), png()], "split": ["\x1b]52;", ""]},
    "control bytes in the name of a column": {"image": [png(), png()], "\x1b]52;c;AAAA\x07": ["a", "b"]},
    "the same column twice": pa.table([pa.array([png()]), pa.array([png()])], names=["image", "image"]),
    "a thousand columns": {"image": [png()], **{f"column_{n}": [n] for n in range(1000)}},
    "dictionaries of images": {"image": pa.array([png(), png()]).dictionary_encode()},
    "large binaries": {"image": pa.array([png(), png()], pa.large_binary())},
    "a deck of 1,000 pages": {"pages": [[{"bytes": png(), "path": None}] * 1000]},
    "decimals": {"image": [png()], "caption": pa.array([1], pa.decimal128(38))},
    "a column without a name": {"": [png()]},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_odd_schema_is_rows_or_one_error(name: str, tmp_path: Path) -> None:
    table = SCHEMAS[name] if isinstance(SCHEMAS[name], pa.Table) else pa.table(SCHEMAS[name])
    pq.write_table(table, tmp_path / "odd.parquet")
    try:
        rows = read(tmp_path / "odd.parquet")
    except SynthError as error:
        assert str(error)
    else:
        assert len(rows) == table.num_rows


READ = """
import json, sys, time
from itertools import islice
from pathlib import Path
from pipeline.config.files import resolve
from pipeline.errors import SynthError
from pipeline.sources import open_source
from tests.hostile import limit_memory
limit_memory(int(sys.argv[1]))
outcomes, slowest = {}, 0.0
for path in sorted(Path(sys.argv[2]).rglob("*.parquet")):
    print(path, file=sys.stderr, flush=True)  # the last one is named if the process dies
    start = time.process_time()
    try:
        list(islice(open_source(resolve(source=f"parquet:{path}")).rows, 100))
        outcome = "rows"
    except SynthError as error:
        outcome = "error" if str(error) else "an error without words"
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
    slowest = max(slowest, time.process_time() - start)
print(json.dumps([outcomes, slowest]))
"""


def read_all(folder: Path) -> tuple[dict[str, int], float]:
    """Read the files below a folder in a process with little memory; return the outcomes and the most CPU seconds of a file."""
    done = subprocess.run([sys.executable, "-c", READ, str(LIMIT_BYTES), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes, slowest = json.loads(done.stdout)
    return outcomes, slowest


def test_damaged_files_are_rows_or_one_error_each_in_bounded_memory(tmp_path: Path) -> None:
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (16, 16, 3), np.uint8)) for n in range(8)]
    cells: list[dict[str, Any]] = []
    for image in noise:
        out = io.BytesIO()
        image.save(out, "JPEG")
        cells.append({"bytes": out.getvalue(), "path": f"{len(cells)}.jpg"})
    texts = [f"A caption of image {n}." for n in range(8)]
    for codec in ("zstd", "snappy", "none", "gzip"):
        table = pa.table({"image": cells, "caption": texts, "split": ["train"] * 8})
        pq.write_table(table, tmp_path / f"{codec}.good", compression=codec)
    seeds = part_of(range(2000), 200)
    for seed in seeds:
        good = tmp_path / f"{('zstd', 'snappy', 'none', 'gzip')[seed % 4]}.good"
        (tmp_path / f"{seed}.parquet").write_bytes(damaged(good.read_bytes(), random.Random(seed)))
    outcomes, _ = read_all(tmp_path)
    assert set(outcomes) == {"rows", "error"}
    assert sum(outcomes.values()) == len(seeds)
