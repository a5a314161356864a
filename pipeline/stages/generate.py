"""Stage: generate. Ask a model about every sample of a shard, and write its replies as annotations."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, page_counts, read_samples, sample_batches
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_TEXTS, TextsById, ask_about, read_annotations
from pipeline.inference.requests import count_replies, count_requests, requests_about, requests_per_sample, rounds
from pipeline.sources import holds_decks
from pipeline.stages.base import RunPlan, Services, record_cost, require_stage
from pipeline.storage.files import read_batches, write_table
from pipeline.tables import ANNOTATION, HUMAN
from pipeline.tasks import find_task
from pipeline.tasks.human import has_texts, human_annotations
from pipeline.types import Engine, SampleInfo, SourceTexts


def generate_annotations(shard: DatasetDir, plan: RunPlan, services: Services) -> None:
    """Ask what the journal of a shard does not hold yet, then write what all replies say."""
    ask_about_shard(shard, plan, services)
    write_annotations(shard, plan)


def ask_about_shard(shard: DatasetDir, plan: RunPlan, services: Services) -> None:
    """Ask a model about the samples of a shard what its journal does not hold yet."""
    samples, _ = require_stage(shard, "source")
    stats, progress = services.stats, services.progress
    texts = read_source_texts(shard, plan.config)
    per_sample = count_wanted(shard, plan) / max(1, samples)
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):

        def start_engine() -> Engine:
            engine = services.engine()
            progress("generate", int(stats.done / per_sample), samples)  # the speed is measured from here on
            return engine

        for round_number in range(len(rounds(plan.config))):
            batches = sample_batches(shard)
            for engine in ask_about(batches, plan.config, plan.revision, start_engine, journal, stats, texts, round_number):
                metrics = engine.metrics() | stats.metrics(plan.config.server)
                progress("generate", int(stats.done / per_sample), samples, metrics)
        progress("generate", samples, samples)


def write_annotations(shard: DatasetDir, plan: RunPlan) -> None:
    """Write what the replies in the journal of a shard say, and what people wrote (tables.ANNOTATION)."""
    texts = read_source_texts(shard, plan.config)
    with Journal(shard.journal) as journal:
        annotations = read_annotations(_sample_infos(shard, plan.config), plan.config, plan.revision, journal, texts)
        write_table(shard.stage("generate"), annotations, ANNOTATION)


def source_texts(row: Mapping[str, Any], config: Config) -> SourceTexts:
    """Return what the source says of a sample (a row of tables.SAMPLE), as far as requests depend on it."""
    context = tuple(row["context"] or ())
    return (
        SourceTexts(context, *has_texts(row["references"], row["reference_qa"] or ()))
        if config.keeps_human_texts
        else SourceTexts(context)
    )


def read_source_texts(shard: DatasetDir, config: Config) -> TextsById:
    """Return what the source says of all samples of a shard."""
    if not config.context and config.human_texts != "fill":
        return NO_TEXTS
    batches = read_samples(shard, ["sample_id", "context", "references", "reference_qa"])
    return {row["sample_id"]: source_texts(row, config) for batch in batches for row in batch.to_pylist()}


def count_wanted(shard: DatasetDir, plan: RunPlan) -> int:
    """Return the number of requests that the samples of a shard are to be asked."""
    if plan.config.human_texts != "fill":
        return require_stage(shard, "source")[0] * count_requests(plan.config, requests_per_sample(plan.config))
    texts = read_source_texts(shard, plan.config).values()
    return sum(count_requests(plan.config, requests_about(plan.config, of_sample)) for of_sample in texts)


def count_asked(shard: DatasetDir, config: Config) -> int:
    """Return how many requests the annotations of a shard answer; those of one request are adjacent.

    A row of a task that was not asked about an image stands for all of its requests.
    """
    count, last = 0, None
    for table in read_batches(shard.stage("generate"), ["sample_id", "task", "style", "request_id", "prompt_id"]):
        by_model = table.filter(pc.not_equal(table["prompt_id"], HUMAN)).drop_columns(["prompt_id"])
        if not by_model.num_rows:
            continue
        not_asked = by_model.filter(pc.equal(by_model["request_id"], ""))["task"].to_pylist()
        count += sum(count_replies(find_task(name, config.own_tasks), config.generate) - 1 for name in not_asked)
        keys = pc.binary_join_element_wise(*by_model.columns, " ").combine_chunks()
        count += (pc.sum(pc.not_equal(keys[1:], keys[:-1])).as_py() or 0) + (keys[0].as_py() != last)
        last = keys[-1].as_py()
    return count


def _sample_infos(shard: DatasetDir, config: Config) -> Iterator[list[SampleInfo]]:
    texts = ["references", "reference_qa"] if config.keeps_human_texts else []
    pages = page_counts(shard)
    for batch in read_samples(shard, ["sample_id", "split", "width_px", "height_px", *texts]):
        yield [sample_info(row, next(pages), config) for row in batch.to_pylist()]


def sample_info(row: Mapping[str, Any], pages: int, config: Config) -> SampleInfo:
    """Return what the annotations of a sample (a row of tables.SAMPLE) are read with."""
    human: tuple[dict[str, Any], ...] = ()
    if config.keeps_human_texts:
        deck_pages = pages if holds_decks(config) else None
        human = human_annotations(row["sample_id"], row["references"], row["reference_qa"] or (), deck_pages)
    return SampleInfo(row["sample_id"], pages, row["split"], row["width_px"], row["height_px"], human)
