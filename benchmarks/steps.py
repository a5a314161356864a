"""Measure the cost per annotation of the steps from validate to version, beside another checkout of this project.

    PYTHONPATH=. python benchmarks/steps.py [--images 10000] [--peer FOLDER] [--rounds 3]
    PYTHONPATH=. python benchmarks/steps.py --comparing 25000000

Makes a dataset folder as generate would leave it: scenes with captions in two styles and three questions each, true by
construction. `synth generate --from-stage validate` then runs on copies of it, as a process of its own, with the code of this
checkout and of the peer in turn. Reports CPU time and peak memory of the process, including file input and output; the cost of
start-up (a run over eight images) is subtracted. With --comparing, makes rows of few columns, and runs only the steps that
compare rows.
"""

import argparse
import io
import os
import random
import shutil
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
from pipeline.dataset.images import ImageStore
from pipeline.digests import digest
from pipeline.progress import NullProgress
from pipeline.run import steps_of
from pipeline.scenes.scene import sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.steps.base import RunPlan, compare_shards, judge_shard
from pipeline.storage.database import open_database, read
from pipeline.storage.files import write_json, write_table
from pipeline.tables import ANNOTATION, EXCLUSIONS, LISTED_SAMPLE, SAMPLE_IMAGES, SOURCE_REJECTED

BATCH = 500  # images made at once
TEXTS = 5  # per image
START_IMAGES = 8


def plain_png(number: int) -> bytes:
    """Return an image of one color, which has the number in its three channels."""
    buffer = io.BytesIO()
    Image.new("RGB", (84, 84), tuple(number.to_bytes(3, "big"))).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int) -> Iterator[pa.Table]:
    """Yield rows of tables.LISTED_SAMPLE."""
    for first in range(0, count, BATCH):
        rows = []
        for n in range(first, min(first + BATCH, count)):
            ids = {"sample_id": digest([n]), "source_row": f"{n}", "num_pages": 1, "pdq_hashes": []}
            rows.append({**ids, "width_px": 84, "height_px": 84, "license": "cc0-1.0", "references": []})
        yield pa.Table.from_pylist(rows, schema=LISTED_SAMPLE)


def images(count: int) -> Iterator[pa.Table]:
    """Yield rows of tables.SAMPLE_IMAGES."""
    for first in range(0, count, BATCH):
        rows = [{"sample_id": digest([n]), "images": [plain_png(n)]} for n in range(first, min(first + BATCH, count))]
        yield pa.Table.from_pylist(rows, schema=SAMPLE_IMAGES)


def annotations(count: int) -> Iterator[pa.Table]:
    """Yield rows of tables.ANNOTATION as generate would leave them."""
    for first in range(0, count, BATCH):
        rows = []
        for n in range(first, min(first + BATCH, count)):
            scene, sample_id = sample_scene(random.Random(n)), digest([n])
            texts: list[dict[str, Any]] = [
                {"task": "caption", "style": style, "text": caption(scene, style)} for style in STYLES
            ]
            pairs = [ask(scene, random.Random(sample_id)) for ask in (ask_yes_no, ask_number, ask_other)]
            texts += [{"task": "qa", "style": ""} | pair.model_dump() for pair in pairs]
            for position, text in enumerate(texts):
                request = digest([sample_id, text["task"], text["style"]])
                ids = {"annotation_id": digest([request, position]), "sample_id": sample_id, "request_id": request}
                more = {"position": position, "prompt_id": "p", "pages": 1, "evidence_pages": [], "expression": ""}
                rows.append({**ids, **more, **text})
        yield pa.Table.from_pylist(rows, schema=ANNOTATION)


def make_folder(path: Path, count: int) -> None:
    """Make a dataset folder in which source and generate have been run."""
    dataset = DatasetDir(path)
    ImageStore(path).add(images(count))
    write_table(dataset.step_file("read"), samples(count), LISTED_SAMPLE)
    write_table(dataset.step_file("read", "rejected"), [SOURCE_REJECTED.empty_table()], SOURCE_REJECTED)
    write_table(dataset.step_file("read", "exclusions"), [EXCLUSIONS.empty_table()], EXCLUSIONS)
    write_table(dataset.step_file("ask"), annotations(count), ANNOTATION)
    source = {"name": "scenes", "revision": "1.0", "decks": False, "never": [], "compared_as": None}
    write_json(dataset.provenance("source"), source)
    write_json(dataset.provenance("generate"), {"name": "facts", "revision": "r"})


