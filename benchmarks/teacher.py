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

from pipeline.config import resolve
from pipeline.generate.engine import choose_engine
from pipeline.generate.parse import parse_reply
from pipeline.generate.requests import build_requests
from pipeline.run import CHUNK_SAMPLES
from pipeline.scenes.score import score_annotations
from pipeline.source.scenes import draw_sample
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


def annotate(samples: list[Sample], *, reworded: bool) -> tuple[list[dict[str, Any]], float]:
    """Return the annotations of all samples and the seconds it took, loading of the model left out."""
    config = resolve(source="scenes")
    choice = choose_engine(config)

    def requests(chunk: list[Sample]) -> list[Request]:
        made = [r for sample in chunk for r in build_requests(sample.id, sample.images, config, choice.revision)]
        return [reword(request) if reworded else request for request in made]

    engine = choice.make()
    list(engine.ask(Rounds(iter([requests(samples[:1])]))))
    rows: list[dict[str, Any]] = []
    work = Rounds(requests(samples[at : at + CHUNK_SAMPLES]) for at in range(0, len(samples), CHUNK_SAMPLES))
    started = time.perf_counter()
    for replies in engine.ask(work):
        rows += [row for reply in replies for row in parse_reply(work.asked[reply.request_id], reply)]
    return rows, time.perf_counter() - started


def main() -> None:
    """Print the scores as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7001)
    arguments = parser.parse_args()
    samples = [draw_sample(arguments.seed, index) for index in range(arguments.scenes)]
    facts = {sample.id: sample.facts or {} for sample in samples}
    print(f"{len(samples)} scenes, seed {arguments.seed}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    for reworded in (False, True):
        rows, seconds = annotate(samples, reworded=reworded)
        captions, answers = score_annotations(rows, facts)
        print(f"\nprompts {'reworded' if reworded else 'as released'}: {len(samples) / seconds:.1f} scenes/s")
        unread = sum(row["reply_error"] is not None for row in rows)
        print(f"  replies that could not be read: {unread}")
        for style, c in sorted(captions.items()):
            right = c.backgrounds_right / c.captions
            print(f"  caption {style:<9} precision {c.precision:.4f}  recall {c.recall:.4f}  background {right:.4f}")
        for kind, a in sorted(answers.items()):
            print(
                f"  answer  {kind:<9} accuracy {a.accuracy:.4f}  majority {a.majority:.4f}  "
                f"unanswerable {a.unanswerable}  asked {a.asked}"
            )


if __name__ == "__main__":
    main()
