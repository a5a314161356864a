"""Measure what verify detects and what it costs: `python benchmarks/verify.py [--scenes 2000] [--seed 7003]`.

First, a run of `synth generate` with verify: how many of the kept and rejected annotations are true. Then errors of known kinds
are planted into true annotations of the teacher: precision and recall of each check by kind, and for captions by the number of
objects. The tiny teacher answers all requests in this process.
"""

import argparse
import os
import platform
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from teacher import Rounds

from pipeline.config import SCENES, Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.samples import read_samples
from pipeline.images.clip import TINY_CLIP, ClipScorer
from pipeline.images.decode import prepare_image
from pipeline.inference.engines import choose_engine
from pipeline.inference.requests import with_images
from pipeline.inference.verification import build_check, checks_of
from pipeline.run import generate_dataset
from pipeline.scenes.claims import extract_claims
from pipeline.scenes.scene import BACKGROUNDS, COLORS, MAX_OBJECTS, PLACES, SHAPES, SIZES, Scene, Thing, scenes_of
from pipeline.scenes.text import STYLES, answer, caption, phrases
from pipeline.tables import CHECK
from pipeline.tasks.replies import parse_reply
from pipeline.types import Request, SampleBatch
from tests.scene_data import score_annotations
from tests.stage_runs import verify_rows

CHECKS = ("round_trip", "claims", "blind")
AT_ONCE = 1024  # requests that are batched together


def introduce_error(scene: Scene, kind: str, rng: random.Random) -> Scene | None:
    """Return the scene with one error of this kind, or None if the scene allows none."""
    things = list(scene.objects)
    index = rng.randrange(len(things))
    thing = things[index]
    free = [place for place in PLACES if place not in {item.place for item in things}]
    if kind == "color":
        things[index] = replace(thing, color=rng.choice([color for color in COLORS if color != thing.color]))
    elif kind == "shape":
        things[index] = replace(thing, shape=rng.choice([shape for shape in SHAPES if shape != thing.shape]))
    elif kind == "size":
        things[index] = replace(thing, size=next(size for size in SIZES if size != thing.size))
    elif kind == "place":
        things[index] = replace(thing, place=rng.choice(free))
    elif kind == "invented":
        if len(things) == MAX_OBJECTS:
            return None
        things.append(Thing(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), rng.choice(free)))
    elif kind == "left out":
        if len(things) == 1:
            return None
        del things[index]
    return Scene(scene.background, tuple(sorted(things, key=lambda item: PLACES.index(item.place))))


KINDS = ("color", "shape", "size", "place", "invented", "left out")