def run(checkout: Path, dataset: Path, count: int) -> tuple[float, float]:
    """Run all steps of a copy of a dataset folder with the code of a checkout; return CPU seconds and peak megabytes."""
    with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
        copy = Path(folder) / "d"
        shutil.copytree(dataset, copy, copy_function=os.link)  # nothing is written into these files
        arguments = ["--source", "scenes", "--limit", str(count), "--from-stage", "validate", "--out", str(copy)]
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "generate", *arguments]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(checkout)}, stderr=subprocess.PIPE, cwd=folder)
        assert process.stderr
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(errors.decode())
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def compare(count: int, checkouts: dict[str, Path], rounds: int) -> None:
    """Print the cost per annotation in each checkout, in interleaved rounds."""
    with tempfile.TemporaryDirectory() as folder:
        whole, start = Path(folder) / "whole", Path(folder) / "start"
        make_folder(whole, count)
        make_folder(start, START_IMAGES)
        costs: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(rounds):
            for name, checkout in checkouts.items():
                idle, _ = run(checkout, start, START_IMAGES)
                seconds, megabytes = run(checkout, whole, count)
                costs[name].append(1e6 * (seconds - idle) / (TEXTS * (count - START_IMAGES)))
                print(f"{name:<6} {costs[name][-1]:8.1f} us of CPU an annotation, peak {megabytes:,.0f} MB", flush=True)
        for name, values in costs.items():
            print(f"{name:<6} median {statistics.median(values):.1f} us of CPU an annotation")
        if len(costs) == 2:
            own_us, peer_us = (statistics.median(values) for values in costs.values())
            print(f"ratio  {own_us / peer_us:.2f}")


def make_rows(db: Any, count: int) -> Iterator[pa.Table]:
    """Yield rows as verify leaves them, with the columns that later steps read: one caption and four questions per image."""
    query = f"""
    WITH words AS (SELECT ['dog','cat','bus','tree','man','woman','kite','boat','horse','table','lamp','street'] AS w,
                          ['red','blue','old','small','wooden','bright','dark','round'] AS a),
    drawn AS (SELECT range AS n, range // 5 AS image, range % 5 AS position, (hash(range) >> 1)::BIGINT AS h
              FROM range({count}))
    SELECT sha256('a' || n) AS annotation_id, sha256('s' || image) AS sample_id,
           CASE WHEN position = 0 THEN 'caption' ELSE 'qa' END AS task,
           CASE WHEN position = 0 THEN 'brief' ELSE '' END AS style,
           CASE WHEN position = 0 THEN 'A ' || a[1 + h % 8] || ' ' || w[1 + h // 8 % 12] || ' stands near a '
               || a[1 + h // 96 % 8] || ' ' || w[1 + h // 768 % 12] || ' at place ' || (h // 9216 % 100000) END AS clean_text,
           CASE WHEN position = 1 THEN 'Is there a ' || w[1 + h % 12] || ' at place ' || (h // 8 % 20000) || '?'
                WHEN position = 2 THEN 'How many ' || w[1 + h % 12] || 's are near place ' || (h // 8 % 20000) || '?'
                WHEN position > 2 THEN 'What is ' || a[1 + h % 8] || ' beside the ' || w[1 + h // 8 % 12] || ' of place '
               || (h // 96 % 20000) || '?' END AS clean_question,
           CASE WHEN position = 1 THEN CASE WHEN h % 10 < 7 THEN 'yes' ELSE 'no' END
                WHEN position = 2 THEN (h // 96 % 5)::VARCHAR WHEN position > 2 THEN w[1 + h // 3 % 12] END AS clean_answer,
           CASE position WHEN 1 THEN 'yes/no' WHEN 2 THEN 'number' ELSE 'other' END AS answer_type,
           NULL::VARCHAR AS source_split, 'p' AS prompt_id, '' AS expression, NULL::INTEGER[] AS evidence_pages, 1 AS pages,
           0 AS hedge_count, NULL::DOUBLE AS agreement, NULL::DOUBLE AS alignment
    FROM drawn, words ORDER BY n
    """
    yield from read(db.sql(query))


def compare_only(count: int) -> None:
    """Run the steps that compare rows in a child process; print the seconds of each, and the peak memory of all."""
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
            plan = RunPlan(dataset, resolve(source="scenes"), "r", None)
            before = "verify"
            for step in steps_of(plan.config)[3:]:
                wall, cpu = time.monotonic(), time.process_time()
                compare_shards(step, [dataset], before, plan, NullProgress())
                middle = time.process_time()
                judge_shard(step, dataset, before, plan)
                kept = pq.ParquetFile(dataset.step_file(step.name)).metadata.num_rows
                us, judged = (1e6 * s / count for s in (middle - cpu, time.process_time() - middle))
                seconds = time.monotonic() - wall
                print(
                    f"{step.name:<8} {seconds:6.0f} s, {us:5.2f} us CPU a row, {judged:.2f} to write, {kept:,} kept",
                    flush=True,
                )
                before = step.name
            os._exit(0)
        _, status, usage = os.wait4(pid, 0)
        print(f"exit {status}, peak {usage.ru_maxrss / 1000:,.0f} MB, CPU {usage.ru_utime + usage.ru_stime:.0f} s")


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
