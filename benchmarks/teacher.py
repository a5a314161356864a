"""How good and how fast the tiny teacher is: `python benchmarks/teacher.py [--scenes 1000] [--seed 7001]`.

Draws scenes that no training saw, asks all default tasks in process, and scores the replies against the facts; then once
more with every sentence of the prompts but the task line reworded.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import Config, resolve
from pipeline.inference.engines import choose_engine
from pipeline.inference.requests import build_requests
from pipeline.scenes.score import score_annotations, score_decks
from pipeline.sources.scenes import draw_deck, draw_sample
from pipeline.stages.source import BATCH_SAMPLES
from pipeline.tasks.replies import parse_reply
from pipeline.types import Request, Sample

REWORDED_SYSTEM = (
    "Someone who has lost their sight relies on you. Tell them plainly what this shows, as JSON, and be brief about it."
)
REWORDED_TASK = "Below stands your assignment. Kindly complete it with honesty, because others build upon the outcome!"


def reword(request: Request) -> Request:
    """Keep the task line, and put other words around it."""
    return replace(request, system=REWORDED_SYSTEM, text=f"{REWORDED_TASK}\n{request.text.splitlines()[-1]}")


class Rounds:
    """The requests of one chunk after the other, as an engine takes them."""

    def __init__(self, chunks: Iterator[list[Request]]) -> None:
        self.asked: dict[str, Request] = {}
        self._chunks = chunks

    def take(self) -> list[Request]:
        """Return the next chunk."""
        chunk = next(self._chunks, [])
        self.asked |= {request.id: request for request in chunk}
        return chunk

    def sending(self, requests: Sequence[Request]) -> None:
        """Nothing is noted here."""

    def answered(self) -> bool:
        """Nothing is known from before."""
        return False


def annotate(samples: list[Sample], config: Config, *, reworded: bool) -> tuple[list[dict[str, Any]], float]:
    """Return the annotations of all samples and the seconds it took, loading of the model left out."""
    choice = choose_engine(config)

    def requests(chunk: list[Sample]) -> list[Request]:
        made = [r for sample in chunk for r in build_requests(sample.id, sample.images, config, choice.revision)]
        return [reword(request) if reworded else request for request in made]

    engine = choice.make()
    list(engine.ask(Rounds(iter([requests(samples[:1])]))))
    rows: list[dict[str, Any]] = []
    work = Rounds(requests(samples[at : at + BATCH_SAMPLES]) for at in range(0, len(samples), BATCH_SAMPLES))
    started = time.perf_counter()
    for replies in engine.ask(work):
        rows += [row for reply in replies for row in parse_reply(work.asked[reply.request_id], reply)]
    return rows, time.perf_counter() - started


def main() -> None:
    """Print the scores as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--decks", type=int, default=0, help="500 for a model that knows them")
    parser.add_argument("--seed", type=int, default=7001)
    parser.add_argument("--model", default="tiny", help="another folder of weights, such as one that is being trained")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, seed {arguments.seed}, {arguments.model}")
    scenes = [draw_sample(arguments.seed, index) for index in range(arguments.scenes)]
    decks = [draw_deck(arguments.seed, index) for index in range(arguments.decks)]
    for reworded in (False, True):
        words = "reworded" if reworded else "as released"
        if scenes:
            config = resolve(source="scenes", model=arguments.model)
            rows, seconds = annotate(scenes, config, reworded=reworded)
            print(
                f"\nprompts {words}: {len(scenes)} scenes, {len(scenes) / seconds:.1f} scenes/s, {unread(rows)} rows unreadable"
            )
            show_scenes(rows, scenes)
        if decks:
            config = resolve(source="scenes-deck", tasks=["deck_qa"], model=arguments.model, engine="embedded")
            rows, seconds = annotate(decks, config, reworded=reworded)
            print(f"\nprompts {words}: {len(decks)} decks, {len(decks) / seconds:.1f} decks/s, {unread(rows)} rows unreadable")
            show_decks(rows, decks)


def unread(rows: list[dict[str, Any]]) -> int:
    """Return how many rows are replies that could not be read."""
    return sum(row["reply_error"] is not None for row in rows)


def show_scenes(rows: list[dict[str, Any]], samples: list[Sample]) -> None:
    """Print how true captions and answers are."""
    captions, answers = score_annotations(rows, {sample.id: sample.facts or {} for sample in samples})
    for style, c in sorted(captions.items()):
        right = c.backgrounds_right / c.captions
        print(f"  caption {style:<10} precision {c.precision:.4f}  recall {c.recall:.4f}  background {right:.4f}")
    for kind, a in sorted(answers.items()):
        said = f"accuracy {a.accuracy:.4f}  majority {a.majority:.4f}  unanswerable {a.unanswerable} of {a.asked}"
        print(f"  answer  {kind:<10} {said}")


def show_decks(rows: list[dict[str, Any]], samples: list[Sample]) -> None:
    """Print how true answers, evidence pages and calculations are; of arithmetic, differences once more by themselves."""
    facts: dict[str, Sequence[dict[str, Any]]] = {sample.id: sample.page_facts or () for sample in samples}
    differences = [row | {"answer_type": "differences"} for row in rows if " more " in (row["question"] or "")]
    for kind, a in sorted((score_decks(rows, facts) | score_decks(differences, facts)).items()):
        expressions = a.expressions_right / max(1, a.asked)
        print(
            f"  answer  {kind:<11} accuracy {a.accuracy:.4f}  majority {a.majority:.4f}  evidence {a.evidence:.4f}  "
            f"expression {expressions:.4f}  unanswerable {a.unanswerable} of {a.asked}"
        )


if __name__ == "__main__":
    main()
