"""Step: ask. Send the model requests about each sample of a shard, and write its replies as annotations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.dataset.directory import DatasetDir, read_samples, sample_batches
from pipeline.dataset.records import output_digest, read_record, step_key
from pipeline.digests import digest
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_TEXTS, TextsOf, ask_in_rounds, read_annotations, read_results
from pipeline.inference.requests import IMAGE_SIZE, RequestPlan, build_requests
from pipeline.plan import Plan
from pipeline.steps.base import Services, Step, Work, ask_once, record_cost
from pipeline.steps.ladder import Escalated, read_escalated
from pipeline.storage.files import write_table
from pipeline.tables import ANNOTATION, NUM_PAGES
from pipeline.tasks.human import has_texts, human_annotations
from pipeline.types import Engine, Request, Sample, SampleInfo, SourceTexts

NAME = "ask"
NO_LIMIT = (
    "verify.max_true_captions_lost cannot be enforced, because no caption of a model has a human caption to "
    "compare with: `claims` may reject any share of true captions (`synth review` draws rejected texts, too)"
)


@dataclass(frozen=True, slots=True)
class AskSettings:
    """The settings of the ask step."""

    requests: RequestPlan
    keeps_human_texts: bool

    @classmethod
    def of(cls, plan: Plan) -> "AskSettings":
        """Resolve the settings of a run."""
        return cls(plan.requests, plan.config.keeps_human_texts)

    def describe(self) -> list[Any]:
        """Return everything that the annotations depend on, except the samples."""
        return [self.requests.describe(), self.keeps_human_texts, self.requests.has_decks]

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

    def sample_info(self, row: Mapping[str, Any]) -> SampleInfo:
        """Return the properties of a sample (tables.LISTED_SAMPLE) that its annotations depend on."""
        pages, human = row[NUM_PAGES], tuple[dict[str, Any], ...]()
        if self.keeps_human_texts:
            deck = pages if self.requests.has_decks else None
            human = human_annotations(row["sample_id"], row["references"], row["reference_qa"] or (), deck)
        return SampleInfo(row["sample_id"], pages, row["split"], row["width_px"], row["height_px"], human)


class AskStep(Step):
    """Asks the model about all samples, one shard at a time."""

    def run(self, work: Work, before: str) -> None:
        """See Step."""
        plan, shards = work.plan, work.executor.shards
        verify = plan.config.verify
        if "claims" in verify.checks and verify.calibration > 0 and verify.max_true_captions_lost < 1:
            # Human captions that are themselves checked are no references.
            batches = (batch for shard in shards for batch in read_samples(shard, ["references"]))
            if not plan.task_models or not any(any(batch["references"].to_pylist()) for batch in batches):
                work.progress.warn(NO_LIMIT)
        work.executor.each(partial(ask_shard, before, work.plan))


def ask_shard(before: str, plan: Plan, shard: DatasetDir, services: Services) -> None:
    """Send the requests about the samples of a shard and write the annotations, unless already done."""
    settings = AskSettings.of(plan)
    escalated = read_escalated(plan, shard)

    def ask() -> dict[str, Any]:
        total = services.stats.total
        texts = _texts_by_rung(shard, settings, escalated)
        _send_requests(shard, settings, services, texts)
        services.stats.spent += write_annotations(shard, settings, texts)
        return {"kept": services.stats.total - total, "rejected": {}, **plan.record_models()}

    listed = [sorted((name, sorted(pairs)) for name, pairs in of_rung.items()) for of_rung in escalated]
    inputs = [output_digest(shard, before), *([digest(listed)] if escalated else ())]
    ask_once(shard, NAME, step_key(NAME, settings, (), inputs), services, ask)


def _send_requests(
    shard: DatasetDir, settings: AskSettings, services: Services, texts: Sequence[TextsOf]
) -> None:
    samples = read_record(shard, "read")["kept"]
    stats, progress = services.stats, services.progress
    per_sample = max(1, settings.requests.count(settings.requests.pairs))
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):

        def start_engine(model: str) -> Engine:
            engine = services.engine(model)
            # Report progress now, so that the request rate does not include the start of the engine.
            progress("ask", int(stats.done / per_sample), samples)
            return engine

        for rung, of_rung in enumerate(texts):
            plan, batches = replace(settings.requests, rung=rung), partial(sample_batches, shard)
            for engine in ask_in_rounds(
                batches, plan, services.servers, start_engine, journal, stats, of_rung
            ):
                metrics = engine.metrics() | stats.metrics(services.servers)
                progress("ask", int(stats.done / per_sample), samples, metrics)
        progress("ask", samples, samples)


def write_annotations(shard: DatasetDir, settings: AskSettings, texts: Sequence[TextsOf]) -> Counter[str]:
    """Write the annotations of a shard (tables.ANNOTATION) from its journal and the human texts.

    Return the number of requests and tokens that the annotations needed (Journal.spent).
    """
    names = ["references", "reference_qa"] if settings.keeps_human_texts else []
    batches = read_samples(shard, ["sample_id", "split", NUM_PAGES, *IMAGE_SIZE, *names])
    infos = ([*map(settings.sample_info, batch.to_pylist())] for batch in batches)
    with Journal(shard.journal) as journal:
        annotations = read_annotations(infos, settings.requests, journal, *texts)
        write_table(shard.step_file(NAME), annotations, ANNOTATION)
        return journal.spent


def _texts_by_rung(shard: DatasetDir, settings: AskSettings, escalated: Sequence[Escalated]) -> list[TextsOf]:
    """For each model of a task, return a function that maps a sample id to the inputs of its requests."""
    first = NO_TEXTS
    if settings.requests.context or settings.requests.has_conditions:
        batches = read_samples(shard, ["sample_id", "context", "references", "reference_qa", *IMAGE_SIZE])
        rows = (row for batch in batches for row in batch.to_pylist())
        first = {row["sample_id"]: settings.source_texts(row) for row in rows}.__getitem__

    def only(pairs: Escalated) -> TextsOf:
        return lambda sample_id: first(sample_id)._replace(escalated=pairs.get(sample_id, frozenset()))

    return [first, *map(only, escalated)]


STEP = AskStep(NAME, unit="requests")
