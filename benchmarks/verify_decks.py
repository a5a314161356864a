"""Measure what the evidence check of decks finds and loses: `python benchmarks/verify_decks.py [--decks 200] [--seed 7004]`.

The tiny teacher of decks writes questions with answers and evidence pages. Errors of known kinds are planted
into the true ones; then the check asks again, with the evidence pages alone (sufficient?) and with all others (necessary?).
"""

import argparse
import os
import platform
import random
from collections.abc import Iterator
from typing import Any

from teacher import annotate
from verify import ask_again, judge, show

from pipeline.config import DECKS
from pipeline.config.files import resolve
from pipeline.scenes.scene import Scene
from pipeline.scenes.text import answer_deck
from pipeline.sources.scenes import draw_sample
from tests.scene_data import scenes_by_id


def plant(written: list[dict[str, Any]], decks: dict[str, tuple[Scene, ...]]) -> Iterator[dict[str, Any]]:
    """Yield each true row, and a copy with each error that its pages allow."""
    for n, row in enumerate(written):
        rng, deck = random.Random(f"plant:{n}"), decks[row["sample_id"]]
        truth = answer_deck(deck, row["clean_question"])
        evidence = tuple(row["evidence_pages"])
        if truth is None or (truth.answer, truth.evidence_pages) != (row["clean_answer"], evidence):
            continue
        yield row | {"error": ""}
        other_pages = [page for page in range(1, len(deck) + 1) if page not in evidence]
        if len(evidence) > 1:
            yield row | {"error": "a page left out", "evidence_pages": [rng.choice(evidence)]}
        else:
            yield row | {"error": "another page", "evidence_pages": [rng.choice(other_pages)]}
        yield row | {"error": "a page too many", "evidence_pages": sorted((*evidence, rng.choice(other_pages)))}


def main() -> None:
    """Print which errors each half of the check finds, and which true rows it loses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7004)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {arguments.decks} decks of seed {arguments.seed}")
    samples = [draw_sample(arguments.seed, index, DECKS) for index in range(arguments.decks)]
    decks = scenes_by_id(samples, DECKS)
    config = resolve(source="scenes-deck", tasks=["deck_qa"], engine="embedded", verify={"checks": ("evidence",)})
    written, _ = annotate(samples, config, reworded=False)
    texts = [row | {"clean_question": row["question"], "clean_answer": row["answer"]} for row in written if row["question"]]
    rows = [row | {"clean_text": None, "pages": len(decks[row["sample_id"]])} for row in plant(texts, decks)]
    checks = ask_again(rows, {sample.id: sample.images for sample in samples}, config)
    judged = judge(rows, checks, config)
    for half in ("sufficient", "necessary"):
        print(f"\nevidence is {half}")
        for error in ("another page", "a page left out", "a page too many"):
            show(error, [(row, result[half] is False) for row, result in judged if row["error"] in ("", error)])
        reason = f"evidence_not_{half}"
        gone = [(row, result["reason"] == reason) for row, result in judged]
        show("rejected for it, all errors", gone)
        for kind in ("span", "number", "arithmetic"):
            losses = [lost for row, lost in gone if not row["error"] and row["answer_type"] == kind]
            print(f"  true rows of type {kind:<12} lost {sum(losses) / max(1, len(losses)):.4f} of {len(losses)}")


if __name__ == "__main__":
    main()
