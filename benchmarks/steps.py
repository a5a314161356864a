"""Measure the cost per annotation of the steps from filter to version, optionally for two checkouts.

    PYTHONPATH=. python benchmarks/steps.py [--images 10000] [--peer FOLDER] [--rounds 3]
    PYTHONPATH=. python benchmarks/steps.py --comparing 25000000

Each checkout generates a dataset from a Parquet file with small images, whose human texts are captions in two
styles and three questions from drawn scenes. `synth generate` is then repeated in new processes, alternating
between this checkout and the peer. Each run has another value of `filter.max_caption_words`, so that only
filter and later steps run again. Reports the CPU time and peak memory of the process, including file access.
The cost of start-up (a run on eight images) is subtracted. With --comparing, generates rows with few columns,
and runs only the steps that compare rows.
"""

import argparse
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.scenes.questions import ask_number, ask_other, ask_yes_no
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.plan import Plan
from pipeline.progress import NullProgress
from pipeline.run import steps_of
from pipeline.scenes.scene import sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.steps.base import RowStep, StepFile, compare_shards, judge_shard
from pipeline.storage.database import open_database, read
from pipeline.storage.files import write_json

TEXTS = len(STYLES) + 3  # per image
START_IMAGES = 8
MAX_WORDS = 200  # more than any caption has
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


def make_rows(db: Any, count: int) -> Iterator[pa.Table]:
    """Yield rows with the columns that steps after verify read: one caption and four questions per image."""
    query = f"""
    WITH words AS (SELECT ['dog','cat','bus','tree','man','woman','kite','boat','horse','table','lamp',
                          'street'] AS w,
                          ['red','blue','old','small','wooden','bright','dark','round'] AS a),
    drawn AS (SELECT range AS n, range // 5 AS image, range % 5 AS position, (hash(range) >> 1)::BIGINT AS h
              FROM range({count}))
    SELECT sha256('a' || n) AS annotation_id, sha256('s' || image) AS sample_id,
           CASE WHEN position = 0 THEN 'caption' ELSE 'qa' END AS task,
           CASE WHEN position = 0 THEN 'brief' ELSE '' END AS style,
           CASE WHEN position = 0 THEN 'A ' || a[1 + h % 8] || ' ' || w[1 + h // 8 % 12] || ' stands near a '
               || a[1 + h // 96 % 8] || ' ' || w[1 + h // 768 % 12] || ' at place '
                || (h // 9216 % 100000) END AS clean_text,
           CASE WHEN position = 1 THEN 'Is there a ' || w[1 + h % 12] || ' at place '
                || (h // 8 % 20000) || '?'
                WHEN position = 2 THEN 'How many ' || w[1 + h % 12] || 's are near place '
                || (h // 8 % 20000) || '?'
                WHEN position > 2 THEN 'What is ' || a[1 + h % 8] || ' beside the '
                || w[1 + h // 8 % 12] || ' of place '
               || (h // 96 % 20000) || '?' END AS clean_question,
           CASE WHEN position = 1 THEN CASE WHEN h % 10 < 7 THEN 'yes' ELSE 'no' END
                WHEN position = 2 THEN (h // 96 % 5)::VARCHAR
                WHEN position > 2 THEN w[1 + h // 3 % 12] END AS clean_answer,
           CASE position WHEN 1 THEN 'yes/no' WHEN 2 THEN 'number' ELSE 'other' END AS answer_type,
           NULL::VARCHAR AS clean_record,
           NULL::VARCHAR AS source_split, 'p' AS prompt_id, '' AS expression,
           NULL::INTEGER[] AS evidence_pages, 1 AS pages,
           0 AS hedge_count, NULL::DOUBLE AS agreement, NULL::DOUBLE AS alignment
    FROM drawn, words ORDER BY n
    """
    yield from read(db.sql(query))


def compare_only(count: int) -> None:
    """Run the steps that compare rows in a child process. Prints the seconds of each, and the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = DatasetDir(Path(folder))
        with open_database(dataset.path) as db:
            tables = make_rows(db, count)
            first = next(tables)
            path = dataset.step_file("verify")
            path.parent.mkdir(parents=True)
            with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table)
        pid = os.fork()
        if pid == 0:
            plan = Plan.resolve(resolve(source="scenes"), dataset)
            steps = [step for step in steps_of(plan) if isinstance(step, RowStep) and step.compare]
            before = "verify"
            for step in steps[[step.name for step in steps].index("dedupe") :]:
                wall, cpu, given = time.monotonic(), time.process_time(), StepFile(before)
                compare_shards(step, [dataset], given, plan, NullProgress())
                middle = time.process_time()
                judge_shard(step, given, plan, "", dataset)
                kept = pq.ParquetFile(dataset.step_file(step.name)).metadata.num_rows
                us, judged = (1e6 * s / count for s in (middle - cpu, time.process_time() - middle))
                seconds = time.monotonic() - wall
                print(
                    f"{step.name:<8} {seconds:6.0f} s, {us:5.2f} us CPU a row, {judged:.2f} to write, "
                    f"{kept:,} kept",
                    flush=True,
                )
                before = step.name
            os._exit(0)
        _, status, usage = os.wait4(pid, 0)
        print(
            f"exit {status}, peak {usage.ru_maxrss / 1000:,.0f} MB, CPU "
            f"{usage.ru_utime + usage.ru_stime:.0f} s"
        )


def main() -> None:
    """Run the benchmark that the arguments select."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--peer", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--comparing", type=int, metavar="ROWS")
    arguments = parser.parse_args()
    if arguments.comparing:
        compare_only(arguments.comparing)
        return
    checkouts = {"ours": Path(__file__).parents[1].resolve()}
    if arguments.peer:
        checkouts["peer"] = arguments.peer.resolve()
    compare(arguments.images, checkouts, arguments.rounds)


if __name__ == "__main__":
    main()
