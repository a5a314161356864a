"""`synth generate --dry-run`: annotate a few images, and predict the cost of all. The replies are kept."""

import time
from math import sqrt
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.paths import dataset_folder
from pipeline.inference.engines import choose_engine, open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, ask_about, read_annotations
from pipeline.inference.requests import build_requests, check_prompts, requests_per_sample
from pipeline.progress import NullProgress, Progress
from pipeline.sources import open_source, with_source_defaults
from pipeline.stages.validate import validate_annotations
from pipeline.storage.files import translate_disk_errors
from pipeline.types import Reply, Sample

SAMPLED_IMAGES = 32


def predict_run(config: Config, out: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Return hours, tokens, bytes and the share of invalid annotations that a run with this config is likely to have.

    Images whose replies are in the journal are skipped: only a request that is sent can be timed.
    Raises SynthError as `generate_dataset` does.
    """
    config = with_source_defaults(config)
    folder = DatasetDir(out or dataset_folder(config.source))
    progress = progress or NullProgress()
    check_prompts(config)
    source = open_source(config)
    choice = choose_engine(config, folder.server_log, progress)
    stats = RequestStats()
    samples: list[Sample] = []
    with (
        translate_disk_errors(folder.path),
        folder.lock(),
        Journal(folder.journal) as journal,
        open_engine(lambda: choice) as engine,
    ):
        seen: set[str] = set()
        for row in source.rows:
            if isinstance(row, Sample) and row.id not in seen:
                seen.add(row.id)
                samples += [row] if None in _last_replies(row, config, choice.revision, journal) else []
            if len(samples) == SAMPLED_IMAGES or len(seen) == config.limit:
                break

        if samples:
            engine()
        started = time.monotonic()
        chunks = iter([[(sample.id, sample.images) for sample in samples]])
        for ready in ask_about(chunks, config, choice.revision, engine, journal, stats):
            progress("dry run", stats.done, len(samples) * len(requests_per_sample(config)), ready.metrics())
        seconds = time.monotonic() - started
        limits = [limit for limit in (source.count(), config.limit) if limit is not None]
        return _estimate(samples, min(limits, default=None), seconds, config, choice.revision, journal, stats.asked)


def _last_replies(sample: Sample, config: Config, revision: str, journal: Journal) -> list[Reply | None]:
    """Return the reply to each request about a sample; None if the journal has none."""
    entries = [journal.last(request.id) for request in build_requests(sample.id, (), config, revision)]
    return [entry and entry[0] for entry in entries]


def _estimate(
    samples: list[Sample], total: int | None, seconds: float, config: Config, revision: str, journal: Journal, asked: int
) -> dict[str, Any]:
    replies = [reply for sample in samples for reply in _last_replies(sample, config, revision, journal) if reply]
    image_bytes = sum(len(image) for sample in samples for image in sample.images)
    described = [(sample.id, len(sample.images), sample.split) for sample in samples]
    (table,) = read_annotations([described], config, revision, journal)  # asserts that each request has its reply
    reasons = validate_annotations(table)["reason"]
    images = len(samples) if total is None else total
    scale = images / len(samples) if samples else 0.0
    return {
        "sampled_images": len(samples),
        "sampled_seconds": round(seconds, 2),
        "asked": asked,
        "images": images,
        "requests": images * len(requests_per_sample(config)),
        "hours": seconds * scale / 3600,
        "prompt_tokens": round(sum(reply.prompt_tokens for reply in replies) * scale),
        "reply_tokens": round(sum(reply.reply_tokens for reply in replies) * scale),
        "bytes": round((image_bytes + sum(len(reply.text.encode()) for reply in replies)) * scale),
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
