"""Build request plans from settings, and send their requests without running pipeline steps."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from pipeline.config import Config
from pipeline.inference.engines import EngineChoice, choose_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_in_rounds, read_annotations
from pipeline.inference.requests import RequestPlan
from pipeline.progress import NullProgress
from pipeline.tasks import Tasks
from pipeline.types import Engine, SampleBatch, SampleInfo


def request_plan(config: Config, revision: str = "r") -> RequestPlan:
    return RequestPlan.of(config, Tasks(config.tasks, config.custom_tasks), {config.default_model: revision})


def engine_of(config: Config) -> EngineChoice:
    return choose_engine(config, request_plan(config), Path("vllm.log"), NullProgress())


def ask(
    config: Config,
    chunks: Iterable[SampleBatch],
    engine: Callable[[], Engine],
    journal: Journal,
    stats: RequestStats | None = None,
    revision: str = "r",
) -> RequestStats:
    stats = RequestStats() if stats is None else stats
    plan = request_plan(config, revision)
    samples = iter(chunks)
    for _ in ask_in_rounds(lambda: samples, plan, config.servers, lambda _: engine(), journal, stats):
        pass
    return stats


def stored_annotations(config: Config, ids: Iterable[str], journal: Journal, revision: str = "r") -> pa.Table:
    samples = [SampleInfo(sample_id, 1) for sample_id in ids]
    (table,) = read_annotations([samples], request_plan(config, revision), journal)
    return table
