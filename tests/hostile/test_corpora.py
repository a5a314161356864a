"""The test files of Pillow and of Parquet, and mutants of the images: each costs itself alone, in bounded memory and time.

`make test-long` fetches both collections to `.stamps/corpora` (SYNTH_CORPORA names another folder): they are too large to be
kept here. Where they cannot be fetched, these tests are skipped, and say so.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile import LONG, damaged
from tests.hostile.test_parquet import read_all

CORPORA = Path(os.environ.get("SYNTH_CORPORA", Path(__file__).parents[2] / ".stamps" / "corpora"))
MUTANTS_OF_EACH = 4
DECODE_BYTES, DECODE_SECONDS = 1_000_000_000, 10.0  # of one image; a GIF of 50 megapixels would be allowed
TABLE_SECONDS = 30.0  # CPU time of one Parquet file
DECODE = """
import json, sys, time
from pathlib import Path
from pipeline.errors import ImageError
from pipeline.images.decode import prepare_image
from tests.hostile import memory_bytes
worst = {"bytes": 0, "seconds": 0.0, "good": 0, "bad": 0}
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, file=sys.stderr, flush=True)  # the last one is named if the process dies
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_bytes("VmRSS"), time.process_time()
    try:
        prepare_image(path.read_bytes())
        worst["good"] += 1
    except ImageError:
        worst["bad"] += 1
    worst["seconds"] = max(worst["seconds"], time.process_time() - start)
    worst["bytes"] = max(worst["bytes"], memory_bytes() - before)
print(json.dumps(worst))
"""


def need(name: str) -> Path:
    """Return the folder of a collection, or skip the test."""
    if not LONG:
        pytest.skip("make test-long fetches the collections")
    if not (CORPORA / name).is_dir():
        pytest.skip(f"{name} could not be fetched to {CORPORA}")
    return CORPORA / name


def test_each_image_decodes_or_is_refused_in_bounded_memory_and_time(tmp_path: Path) -> None:
    draw = random.Random(7)
    images = [path.read_bytes() for path in sorted(need("pillow").rglob("*")) if path.is_file()]
    for number, data in enumerate(images):
        (tmp_path / f"{number}").write_bytes(data)
        for mutant in range(MUTANTS_OF_EACH):
            (tmp_path / f"{number}~{mutant}").write_bytes(damaged(data, draw))
    done = subprocess.run([sys.executable, "-c", DECODE, str(tmp_path)], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    worst = json.loads(done.stdout)
    assert worst["good"] + worst["bad"] == len(images) * (1 + MUTANTS_OF_EACH)
    assert min(worst["good"], worst["bad"]) > 1000
    assert (worst["bytes"] < DECODE_BYTES, worst["seconds"] < DECODE_SECONDS) == (True, True), worst


@pytest.mark.parametrize("name", ["bad_data", "data"])
def test_each_parquet_file_is_rows_or_one_error(name: str) -> None:
    folder = need("parquet") / name
    outcomes, slowest = read_all(folder)
    assert set(outcomes) <= {"rows", "error"} and outcomes["rows"] > 0
    assert sum(outcomes.values()) == len(list(folder.rglob("*.parquet")))
    assert slowest < TABLE_SECONDS
