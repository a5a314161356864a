"""`synth generate --dry-run`: annotate a few images, and predict the cost of all. The replies are kept."""

import time
from contextlib import ExitStack
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.paths import dataset_folder
from pipeline.inference.engines import choose_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_about, read_annotations
from pipeline.inference.requests import build_requests, check_prompts, requests_per_sample
from pipeline.progress import NullProgress, Progress
from pipeline.sources import open_source, with_source_defaults
from pipeline.stages.validate import validate_annotations
from pipeline.storage.files import translate_disk_errors
from pipeline.types import Engine, Sample

SAMPLED_IMAGES = 32


def predict_run(config: Config, out: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Return hours, tokens, bytes and the share of invalid annotations that a run with this config is likely to have.

    Images whose replies are in the journal are skipped: only a request that is sent can be timed.

    Raises:
        SynthError: as `generate_dataset`.
    """
    config = with_source_defaults(config)
    folder = DatasetDir(out or dataset_folder(config.source))
    progress = progress or NullProgress()
    check_prompts(config)
    source = open_source(config)
    choice = choose_engine(config, folder.server_log, progress)
    stats = RequestStats()
    samples: list[Sample] = []
    with translate_disk_errors(folder.path), folder.lock(), Journal(folder.journal) as journal, ExitStack() as stack:
        seen: set[str] = set()
        for row in source.rows:
            if isinstance(row, Sample) and row.id not in seen:
                seen.add(row.id)
                samples += [row] if _is_new(row, config, choice.revision, journal) else []
            if len(samples) == SAMPLED_IMAGES or len(seen) == config.limit:
                break

        @cache
        def engine() -> Engine:
            return stack.enter_context(choice.make())

        if samples:
            engine()
        started = time.monotonic()
        chunks = iter([[(sample.id, sample.images) for sample in samples]])
        for ready in ask_about(chunks, config, choice.revision, engine, journal, stats):
            progress("dry run", stats.done, len(samples) * len(requests_per_sample(config)), ready.metrics())
        seconds = time.monotonic() - started
        limits = [limit for limit in (source.count(), config.limit) if limit is not None]
        return _estimate(samples, min(limits, default=None), seconds, config, choice.revision, journal, stats)


def _is_new(sample: Sample, config: Config, revision: str, journal: Journal) -> bool:
    return any(journal.last(request.id) is None for request in build_requests(sample.id, (), config, revision))


def _estimate(
    samples: list[Sample],
    total: int | None,
    seconds: float,
    config: Config,
    revision: str,
    journal: Journal,
    stats: RequestStats,
) -> dict[str, Any]:
    prompt_tokens = reply_tokens = text_bytes = 0
    for sample in samples:
        for request in build_requests(sample.id, (), config, revision):
            last = journal.last(request.id)
            assert last is not None, f"no reply to {request.id}"
            prompt_tokens += last[0].prompt_tokens
            reply_tokens += last[0].reply_tokens
            text_bytes += len(last[0].text.encode())
    described = [(sample.id, len(sample.images), sample.split) for sample in samples]
    (table,) = read_annotations([described], config, revision, journal)
    reasons = validate_annotations(table)["reason"]
    images = len(samples) if total is None else total
    scale = images / len(samples) if samples else 0.0
    return {
        "sampled_images": len(samples),
        "sampled_seconds": round(seconds, 2),
        "asked": stats.asked,
        "images": images,
        "requests": images * len(requests_per_sample(config)),
        "hours": seconds * scale / 3600,
        "prompt_tokens": round(prompt_tokens * scale),
        "reply_tokens": round(reply_tokens * scale),
        "bytes": round((sum(len(image) for sample in samples for image in sample.images) + text_bytes) * scale),
        "invalid_share": wilson_interval(len(reasons) - reasons.null_count, len(reasons)),
    }


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share (E. B. Wilson, 1927); [0, 1] if there are no trials."""
    if trials == 0:
        return 0.0, 1.0
    share = hits / trials
    center = share + z * z / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)
