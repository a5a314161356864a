"""Step: ask. Send the model requests about each sample of a shard, and write its replies as annotations."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config import NO_MODEL
from pipeline.config.sections import ServerConfig
from pipeline.dataset.directory import DatasetDir, page_counts, read_samples, sample_batches
from pipeline.dataset.records import output_digest, read_record, step_key
from pipeline.inference.journal import Journal
from pipeline.inference.model_licenses import license_of
from pipeline.inference.queue import NO_TEXTS, TextsById, ask_about, read_annotations, read_results
from pipeline.inference.requests import IMAGE_SIZE, RequestPlan, build_requests
from pipeline.plan import Plan
from pipeline.steps.base import Services, Step, Work, ask_once, record_cost
from pipeline.storage.files import write_table
from pipeline.tables import ANNOTATION
from pipeline.tasks.human import has_texts, human_annotations
from pipeline.types import Engine, Request, Sample, SampleInfo, SourceTexts

NAME = "ask"


@dataclass(frozen=True, slots=True)
class AskSettings:
    """The settings of the ask step. `server` does not affect the replies, so it is not part of the key."""

    requests: RequestPlan
    keeps_human_texts: bool
    has_decks: bool
    server: ServerConfig

    @classmethod
    def of(cls, plan: Plan) -> "AskSettings":
        """Resolve the settings of a run."""
        return cls(plan.requests, plan.config.keeps_human_texts, plan.has_decks, plan.config.server)

    def describe(self) -> list[Any]:
        """Return everything that the annotations depend on, except the samples."""
        return [self.requests.describe(), self.keeps_human_texts, self.has_decks]

    def source_texts(self, row: Mapping[str, Any]) -> SourceTexts:
        """Return the inputs of the requests about a sample (a row of tables.SAMPLE)."""
        has_human = (False, False)
        if self.keeps_human_texts:
            has_human = has_texts(row["references"], row["reference_qa"] or ())
        return SourceTexts(tuple(row["context"] or ()), *has_human, row["width_px"], row["height_px"])

    def requests_about(self, sample: Sample, journal: Journal) -> list[Request]:
        """Return the requests about a sample that can be built from the replies in the journal so far."""
        inputs = self.source_texts(sample.to_row())
        results = read_results(sample.id, self.requests, journal, inputs)
        return list(build_requests(sample.id, self.requests, inputs, results))

    def sample_info(self, row: Mapping[str, Any], pages: int) -> SampleInfo:
        """Return the properties of a sample (a row of tables.SAMPLE) that its annotations depend on."""
        human: tuple[dict[str, Any], ...] = ()
        if self.keeps_human_texts:
            deck = pages if self.has_decks else None
            human = human_annotations(row["sample_id"], row["references"], row["reference_qa"] or (), deck)
        return SampleInfo(row["sample_id"], pages, row["split"], row["width_px"], row["height_px"], human)


class AskStep(Step):
    """Asks the model about all samples, one shard at a time."""

    def run(self, work: Work, before: str) -> None:
        """See Step."""
        work.executor.each(partial(ask_shard, before, work.plan))


def ask_shard(before: str, plan: Plan, shard: DatasetDir, services: Services) -> None:
    """Send the requests about the samples of a shard and write the annotations, unless already done."""
    settings = AskSettings.of(plan)

    def ask() -> dict[str, Any]:
        total = services.stats.total
        _send_requests(shard, settings, services)
        services.stats.spent += write_annotations(shard, settings)
        model = {"name": plan.model, "revision": plan.requests.revision}
        model |= {"license": license_of(plan.model)} if plan.model != NO_MODEL else {}
        return {"kept": services.stats.total - total, "rejected": {}, "model": model}

    ask_once(shard, NAME, step_key(NAME, settings, (), [output_digest(shard, before)]), services, ask)


def _send_requests(shard: DatasetDir, settings: AskSettings, services: Services) -> None:
    samples = read_record(shard, "read")["kept"]
    stats, progress = services.stats, services.progress
    texts = _read_source_texts(shard, settings)
    per_sample = max(1, settings.requests.count(settings.requests.pairs))
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):

        def start_engine() -> Engine:
            engine = services.engine()
            # The request rate is measured from here.
            progress("ask", int(stats.done / per_sample), samples)
            return engine

        for round_number in range(len(settings.requests.rounds)):
            batches = sample_batches(shard)
            for engine in ask_about(
                batches, settings.requests, settings.server, start_engine, journal, stats, texts, round_number
            ):
                metrics = engine.metrics() | stats.metrics(settings.server)
                progress("ask", int(stats.done / per_sample), samples, metrics)
        progress("ask", samples, samples)


def write_annotations(shard: DatasetDir, settings: AskSettings) -> Counter[str]:
    """Write the annotations of a shard (tables.ANNOTATION) from its journal and the human texts.

    Return the requests and tokens that they needed (Journal.spent).
    """
    texts = _read_source_texts(shard, settings)
    with Journal(shard.journal) as journal:
        annotations = read_annotations(_sample_infos(shard, settings), settings.requests, journal, texts)
        write_table(shard.step_file(NAME), annotations, ANNOTATION)
        return journal.spent


def _read_source_texts(shard: DatasetDir, settings: AskSettings) -> TextsById:
    plan = settings.requests
    if not plan.context and not plan.has_conditions:
        return NO_TEXTS
    batches = read_samples(shard, ["sample_id", "context", "references", "reference_qa", *IMAGE_SIZE])
    return {row["sample_id"]: settings.source_texts(row) for batch in batches for row in batch.to_pylist()}


def _sample_infos(shard: DatasetDir, settings: AskSettings) -> Iterator[list[SampleInfo]]:
    texts = ["references", "reference_qa"] if settings.keeps_human_texts else []
    pages = page_counts(shard)
    for batch in read_samples(shard, ["sample_id", "split", "width_px", "height_px", *texts]):
        yield [settings.sample_info(row, next(pages)) for row in batch.to_pylist()]


STEP = AskStep(NAME, unit="requests")
