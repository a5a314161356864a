"""What verify finds and what it costs: `python benchmarks/verify.py [--scenes 2000] [--seed 7003]`.

Planted: captions and questions that are true of drawn scenes, and the same with one known error each; precision and recall of
each check, by the kind of error, and for captions by the number of claims. The teacher's own: a run of `synth generate` with
verify, and how much of what it kept and what it rejected is true. Everything is asked of the tiny teacher in this process.
"""

import argparse
import os
import platform
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.teacher import Rounds
from pipeline.alignment import TINY_CLIP, Aligner
from pipeline.claims import claims_of
from pipeline.config import Config, resolve
from pipeline.generate.checks import Check, agrees, build_check, checks_of, doubts_of
from pipeline.generate.engine import choose_engine
from pipeline.generate.parse import parse_reply
from pipeline.image import prepare_image
from pipeline.run import CHUNK_SAMPLES, generate_version
from pipeline.scenes.facts import COLORS, MAX_OBJECTS, PLACES, SHAPES, SIZES, Scene, Thing
from pipeline.scenes.score import scene_of, score_annotations
from pipeline.scenes.text import ASK, STYLES, answer, caption
from pipeline.source.scenes import draw_sample
from pipeline.tables import CHECK
from pipeline.types import Request, Sample
from pipeline.verify import verify_annotations

CHECKS = ("round_trip", "claims", "blind")


def changed(scene: Scene, kind: str, rng: random.Random) -> Scene | None:
    """Return the scene with one error of this kind in it; None where there is no room for one."""
    things = list(scene.objects)
    at = rng.randrange(len(things))
    thing = things[at]
    free = [place for place in PLACES if place not in {each.place for each in things}]
    if kind == "color":
        things[at] = replace(thing, color=rng.choice([color for color in COLORS if color != thing.color]))
    elif kind == "shape":
        things[at] = replace(thing, shape=rng.choice([shape for shape in SHAPES if shape != thing.shape]))
    elif kind == "size":
        things[at] = replace(thing, size=next(size for size in SIZES if size != thing.size))
    elif kind == "place":
        things[at] = replace(thing, place=rng.choice(free))
    elif kind == "invented":
        if len(things) == MAX_OBJECTS:
            return None
        things.append(Thing(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), rng.choice(free)))
    elif kind == "left out":
        if len(things) == 1:
            return None
        del things[at]
    return Scene(scene.background, tuple(sorted(things, key=lambda each: PLACES.index(each.place))))


KINDS = ("color", "shape", "size", "place", "invented", "left out")


def plant(samples: list[Sample]) -> Iterator[dict[str, Any]]:
    """Yield rows as verify sees them, each with what is wrong with it: `error` is empty where nothing is."""
    scenes = [scene_of(sample.facts or {}) for sample in samples]
    for n, (sample, scene) in enumerate(zip(samples, scenes, strict=True)):
        rng = random.Random(f"plant:{n}")
        other = scenes[n - 1]
        fixed = {"sample_id": sample.id, "pages": 1, "evidence_pages": None}
        kind = (*KINDS, "swapped image")[n % (len(KINDS) + 1)]
        wrong = other if kind == "swapped image" else changed(scene, kind, rng)
        for style in STYLES:
            told = {**fixed, "task": "caption", "style": style, "clean_question": None, "clean_answer": None}
            yield told | {"clean_text": caption(scene, style), "error": ""}
            # A brief caption says no places: one that differs in nothing else is true.
            if wrong is not None and caption(wrong, style) != caption(scene, style):
                yield told | {"clean_text": caption(wrong, style), "error": kind}
        for name, ask in ASK.items():
            pair = ask(scene, rng)
            told = {**fixed, "task": "qa", "style": "", "clean_text": None, "clean_question": pair.question}
            yield told | {"clean_answer": pair.answer, "error": ""}
            foreign = answer(other, pair.question) if n % 2 else None
            if foreign is not None and foreign != pair.answer:
                yield told | {"clean_answer": foreign, "error": f"{name}, of another image"}
            else:
                yield told | {"clean_answer": wrong_answer(pair.question, pair.answer, rng), "error": f"{name}, changed"}


def wrong_answer(question: str, right: str, rng: random.Random) -> str:
    """Return an answer of the same kind that is not the true one."""
    for values in (("yes", "no"), tuple(map(str, range(5))), COLORS, SHAPES, SIZES, PLACES):
        if right in values:
            return rng.choice([value for value in values if value != right])
    assert "background" in question, question
    return rng.choice([ground for ground in ("white", "gray", "beige", "mint") if ground != right])


def ask_all(rows: list[dict[str, Any]], checks: list[list[Check]], images: dict[str, bytes], config: Config) -> list[Any]:
    """Return the checks of each row with their answers, as tables.CHECK."""
    choice = choose_engine(config)
    named = [
        [(check, build_check(check, row["sample_id"], (images[row["sample_id"]],), config, choice.revision)) for check in mine]
        for row, mine in zip(rows, checks, strict=True)
    ]
    distinct: dict[str, Request] = {request.id: request for each in named for _, request in each}
    requests = list(distinct.values())
    size = CHUNK_SAMPLES * 16
    work = Rounds(requests[at : at + size] for at in range(0, len(requests), size))
    said: dict[str, str | None] = {}
    for replies in choice.make().ask(work):
        said |= {reply.request_id: parse_reply(work.asked[reply.request_id], reply)[0]["answer"] for reply in replies}
    print(f"  asked {len(requests):,} questions", flush=True)
    return [
        [{"kind": c.kind, "question": c.question, "expected": c.expected, "answer": said[r.id]} for c, r in each]
        for each in named
    ]


