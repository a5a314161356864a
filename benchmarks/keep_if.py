"""Measure requests and CPU time of a run in which `keep_if` drops most images before they are captioned.

    PYTHONPATH=. python benchmarks/keep_if.py [--images 100000] [--dropped 0.72] [--without-conditions]

An engine in this process answers every request at once, so the CPU time is that of requests, journal and
annotations. The first task classifies each image, and the second one captions it.
"""

import argparse
import hashlib
import json
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.files import resolve
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_in_rounds, read_annotations
from pipeline.types import Reply, RequestSource, SampleBatch, SampleInfo
from tests.plans import request_plan

BATCH_IMAGES = 256
CAPTION = "A lamp stands on a wooden desk beside a stack of books, and a window shows a garden in the rain."


class Engine:
    """Answers requests about images by their ids."""

    model = revision = "scripted"

    def __init__(self, dropped_frac: float) -> None:
        self.dropped_frac = dropped_frac
        self.requests: Counter[str] = Counter()

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        """See Engine."""
        while requests := work.take():
            work.sending(requests)
            self.requests.update(request.task for request in requests)
            replies = []
            for request in requests:
                is_blank = int(request.sample_id[:8], 16) < self.dropped_frac * 2**32
                kind = json.dumps({"labels": ["blank" if is_blank else "photo"]})
                replies.append(request.reply(kind if request.task == "kind" else CAPTION, "stop", 400, 20))
            yield replies


def main() -> None:
    """Run both rounds and read the annotations. Print the requests and the CPU time per request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dropped", type=float, default=0.72)
    parser.add_argument("--without-conditions", action="store_true")
    options = parser.parse_args()
    task = {"name": "kind", "kind": "labels", "labels": ["photo", "blank"], "prompt": "What is it?"}
    keep_if = {} if options.without_conditions else {"keep_if": '"blank" not in results.kind'}
    styles = {"caption_styles": ["plain"]}
    config = resolve(source="folder:x", tasks=["caption"], custom_tasks=[task | keep_if], generate=styles)
    engine: Any = Engine(options.dropped)
    plan, stats = request_plan(config), RequestStats()
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(options.images)]
    batches = [ids[first : first + BATCH_IMAGES] for first in range(0, len(ids), BATCH_IMAGES)]
    reasons: Counter[str | None] = Counter()
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder) / "journal.sqlite") as journal:

        def samples() -> Iterator[SampleBatch]:
            return (SampleBatch.of((name, (b"",)) for name in batch) for batch in batches)

        for _ in ask_in_rounds(samples, plan, config.servers, lambda _: engine, journal, stats):
            pass
        infos = ([SampleInfo(name, 1) for name in batch] for batch in batches)
        for table in read_annotations(infos, plan, journal):
            reasons.update(table["reply_error"].to_pylist())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_ms = 1000 * (usage.ru_utime + usage.ru_stime)
    sent = engine.requests.total()
    print(f"requests: {dict(engine.requests)}; annotations: {dict(reasons)}")
    print(f"CPU: {cpu_ms / sent:.3f} ms per request, {cpu_ms / options.images:.3f} ms per image")


if __name__ == "__main__":
    main()
