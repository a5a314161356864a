"""The test files of Pillow and of Parquet, and mutants of them: each costs itself alone, in bounded memory and time.

`make test-long` fetches both collections to `.stamps/corpora` (SYNTH_CORPORA names another folder): they are too large to be
kept here. Where they cannot be fetched, these tests are skipped, and say so.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.chat.server import Act, ChatServer, running_chat
from tests.hostile import LONG, damaged
from tests.hostile.test_parquet import read_all

CORPORA = Path(os.environ.get("SYNTH_CORPORA", Path(__file__).parents[2] / ".stamps" / "corpora"))
SYNTH = Path(sys.executable).with_name("synth")
MUTANTS_OF_EACH = 4
DECODE_BYTES, DECODE_SECONDS = 1_000_000_000, 10.0  # of one image; a GIF of 50 megapixels would be allowed
TABLE_SECONDS = 30.0  # CPU time of one Parquet file
COMMAND_BYTES = 1_000_000_000  # resident memory of a command, without its workers
SETTINGS = """
source: folder:images
tasks: [caption]
generate: {caption_styles: [plain]}
filter: {language: null}
dedupe: {max_images_per_caption: 100000}
"""
# A process begins with the peak of the one that it was forked from: this one is small.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)  # of the command, or of the largest of its workers
sys.exit(code)
"""
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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All images of Pillow's tests, and mutants of each, in one folder."""
    folder, draw = tmp_path_factory.mktemp("corpora") / "images", random.Random(7)
    folder.mkdir()
    for path in sorted(need("pillow").rglob("*")):
        if path.is_file():
            name = path.relative_to(CORPORA / "pillow").as_posix().replace("/", "_")
            (folder / f"{name}.png").write_bytes(path.read_bytes())  # the name decides what is tried, the content how
            for number in range(MUTANTS_OF_EACH):
                mutant = damaged(path.read_bytes(), draw)
                (folder / f"{name}~{number}.png").write_bytes(mutant)
    return folder


def test_each_image_decodes_or_is_refused_in_bounded_memory_and_time(images: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DECODE, str(images)], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    worst = json.loads(done.stdout)
    assert worst["good"] + worst["bad"] == len(list(images.iterdir()))
    assert min(worst["good"], worst["bad"]) > 1000
    assert (worst["bytes"] < DECODE_BYTES, worst["seconds"] < DECODE_SECONDS) == (True, True), worst


def test_a_run_over_all_images_accounts_for_each_and_every_command_reads_what_is_left(images: Path) -> None:
    caption = json.dumps({"caption": "A grey wall of noise stands in a small and quiet room."})

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(SYNTH), *arguments], cwd=images.parent, capture_output=True, text=True
        )
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr[-2000:]
        peak_bytes = int(done.stdout.splitlines()[-1])
        assert peak_bytes < COMMAND_BYTES, (arguments, peak_bytes)

    def script(times: int, body: dict[str, Any]) -> Act:
        return Act(text=caption)

    with running_chat(ChatServer(script)) as chat:
        (images.parent / "synth.yaml").write_text(SETTINGS)
        run("generate", "--config", "synth.yaml", "--out", "data", "--base-url", chat.url)
    stages = images.parent / "data" / "stages"
    kept = pq.read_table(stages / "source" / "kept.parquet", columns=["sample_id"]).num_rows
    rejected = pq.read_table(stages / "source" / "rejected.parquet")
    assert kept > 300 and kept + len(set(rejected["source_row"].to_pylist())) == len(list(images.iterdir()))
    run("report", "data")
    run("check", "data")
    run("push", "data", "--repo", "me/x", "--dry-run")
    run("train", "--data", "data", "--encoder", "tiny-vit", "--decoder", "scratch", "--steps", "2", "--out", "captioner")


@pytest.mark.parametrize("name", ["bad_data", "data"])
def test_each_parquet_file_is_rows_or_one_error(name: str) -> None:
    folder = need("parquet") / name
    outcomes, slowest = read_all(folder)
    assert set(outcomes) <= {"rows", "error"} and outcomes["rows"] > 0
    assert sum(outcomes.values()) == len(list(folder.rglob("*.parquet")))
    assert slowest < TABLE_SECONDS
