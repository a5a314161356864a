"""Parquet: bombs, damage and odd schemas give rejected rows or one error, in bounded memory."""

import json
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import resolve
from pipeline.errors import SynthError
from pipeline.sources import open_source
from pipeline.types import Sample
from tests.hostile import bounded_memory, damaged, part_of
from tests.hub import datasets
from tests.pipeline.images.test_isolation import png

# The limit is on address space, of which the imported packages alone reserve 1.5 GB.
LIMIT_BYTES = 2_500_000_000


def read(path: Path) -> list[str]:
    """Return "sample" or the reason of rejection for each row of a file."""
    rows = open_source(resolve(source=f"parquet:{path}", image_filter={"enabled": False})).rows
    return ["sample" if isinstance(row, Sample) else row.reason for row in rows]


def repeated(value: Any, kind: pa.DataType, rows: int) -> pa.Array:
    """Return a column that stores one value for all rows."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], kind))


def write(path: Path, columns: dict[str, Any]) -> Path:
    options: Any = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    ("size_bytes", "outcome"),
    [(99_000_000, "sample"), (101_000_000, "file_too_large"), (300_000_000, "row_too_large")],
)
def test_image_shared_by_all_rows_is_read_or_rejected_in_bounded_memory(
    size_bytes: int, outcome: str, tmp_path: Path
) -> None:
    cells = repeated(png() + bytes(size_bytes), pa.binary(), 6)
    images = pa.StructArray.from_arrays([cells, pa.nulls(6, pa.string())], ["bytes", "path"])
    path = write(tmp_path / "bomb.parquet", {"image": images})
    assert path.stat().st_size < 50_000
    with bounded_memory(1_300_000_000 if size_bytes > 200_000_000 else 700_000_000):
        assert read(path) == [outcome] * 6


def test_caption_shared_by_all_rows_is_read_in_bounded_memory(tmp_path: Path) -> None:
    columns = {"image": [png()] * 200, "caption": repeated("long " * 10_000_000, pa.string(), 200)}
    path = write(tmp_path / "bomb.parquet", columns)
    with bounded_memory(700_000_000):
        rows = open_source(resolve(source=f"parquet:{path}", image_filter={"enabled": False})).rows
        assert all(isinstance(row, Sample) for row in islice(rows, 10))


def test_non_utf8_text_rejects_its_row_and_non_utf8_column_name_rejects_the_file(tmp_path: Path) -> None:
    texts = pa.array([b"A red wall.", b"\xff\xfe", b"A red door."], pa.binary()).view(pa.string())
    images = [png(color=color) for color in ("red", "blue", "green")]
    path = write(tmp_path / "odd.parquet", {"image": images, "caption": texts})
    assert read(path) == ["sample", "unreadable_row", "sample"]
    path.write_bytes(path.read_bytes().replace(b"caption", b"capt\xf9on"))
    with pytest.raises(SynthError, match="cannot read"):
        read(path)


TWO = [png(), png()]
SCHEMAS: dict[str, Any] = {
    "no columns": {},
    "image that is a number": {"image": [1, 2]},
    "image that is a list of numbers": {"image": [[1], [2]]},
    "bytes that are a list of lists": {"image": [[[b"x"]], [[b"y"]]]},
    "struct without bytes": {"image": [{"path": "/etc/passwd"}, {"path": "/etc/shadow"}]},
    "bytes that are text": {"image": [{"bytes": "x", "path": None}, {"bytes": "y", "path": None}]},
    "paths in place of bytes": {
        "image": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": "/dev/zero"}]
    },
    "URLs in place of bytes": {"image": [{"bytes": None, "path": "http://169.254.169.254/"}] * 2},
    "only nulls": {"image": pa.nulls(2, pa.binary())},
    "empty bytes": {"image": [b"", b""]},
    "captions that are bytes": {"image": TWO, "caption": [b"a", b"b"]},
    "captions that are a map": {
        "image": TWO,
        "caption": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
    },
    "captions that are decimals": {"image": TWO, "caption": pa.array([1, 2], pa.decimal128(38))},
    "split that is a number": {"image": TWO, "split": [1, 2]},
    "split of nonsense": {"image": TWO, "split": ["\x1b]52;", ""]},
    "control bytes in the name of a column": {"image": TWO, "\x1b]52;c;AAAA\x07": ["a", "b"]},
    "same column twice": pa.table([pa.array([png()]), pa.array([png()])], names=["image", "image"]),
    "thousand columns": {"image": [png()], **{f"column_{n}": [n] for n in range(1000)}},
    "large binaries": {"image": pa.array(TWO, pa.large_binary())},
    "deck of 1,000 pages": {"pages": [[{"bytes": png(), "path": None}] * 1000]},
    "column without a name": {"": [png()]},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_unusual_schema_gives_all_rows_or_one_error(name: str, tmp_path: Path) -> None:
    table = SCHEMAS[name] if isinstance(SCHEMAS[name], pa.Table) else pa.table(SCHEMAS[name])
    pq.write_table(table, tmp_path / "odd.parquet")
    try:
        rows = read(tmp_path / "odd.parquet")
    except SynthError as error:
        assert str(error)
    else:
        assert len(rows) == table.num_rows


READ = """
import json, sys
from itertools import islice
from pathlib import Path
from pipeline.config.files import resolve
from pipeline.errors import SynthError
from pipeline.sources import open_source
from tests.hostile import limit_memory
limit_memory(int(sys.argv[1]))
outcomes = {}
for path in sorted(Path(sys.argv[2]).rglob("*.parquet")):
    print(path, file=sys.stderr, flush=True)  # the last one is named if the process dies
    try:
        list(islice(open_source(resolve(source=f"parquet:{path}")).rows, 100))
        outcome = "rows"
    except SynthError as error:
        outcome = "error" if str(error) else "an error without words"
    outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(json.dumps(outcomes))
"""


def test_damaged_file_gives_rows_or_one_error_in_bounded_memory(tmp_path: Path) -> None:
    codecs = ("zstd", "snappy", "none", "gzip")
    images = [{"bytes": datasets.photo(n), "path": f"{n}.jpg"} for n in range(8)]
    captions = [f"A caption of image {n}." for n in range(8)]
    table = pa.table({"image": images, "caption": captions, "split": ["train"] * 8})
    for codec in codecs:
        pq.write_table(table, tmp_path / f"{codec}.good", compression=codec)
    seeds = part_of(range(2000), 200)
    for seed in seeds:
        good = tmp_path / f"{codecs[seed % 4]}.good"
        (tmp_path / f"{seed}.parquet").write_bytes(damaged(good.read_bytes(), random.Random(seed)))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(LIMIT_BYTES), tmp_path], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert set(outcomes) == {"rows", "error"}
    assert sum(outcomes.values()) == len(seeds)
