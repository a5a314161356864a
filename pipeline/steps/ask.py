"""Step: ask. Ask a model about every sample of a shard, and write its replies as annotations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc

from pipeline.config.sections import ServerConfig
from pipeline.dataset.directory import DatasetDir, page_counts, read_samples, sample_batches
from pipeline.dataset.records import is_done, output_digest, read_record, step_key, write_record
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_TEXTS, TextsById, ask_about, read_annotations
from pipeline.inference.requests import RequestPlan
from pipeline.plan import Plan
from pipeline.steps.base import Services, Step, Work, record_cost
from pipeline.storage.files import read_batches, write_table
from pipeline.tables import ANNOTATION, HUMAN
from pipeline.tasks.human import has_texts, human_annotations
from pipeline.types import Engine, SampleInfo, SourceTexts

NAME = "ask"


@dataclass(frozen=True, slots=True)
class AskSettings:
    """What the step ask reads."""

    requests: RequestPlan
    keeps_human_texts: bool  # captions and questions that people wrote become annotations
    has_decks: bool
    server: ServerConfig  # not in the key: it does not affect replies

    @classmethod
    def of(cls, plan: Plan) -> "AskSettings":
        """Resolve the settings of a run."""
        return cls(plan.requests, plan.config.keeps_human_texts, plan.has_decks, plan.config.server)

    def describe(self) -> list[Any]:
        """Return everything that the annotations depend on, except the samples."""
        return [self.requests.describe(), self.keeps_human_texts, self.has_decks]


class AskStep(Step):
    """Asks about all samples, shard by shard."""

    def run(self, work: Work, before: str) -> None:
        """See Step."""
        work.executor.each(partial(ask_once, before, work.plan), asks=True)


def ask_once(before: str, plan: Plan, shard: DatasetDir, services: Services) -> None:
    """Ask about the samples of a shard, and write what all replies say, unless that is done."""
    settings = AskSettings.of(plan)
    key = step_key(NAME, settings, (), [output_digest(shard, before)])
    if is_done(shard, NAME, key):
        services.stats.add_known(read_record(shard, NAME)["requests"])
        return
    total, unanswered = services.stats.total, services.stats.unanswered
    ask_about_shard(shard, settings, services)
    write_annotations(shard, settings)
    is_complete = services.stats.unanswered == unanswered  # else the same command asks again
    model = {"name": plan.model, "revision": plan.requests.revision}
    kept, requests = count_asked(shard, settings.requests), services.stats.total - total
    write_record(shard, NAME, key if is_complete else "", kept=kept, rejected={}, requests=requests, model=model)


def ask_about_shard(shard: DatasetDir, settings: AskSettings, services: Services) -> None:
    """Send the requests about the samples of a shard that have no reply in its journal."""
    samples = read_record(shard, "read")["kept"]
    stats, progress = services.stats, services.progress
    texts = read_source_texts(shard, settings)
    per_sample = max(1, count_wanted(settings.requests, samples, texts)) / max(1, samples)
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):

        def start_engine() -> Engine:
            engine = services.engine()
            progress("ask", int(stats.done / per_sample), samples)  # the speed is measured from here on
            return engine

        for round_number in range(len(settings.requests.rounds)):
            batches = sample_batches(shard)
            for engine in ask_about(
                batches, settings.requests, settings.server, start_engine, journal, stats, texts, round_number
            ):
                metrics = engine.metrics() | stats.metrics(settings.server)
                progress("ask", int(stats.done / per_sample), samples, metrics)
        progress("ask", samples, samples)


def write_annotations(shard: DatasetDir, settings: AskSettings) -> None:
    """Write what the replies in the journal of a shard say, and what people wrote (tables.ANNOTATION)."""
    texts = read_source_texts(shard, settings)
    with Journal(shard.journal) as journal:
        annotations = read_annotations(_sample_infos(shard, settings), settings.requests, journal, texts)
        write_table(shard.step_file("ask"), annotations, ANNOTATION)


def source_texts(row: Mapping[str, Any], *, keeps_human_texts: bool) -> SourceTexts:
    """Return what the source says of a sample (a row of tables.SAMPLE), as far as requests depend on it."""
    context = tuple(row["context"] or ())
    return (
        SourceTexts(context, *has_texts(row["references"], row["reference_qa"] or ()))
        if keeps_human_texts
        else SourceTexts(context)
    )


def read_source_texts(shard: DatasetDir, settings: AskSettings) -> TextsById:
    """Return what the source says of all samples of a shard."""
    if not settings.requests.context and not settings.requests.is_filling:
        return NO_TEXTS
    keeps = settings.keeps_human_texts
    batches = read_samples(shard, ["sample_id", "context", "references", "reference_qa"])
    rows = (row for batch in batches for row in batch.to_pylist())
    return {row["sample_id"]: source_texts(row, keeps_human_texts=keeps) for row in rows}


def count_wanted(plan: RequestPlan, samples: int, texts: TextsById) -> int:
    """Return the number of requests about all samples."""
    return sum(plan.count(plan.wanted(one)) for one in texts.values()) if texts else samples * plan.count(plan.pairs)


def count_asked(shard: DatasetDir, plan: RequestPlan) -> int:
    """Return how many requests the annotations of a shard answer; those of one request are adjacent.

    A row without a request id counts as all requests of its task about an image.
    """
    count, last = 0, None
    for table in read_batches(shard.step_file("ask"), ["sample_id", "task", "style", "request_id", "prompt_id"]):
        by_model = table.filter(pc.not_equal(table["prompt_id"], HUMAN)).drop_columns(["prompt_id"])
        if not by_model.num_rows:
            continue
        not_asked = by_model.filter(pc.equal(by_model["request_id"], ""))["task"].to_pylist()
        count += sum(plan.count_replies(plan.tasks[name]) - 1 for name in not_asked)
        keys = pc.binary_join_element_wise(*by_model.columns, " ").combine_chunks()
        count += (pc.sum(pc.not_equal(keys[1:], keys[:-1])).as_py() or 0) + (keys[0].as_py() != last)
        last = keys[-1].as_py()
    return count


def _sample_infos(shard: DatasetDir, settings: AskSettings) -> Iterator[list[SampleInfo]]:
    texts = ["references", "reference_qa"] if settings.keeps_human_texts else []
    pages = page_counts(shard)
    for batch in read_samples(shard, ["sample_id", "split", "width_px", "height_px", *texts]):
        yield [sample_info(row, next(pages), settings) for row in batch.to_pylist()]


def sample_info(row: Mapping[str, Any], pages: int, settings: AskSettings) -> SampleInfo:
    """Return what the annotations of a sample (a row of tables.SAMPLE) are read with."""
    human: tuple[dict[str, Any], ...] = ()
    if settings.keeps_human_texts:
        deck_pages = pages if settings.has_decks else None
        human = human_annotations(row["sample_id"], row["references"], row["reference_qa"] or (), deck_pages)
    return SampleInfo(row["sample_id"], pages, row["split"], row["width_px"], row["height_px"], human)


STEP = AskStep(NAME, unit="requests")