def plant(written: list[dict[str, Any]], scenes: dict[str, Scene]) -> Iterator[dict[str, Any]]:
    """Yield each true annotation of the teacher, and a copy with one error; `error` names its kind, or is empty."""
    ids = sorted(scenes)
    for n, row in enumerate(written):
        rng = random.Random(f"plant:{n}")
        scene, other_scene = scenes[row["sample_id"]], scenes[rng.choice(ids)]
        if row["task"] == "caption":
            kind = (*KINDS, "swapped image")[n // 5 % (len(KINDS) + 1)]
            wrong = other_scene if kind == "swapped image" else introduce_error(scene, kind, rng)
            if row["clean_text"] == caption(scene, row["style"]):
                yield row | {"error": ""}
                # A brief caption names no places and no number, so these errors leave it true.
                unsaid = row["style"] == "brief" and kind in ("place", "left out")
                if wrong is not None and not unsaid and caption(wrong, row["style"]) != caption(scene, row["style"]):
                    yield row | {"clean_text": caption(wrong, row["style"]), "error": kind}
            continue
        truth = answer(scene, row["clean_question"])
        if truth is not None and row["clean_answer"] == truth:
            yield row | {"error": ""}
            foreign = answer(other_scene, row["clean_question"])
            if foreign not in (None, truth):
                yield row | {"clean_answer": foreign, "error": f"{row['answer_type']}, of another image"}
            else:
                changed_answer = wrong_answer(row["clean_question"], truth, rng)
                yield row | {"clean_answer": changed_answer, "error": f"{row['answer_type']}, changed"}


def wrong_answer(question: str, right: str, rng: random.Random) -> str:
    """Return an answer of the same kind that is not the true one."""
    for values in (("yes", "no"), tuple(map(str, range(5))), COLORS, SHAPES, SIZES, PLACES):
        if right in values:
            return rng.choice([value for value in values if value != right])
    assert "background" in question, question
    return rng.choice([ground for ground in BACKGROUNDS if ground != right])


def ask_again(
    rows: list[dict[str, Any]], images: dict[str, tuple[bytes, ...]], config: Config
) -> list[list[dict[str, str | None]]]:
    """Return the checks of each row with their answers, as tables.CHECK; `images` are the pages of each sample."""
    choice = choose_engine(config)
    named = [
        [(c, build_check(c, row["sample_id"], config, choice.revision)) for c in checks]
        for row, checks in ((row, checks_of(row, config.verify)) for row in rows)
    ]
    distinct: dict[str, Request] = {request.id: request for row_checks in named for _, request in row_checks}
    requests = with_images(list(distinct.values()), SampleBatch.of(images.items()))
    work = Rounds(requests[start : start + AT_ONCE] for start in range(0, len(requests), AT_ONCE))
    answers: dict[str, str | None] = {}
    for replies in choice.make().ask(work):
        answers |= {reply.request_id: parse_reply(work.asked[reply.request_id], reply)[0]["answer"] for reply in replies}
    print(f"  asked {len(requests):,} questions about {len(rows):,} annotations", flush=True)
    return [
        [{"kind": c.kind, "question": c.question, "expected": c.expected, "answer": answers[r.id]} for c, r in row_checks]
        for row_checks in named
    ]


def judge(
    rows: list[dict[str, Any]], checks: list[list[dict[str, str | None]]], config: Config
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each row with its result of the verify stage."""
    names = ("task", "style", "clean_question", "clean_answer", "answer_type")
    table = pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in names})
    table = table.append_column("annotation_id", pa.array(map(str, range(len(rows))), pa.string()))
    table = table.append_column("checks", pa.array(checks, pa.list_(CHECK)))
    table = table.append_column("alignment", pa.array([None] * len(rows), pa.float64()))
    return list(zip(rows, verify_rows(table, **config.verify.model_dump()).to_pylist(), strict=True))


def show(title: str, rows: list[tuple[dict[str, Any], bool]]) -> None:
    """Print recall and precision of one check; each row comes with whether the check would remove it."""
    wrong, true = [gone for row, gone in rows if row["error"]], [gone for row, gone in rows if not row["error"]]
    hits, lost = sum(wrong), sum(true)
    print(
        f"  {title:<34} errors {len(wrong):>5} found {hits / max(1, len(wrong)):.4f}   "
        f"true {len(true):>5} lost {lost / max(1, len(true)):.4f}   precision {hits / max(1, hits + lost):.4f}"
    )


def report_planted(
    written: list[dict[str, Any]], scenes: dict[str, tuple[Scene, ...]], images: dict[str, bytes], config: Config
) -> None:
    """Print the share of planted errors that is found, and of true rows that is lost."""
    rows = list(plant(written, {sample_id: scene for sample_id, (scene,) in scenes.items()}))
    checks = ask_again(rows, {sample_id: (image,) for sample_id, image in images.items()}, config)
    judged = judge(rows, checks, config)
    questions = [(row, result["agreement"] < 1) for row, result in judged if row["task"] == "qa"]
    print("\nround trip of questions")
    show("all", questions)
    for error in sorted({row["error"] for row, _ in questions} - {""}):
        show(error, [(row, gone) for row, gone in questions if row["error"] in ("", error)])
    captions = [(row, result["agreement"]) for row, result in judged if row["task"] == "caption"]
    print("\nclaims of captions, all must be confirmed")
    show("all", [(row, share < 1) for row, share in captions])
    for style in STYLES:
        show(style, [(row, share < 1) for row, share in captions if row["style"] == style])
        for error in (*KINDS, "swapped image"):
            subset = [(row, share < 1) for row, share in captions if row["style"] == style and row["error"] in ("", error)]
            show(f"{style}, {error}", subset)
    print("\nby the number of objects, and how many claims may be denied")
    for style, count in ((style, count) for style in STYLES for count in range(1, MAX_OBJECTS + 1)):
        subset = [(r, s) for r, s in captions if r["style"] == style and len(phrases(r["clean_text"])) == count]
        for denied in range(3):
            spared = [(row, share < 1 - denied / len(extract_claims(row["clean_text"])) - 1e-9) for row, share in subset]
            show(f"{style}, {count} objects, {denied} denied", spared)
    print("\nblind: rejected as answerable without the image, of true rows")
    show("questions", [(row, result["reason"] == "answerable_without_image") for row, result in judged if row["task"] == "qa"])
    blind = [result["answered_blind"] for row, result in judged if row["task"] == "qa" and not row["error"]]
    print(f"  answered rightly without the image: {sum(map(bool, blind)) / len(blind):.4f}")
    align(rows, images)


def align(rows: list[dict[str, Any]], images: dict[str, bytes]) -> None:
    """Print how often the tiny CLIP puts a true caption above the one with an error, by style and kind of error."""
    scorer, pairs = ClipScorer(TINY_CLIP), defaultdict[tuple[str, str], list[bool]](list)
    true: dict[tuple[str, str], str] = {
        (row["sample_id"], row["style"]): row["clean_text"] for row in rows if row["task"] == "caption" and not row["error"]
    }
    for row in (row for row in rows if row["task"] == "caption" and row["error"]):
        image = prepare_image(images[row["sample_id"]])
        right, wrong = scorer.cosines([image] * 2, [true[row["sample_id"], row["style"]], row["clean_text"]])
        pairs[row["style"], row["error"]].append(right > wrong)
    print("\nalignment: a true caption above the one with an error, tiny CLIP")
    for (style, error), wins in sorted(pairs.items()):
        print(f"  {style:<10} {error:<16} {sum(wins) / len(wins):.4f} of {len(wins)}")


def report_own(before: list[dict[str, Any]], out: Path, scenes: dict[str, tuple[Scene, ...]]) -> None:
    """Print the accuracy of the teacher's own annotations before and after verify."""
    after = pq.read_table(out / "stages" / "verify" / "kept.parquet").to_pylist()
    gone = pq.read_table(out / "stages" / "verify" / "rejected.parquet").to_pylist()
    print(f"  kept {len(after):,} of {len(before):,}; rejected {dict(Counter(row['reason'] for row in gone))}")
    for title, rows in (("before", before), ("kept", after), ("rejected", gone)):
        captions, answers = score_annotations(rows, scenes)
        for style, c in sorted(captions.items()):
            print(
                f"  {title:<9} {style:<9} phrases true {c.precision:.4f}, objects named {c.recall:.4f} ({c.captions} captions)"
            )
        for kind, a in sorted(answers.items()):
            print(f"  {title:<9} {kind:<9} right {a.accuracy:.4f} of {a.asked}")


def main() -> None:
    """Print both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7003)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {arguments.scenes} scenes of seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scenes"
        config = resolve(source="scenes", limit=arguments.scenes, seed=arguments.seed, verify={"checks": CHECKS})
        started = time.perf_counter()
        result = generate_dataset(config, out)
        print(f"\nthe teacher's own: {result.stats.asked:,} requests, {3 * arguments.scenes:,} of them to write", end="")
        print(f", {time.perf_counter() - started:.0f} s", flush=True)
        batches = read_samples(DatasetDir(out), ["sample_id", "source_row", "images"])
        source = [row for batch in batches for row in batch.to_pylist()]
        scenes = {row["sample_id"]: scenes_of(SCENES, row["source_row"]) for row in source}
        written = pq.read_table(out / "stages" / "filter" / "kept.parquet").to_pylist()
        report_own(written, out, scenes)
    report_planted(written, scenes, {row["sample_id"]: row["images"][0] for row in source}, config)


if __name__ == "__main__":
    main()
