"""`synth estimate`: run all steps on a few images, and estimate the cost of the whole run."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from pipeline.config import Config
from pipeline.config.sections import Servers, cost_of
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.statistics import wilson_interval
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.run import run_trial, steps_of
from pipeline.steps.ask import AskSettings
from pipeline.storage.files import translate_disk_errors
from pipeline.tasks.conditions import is_no_loss
from pipeline.types import Rejected, Sample, Source

SAMPLED_IMAGES = 32
# A task with several models needs a larger sample, to measure how many texts pass all checks.
LADDER_IMAGES = 100
# Stop after this many images that need no request.
MAX_COMPLETE_IMAGES = 512
BYTES_PER_TOKEN = 4


def estimate_run(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Return the likely hours, requests, tokens, money, bytes and kept rows of a run.

    `sampled_*` values were spent on the sample, whose replies the run reuses. `remaining_*`, hours, tokens
    and `cost` are for the other images, and `total_*` for all images. If the journal has all replies,
    `total_*` are 0. Raises SynthError as `generate_dataset` does.
    """
    config, folder, source = plan.config, plan.dataset, plan.source
    assert source is not None
    stats = RequestStats()
    # The run on the sample calibrates checks on the same share of images as the real run.
    size = LADDER_IMAGES if plan.requests.num_rungs > 1 else SAMPLED_IMAGES
    images = config.limit or source.count() or size
    calibration = math.ceil(min(1.0, size / images) * config.verify.calibration)
    changes = {"verify": config.verify.model_copy(update={"calibration": calibration})}
    with translate_disk_errors(folder.path), folder.lock():
        with Journal(folder.journal) as journal:
            sample = _sample_rows(source, AskSettings.of(plan), size, config.limit, journal)
        with run_trial(plan, sample.rows, stats, progress, changes) as trial:
            funnel = trial.funnel
            ladder = trial.version.manifest.get("ladder", []) if trial.version else []
    total = source.count()
    if total is None and not config.limit and sample.new == size:
        progress.warn("the number of images is unknown: the estimate covers only the sample; pass --limit N")
    choices = {step.name for step in steps_of(plan) if step.is_choice}
    estimate = _scale_counts(sample, funnel, total, config, stats, choices)
    scale = estimate["images"] / max(1, estimate["sampled_images"])
    return estimate | {"ladders": forecast_ladders(ladder, config.servers, scale)}


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Some rows of a source, and how many of the images are in each state.

    `new` images have unanswered requests. For `answered` images, the journal has all replies.
    `complete` images need no request, because they have human texts.
    """

    rows: list[Sample | Rejected]
    new: int
    answered: int
    complete: int


def _sample_rows(
    source: Source, settings: AskSettings, size: int, limit: int | None, journal: Journal
) -> SampledRows:
    """Return the first rows with `size` new images. If there are fewer, add answered images."""
    rows: list[Sample | Rejected] = []
    answered_rows: list[Sample | Rejected] = []
    ids: set[str] = set()
    new = answered = complete = 0
    for row in source.rows:
        if isinstance(row, Rejected) or row.id in ids:
            rows.append(row)
            continue
        ids.add(row.id)
        requests = settings.requests_about(row, journal)
        if not requests:
            complete += 1
            rows.append(row)
        elif all(journal.last(request.id) for request in requests):
            answered += 1
            if answered <= size:
                answered_rows.append(row)
        else:
            new += 1
            rows.append(row)
        if new == size or complete == MAX_COMPLETE_IMAGES or len(ids) == limit:
            break
    return SampledRows([*rows, *answered_rows[: size - new]], new, answered, complete)


def forecast_ladders(ladder: list[dict[str, Any]], servers: Servers, scale: float) -> list[dict[str, Any]]:
    """Return the requests and cost of several models that are asked in turn, and of each model used alone.

    A later model is asked only if a text fails a check. `ladder` has the counts of a sample (see
    `ladder.describe_ladder`). Requests of checks are not included. `interval` is the 95 % interval of the
    share of a model's texts that pass all checks.
    """

    def choice(*rungs: dict[str, Any], factor: float = scale) -> dict[str, Any]:
        tokens = {
            rung["model"]: (rung["prompt_tokens"] * factor, rung["reply_tokens"] * factor) for rung in rungs
        }
        requests = round(sum(rung["requests"] for rung in rungs) * factor)
        return {"models": ", ".join(tokens), "requests": requests, "cost": cost_of(tokens, servers)}

    forecasts = []
    for task, group in groupby(ladder, itemgetter("task")):
        rungs = list(group)
        # A model that is used alone gets as many requests as the first of several models.
        factors = [scale * rungs[0]["requests"] / rung["requests"] for rung in rungs]
        choices = [choice(rung, factor=factor) for rung, factor in zip(rungs, factors, strict=True)]
        passed = [
            {"model": rung["model"], "interval": wilson_interval(rung["kept"], rung["texts"])}
            for rung in rungs
        ]
        forecasts.append({"task": task, "choices": [*choices, choice(*rungs)], "rungs": passed})
    return forecasts


def _scale_counts(
    sample: SampledRows,
    funnel: list[StepSummary],
    total: int | None,
    config: Config,
    stats: RequestStats,
    choices: Collection[str],
) -> dict[str, Any]:
    """Scale the counts of a run on a sample to the whole run. Rejections by `choices` are not losses."""
    by_step = {summary.step: summary for summary in funnel}
    read, annotations, kept = by_step["read"], by_step["validate"].input, by_step["review"].kept
    kept_images = by_step["write"].kept if "write" in by_step else 0
    # --limit counts only images that the read step keeps, but `total` counts all rows.
    scales = [total / read.input] if total is not None and read.input else []
    scales += [config.limit / read.kept] if config.limit and read.kept else []
    scale = min(scales, default=1.0)
    images = round(read.kept * scale)
    unanswered_frac = sample.new / (sample.new + sample.complete) if sample.new else 0.0
    # The requests about the sample are already paid for.
    remaining = max(0, round(max(0, images - sample.answered) * unanswered_frac) - sample.new)
    remaining_scale = remaining / sample.new if sample.new else 0.0
    total_scale = images * unanswered_frac / sample.new if sample.new else 0.0
    cost = stats.cost(config.servers)
    losses = [summary for summary in funnel if summary.step not in choices]
    not_chosen = sum(summary.input - summary.kept for summary in funnel if summary.step in choices)
    rejected = by_step["validate"].rejected.items()
    not_chosen += sum(count for reason, count in rejected if is_no_loss(reason))
    first_attempts = by_step["ask"].kept
    image_bytes = sum(len(image) for row in sample.rows if isinstance(row, Sample) for image in row.images)
    return {
        "sampled_images": read.kept,
        "sampled_seconds": round(stats.asking_s, 2),
        "sampled_cost": cost,
        "asked": stats.asked,
        "images": images,
        "remaining_images": remaining,
        "remaining_requests": round(stats.asked * remaining_scale),
        "requests": round(first_attempts * scale),
        "verify_requests": round((stats.total - first_attempts) * scale),
        "retries": round((stats.asked - sum(stats.attempts.values())) * (1 + remaining_scale)),
        # Time for requests only. The other steps take microseconds per row.
        "hours": round(stats.asking_s * remaining_scale / 3600, 6),
        "prompt_tokens": round(stats.prompt_tokens * remaining_scale),
        "reply_tokens": round(stats.reply_tokens * remaining_scale),
        "cost": None if cost is None else cost * remaining_scale,
        "total_hours": round(stats.asking_s * total_scale / 3600, 6),
        "total_tokens": round((stats.prompt_tokens + stats.reply_tokens) * total_scale),
        "total_cost": None if cost is None else cost * total_scale,
        "bytes": round((image_bytes + BYTES_PER_TOKEN * stats.reply_tokens) * scale),
        "annotations": round(annotations * scale),
        "kept_annotations": round(kept * scale),
        "kept_images": round(kept_images * scale),
        "lost_share": wilson_interval(annotations - kept - not_chosen, annotations - not_chosen),
        "lost_by": {
            f"{summary.step}: {reason}": count
            for summary in losses
            for reason, count in summary.rejected.items()
            if not is_no_loss(reason)
        },
    }
