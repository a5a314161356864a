"""The pass over all samples: ask what the journal does not hold yet, keep each reply, then read all of them back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa

from pipeline.config import Config
from pipeline.generate.journal import Journal
from pipeline.generate.parse import parse_reply
from pipeline.generate.requests import build_requests
from pipeline.tables import ANNOTATION
from pipeline.types import Engine, Reply, Request

CHUNK_SAMPLES = 64


@dataclass(slots=True)
class Counts:
    """What a pass did, in requests; `asked` were sent now, the rest was in the journal."""

    total: int = 0
    asked: int = 0


def ask_about(
    samples: Iterator[list[tuple[str, bytes]]],
    config: Config,
    revision: str,
    engine: Callable[[], Engine],
    journal: Journal,
    counts: Counts,
) -> Iterator[pa.Table]:
    """Yield one table of annotations (tables.ANNOTATION) for each chunk of (sample_id, image).

    `revision` names the weights that `engine` will have; the engine is only made when something must be asked.
    Chunks and groups have a fixed make-up, so that a run that was killed asks in the same company as one that was not.
    """
    for chunk in samples:
        requests = [r for sample_id, image in chunk for r in build_requests(sample_id, image, config, revision)]
        missing = journal.missing(requests)
        for group in groups(missing, config.generate.batch_size):
            _ask_group(group, engine(), journal, counts)
        counts.total += len(requests)
        yield _annotations(requests, journal)


def groups(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Cut requests with the same words into groups: equal prompts need no padding and end at about the same time."""
    words = sorted(requests, key=lambda request: (request.task, request.style))  # stable: samples stay in order
    for _, same in groupby(words, key=lambda request: (request.task, request.style)):
        group = list(same)
        yield from (group[at : at + size] for at in range(0, len(group), size))


def _ask_group(group: list[Request], engine: Engine, journal: Journal, counts: Counts) -> None:
    journal.note_asked(group)
    by_id = {request.id: request for request in group}
    for replies in engine.ask(group):
        journal.keep([(by_id[reply.request_id], reply) for reply in replies])
        counts.asked += len(replies)


def _annotations(requests: list[Request], journal: Journal) -> pa.Table:
    rows = [row for request in requests for row in parse_reply(request, _reply(journal, request))]
    return pa.Table.from_pylist(rows, schema=ANNOTATION)


def _reply(journal: Journal, request: Request) -> Reply:
    reply = journal.reply(request.id)
    assert reply is not None, f"no reply to {request.id}: the engine left a request out"
    return reply