def planted(samples: list[Sample], config: Config) -> None:
    """Print what is found of planted errors, and what is lost of true rows."""
    rows = list(plant(samples))
    images = {sample.id: sample.images[0] for sample in samples}
    found = ask_all(rows, [checks_of(row, config.verify) for row in rows], images, config)
    again = ask_all(rows, [doubts_of(row, each) for row, each in zip(rows, found, strict=True)], images, config)
    checks = [one + more for one, more in zip(found, again, strict=True)]
    columns = {name: [row[name] for row in rows] for name in ("task", "style", "clean_question", "clean_answer")}
    table = pa.table(columns).append_column("checks", pa.array(checks, pa.list_(CHECK)))
    table = table.append_column("alignment", pa.array([None] * len(rows), pa.float64()))
    marked = verify_annotations(table, config.verify).to_pylist()

    def show(title: str, mine: list[tuple[dict[str, Any], bool]]) -> None:
        """Print one line: rows of a kind, and which of them the check would remove."""
        wrong, true = [gone for row, gone in mine if row["error"]], [gone for row, gone in mine if not row["error"]]
        hits, lost = sum(wrong), sum(true)
        print(
            f"  {title:<38} errors {len(wrong):>5} found {hits / max(1, len(wrong)):.4f}   "
            f"true {len(true):>5} lost {lost / max(1, len(true)):.4f}   precision {hits / max(1, hits + lost):.4f}"
        )

    questions = [(row, judged) for row, judged in zip(rows, marked, strict=True) if row["task"] == "qa"]
    captions = [(row, judged) for row, judged in zip(rows, marked, strict=True) if row["task"] == "caption"]
    print("\nround trip of questions")
    show("all", [(row, judged["agreement"] < 1) for row, judged in questions])
    for error in sorted({row["error"] for row, _ in questions} - {""}):
        show(error, [(row, judged["agreement"] < 1) for row, judged in questions if row["error"] in ("", error)])
    print("\nclaims of captions, all must be confirmed")
    show("all", [(row, judged["agreement"] < 1) for row, judged in captions])
    for error in (*KINDS, "swapped image"):
        show(error, [(row, judged["agreement"] < 1) for row, judged in captions if row["error"] in ("", error)])
    for count in sorted({len(claims_of(row["clean_text"])) for row, _ in captions}):
        mine = [(row, judged) for row, judged in captions if len(claims_of(row["clean_text"])) == count]
        show(f"{count} claims", [(row, judged["agreement"] < 1) for row, judged in mine])
        for missing in range(1, min(3, count)):
            show(
                f"{count} claims, {missing} may be denied",
                [(row, judged["agreement"] < 1 - missing / count - 1e-9) for row, judged in mine],
            )
    print("\nthe same without asking a second time")
    once = {id(row): all(agrees(c["answer"], c["expected"]) for c in each) for row, each in zip(rows, found, strict=True)}
    show("captions", [(row, not once[id(row)]) for row, _ in captions])
    print("\nblind: rejected as answerable without the image")
    show("questions", [(row, judged["reason"] == "answerable_without_image") for row, judged in questions])
    print(
        f"  guessed right without the image: {sum(bool(j['blind']) for r, j in questions if not r['error']) / sum(not r['error'] for r, _ in questions):.4f} of true rows"
    )
    align(rows, images)


def align(rows: list[dict[str, Any]], images: dict[str, bytes]) -> None:
    """Print how often the tiny CLIP puts a true caption above the one with an error, by style and kind of error."""
    aligner, pairs = Aligner(TINY_CLIP), defaultdict[tuple[str, str], list[bool]](list)
    true: dict[tuple[str, str], str] = {
        (row["sample_id"], row["style"]): row["clean_text"] for row in rows if row["task"] == "caption" and not row["error"]
    }
    for row in (row for row in rows if row["task"] == "caption" and row["error"]):
        image = prepare_image(images[row["sample_id"]])
        right, wrong = aligner.cosines([image] * 2, [true[row["sample_id"], row["style"]], row["clean_text"]])
        pairs[row["style"], row["error"]].append(right > wrong)
    print("\nalignment: a true caption above the one with an error, tiny CLIP")
    for (style, error), wins in sorted(pairs.items()):
        print(f"  {style:<10} {error:<16} {sum(wins) / len(wins):.4f} of {len(wins)}")


def own(count: int, seed: int) -> None:
    """Print how true the teacher's own annotations are before and after verify, and what that took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scenes"
        config = resolve(source="scenes", limit=count, seed=seed, verify={"checks": CHECKS})
        result = generate_version(config, out)
        read = pq.read_table(out / "stages" / "source" / "kept.parquet", columns=["sample_id", "facts"]).to_pylist()
        facts = {row["sample_id"]: row["facts"] for row in read}
        before = pq.read_table(out / "stages" / "filter" / "kept.parquet").to_pylist()
        after = pq.read_table(out / "stages" / "verify" / "kept.parquet").to_pylist()
        gone = pq.read_table(out / "stages" / "verify" / "rejected.parquet").to_pylist()
    print(f"\nthe teacher's own: {count} scenes, {result.counts.asked:,} requests, {3 * count:,} of them to write")
    print(f"  kept {len(after):,} of {len(before):,}; rejected {dict(Counter(row['reason'] for row in gone))}")
    for title, rows in (("before", before), ("kept", after), ("rejected", gone)):
        captions, answers = score_annotations(rows, facts)
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
    config = resolve(source="scenes", verify={"checks": CHECKS})
    planted([draw_sample(arguments.seed, index) for index in range(arguments.scenes)], config)
    own(arguments.scenes, arguments.seed + 1)


if __name__ == "__main__":
    main()
