"""Stage: generate. Ask a model about every sample of a shard, and write its replies as annotations."""

from collections.abc import Iterator

import pyarrow.compute as pc

from pipeline.dataset.directory import DatasetDir, read_samples, sample_batches
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_CONTEXTS, Contexts, ask_about, read_annotations
from pipeline.inference.requests import rounds
from pipeline.stages.base import RunPlan, Services, record_cost, require_stage
from pipeline.storage.files import write_table
from pipeline.tables import ANNOTATION
from pipeline.types import Engine, SampleInfo


def generate_annotations(shard: DatasetDir, plan: RunPlan, services: Services) -> None:
    """Ask what the journal of a shard does not hold yet, then write what all replies say (tables.ANNOTATION)."""
    samples, _ = require_stage(shard, "source")
    requests, stats, progress = len(plan.requests), services.stats, services.progress
    contexts = read_contexts(shard) if plan.config.context else NO_CONTEXTS
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):

        def start_engine() -> Engine:
            engine = services.engine()
            progress("generate", stats.done // requests, samples)  # the speed is measured from here on
            return engine

        for round_number in range(len(rounds(plan.config))):
            batches = sample_batches(shard)
            for engine in ask_about(batches, plan.config, plan.revision, start_engine, journal, stats, contexts, round_number):
                metrics = engine.metrics() | stats.metrics(plan.config.server)
                progress("generate", stats.done // requests, samples, metrics)
        progress("generate", samples, samples)
        annotations = read_annotations(_sample_infos(shard), plan.config, plan.revision, journal, contexts)
        write_table(shard.stage("generate"), annotations, ANNOTATION)


def read_contexts(shard: DatasetDir) -> Contexts:
    """Return the contexts of all samples of a shard by their ids."""
    return {
        sample_id: tuple(context or ())
        for batch in read_samples(shard, ["sample_id", "context"])
        for sample_id, context in zip(batch["sample_id"].to_pylist(), batch["context"].to_pylist(), strict=True)
    }


def _sample_infos(shard: DatasetDir) -> Iterator[list[SampleInfo]]:
    for batch in read_samples(shard, ["sample_id", "images", "split", "width_px", "height_px"]):
        pages = pc.list_value_length(batch["images"]).to_pylist()
        columns = (batch[name].to_pylist() for name in ("split", "width_px", "height_px"))
        yield [SampleInfo(*values) for values in zip(batch["sample_id"].to_pylist(), pages, *columns, strict=True)]
