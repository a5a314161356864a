"""Measure accuracy and speed of the tiny teacher.

    PYTHONPATH=. python benchmarks/teacher.py [--scenes 1000] [--seed 7001]

Draws scenes that are not training data, runs all default tasks in this process, and scores the replies
against the facts. A second pass rewords every sentence in the prompts except the task line.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import DECKS, Config
from pipeline.config.files import resolve
from pipeline.dataset.images import BATCH_SAMPLES
from pipeline.inference.embedded import EmbeddedEngine
from pipeline.inference.engines import TINY_DECK_WEIGHTS, TINY_WEIGHTS
from pipeline.inference.requests import build_requests, with_images
from pipeline.sources.scenes import draw_sample
from pipeline.tasks.replies import parse_reply
from pipeline.types import Request, Sample, SampleBatch
from tests.plans import request_plan
from tests.scene_data import scenes_by_id, score_annotations, score_decks

REWORDED_SYSTEM = (
    "Someone who has lost their sight relies on you. "
    "Tell them plainly what this shows, as JSON, and be brief about it."
)
REWORDED_TASK = (
    "Below stands your assignment. Kindly complete it with honesty, because others build upon the outcome!"
)


def reword(request: Request) -> Request:
    """Keep the task line of the prompt, and replace all other text."""
    return replace(request, system=REWORDED_SYSTEM, text=f"{REWORDED_TASK}\n{request.text.splitlines()[-1]}")


class Rounds:
    """Passes requests to an engine in chunks (a types.RequestSource)."""

    def __init__(self, chunks: Iterator[list[Request]]) -> None:
        self.asked: dict[str, Request] = {}
        self._chunks = chunks

    def take(self) -> list[Request]:
        """Return the next chunk."""
        chunk = next(self._chunks, [])
        self.asked |= {request.id: request for request in chunk}
        return chunk

    def sending(self, requests: Sequence[Request]) -> None:
        """Do nothing, because there is no journal."""

    def withdraw(self, requests: Sequence[Request]) -> None:
        """Do nothing."""

    def answered(self) -> bool:
        """Return False, because there are no earlier replies."""
        return False


def annotate(
    samples: list[Sample], config: Config, weights: Path, *, reworded: bool
) -> tuple[list[dict[str, Any]], float]:
    """Annotate all samples. Returns annotations and seconds, without the time to load the model."""
    engine = EmbeddedEngine(weights)

    def requests(chunk: list[Sample]) -> list[Request]:
        built = [one for sample in chunk for one in build_requests(sample.id, request_plan(config))]
        built = with_images(built, SampleBatch.of((sample.id, sample.images) for sample in chunk))
        return [reword(request) if reworded else request for request in built]

    list(engine.ask(Rounds(iter([requests(samples[:1])]))))
    rows: list[dict[str, Any]] = []
    work = Rounds(
        requests(samples[start : start + BATCH_SAMPLES]) for start in range(0, len(samples), BATCH_SAMPLES)
    )
    started = time.perf_counter()
    for replies in engine.ask(work):
        rows += [row for reply in replies for row in parse_reply(work.asked[reply.request_id], reply)]
    return rows, time.perf_counter() - started


def main() -> None:
    """Print the scores as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--decks", type=int, default=0, help="500 for a model that was trained on decks")
    parser.add_argument("--seed", type=int, default=7001)
    parser.add_argument("--model", type=Path, help="folder of other weights")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, seed {arguments.seed}, "
        f"{arguments.model or 'the shipped weights'}"
    )
    scenes = [draw_sample(arguments.seed, index) for index in range(arguments.scenes)]
    decks = [draw_sample(arguments.seed, index, DECKS) for index in range(arguments.decks)]
    for reworded in (False, True):
        words = "reworded" if reworded else "as released"
        if scenes:
            weights = arguments.model or TINY_WEIGHTS
            rows, seconds = annotate(scenes, resolve(source="scenes"), weights, reworded=reworded)
            print(
                f"\nprompts {words}: {len(scenes)} scenes, {len(scenes) / seconds:.1f} scenes/s, "
                f"{unread(rows)} rows unreadable"
            )
            show_scenes(rows, scenes)
        if decks:
            config = resolve(source="scenes-deck", tasks=["deck_qa"])
            rows, seconds = annotate(decks, config, arguments.model or TINY_DECK_WEIGHTS, reworded=reworded)
            print(
                f"\nprompts {words}: {len(decks)} decks, {len(decks) / seconds:.1f} decks/s, "
                f"{unread(rows)} rows unreadable"
            )
            show_decks(rows, decks)


def unread(rows: list[dict[str, Any]]) -> int:
    """Return the number of rows with an unreadable reply."""
    return sum(row["reply_error"] is not None for row in rows)


def show_scenes(rows: list[dict[str, Any]], samples: list[Sample]) -> None:
    """Print the accuracy of captions and answers."""
    captions, answers = score_annotations(rows, scenes_by_id(samples))
    for style, c in sorted(captions.items()):
        print(f"  caption {style:<10} precision {c.precision:.4f}  recall {c.recall:.4f}")
    for kind, a in sorted(answers.items()):
        print(f"  answer  {kind:<10} accuracy {a.accuracy:.4f}  majority {a.majority:.4f}")


def show_decks(rows: list[dict[str, Any]], samples: list[Sample]) -> None:
    """Print the accuracy of answers about several pages, by type."""
    scenes = scenes_by_id(samples, DECKS)
    differences = [
        row | {"answer_type": "differences"} for row in rows if " more " in (row["question"] or "")
    ]
    for kind, a in sorted((score_decks(rows, scenes) | score_decks(differences, scenes)).items()):
        scores = f"accuracy {a.accuracy:.4f}  majority {a.majority:.4f}  evidence {a.evidence:.4f}"
        print(f"  answer  {kind:<11} {scores}")


if __name__ == "__main__":
    main()
