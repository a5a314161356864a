"""`synth generate --dry-run`: run all steps on a few images, and predict what the whole run costs and keeps.

The images go through the steps in a folder of their own; their replies stay in the journal for the real run.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.statistics import wilson_interval
from pipeline.executors.messages import describe_start
from pipeline.inference.journal import Journal
from pipeline.inference.queue import RequestStats, read_results
from pipeline.inference.requests import Pair, build_requests
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.run import NoRowsError, run_here, steps_of
from pipeline.steps.ask import AskSettings
from pipeline.storage.files import read_batches, remove, translate_disk_errors
from pipeline.text.escape import visible
from pipeline.text.reasons import in_short
from pipeline.types import Rejected, Sample, Source

SAMPLED_IMAGES = 32
COMPLETE_IMAGES = 512  # that are looked at on the way to images that need a request
SHOWN_TEXTS = 5
BYTES_A_TOKEN = 4  # of English text
FOLDER = ".dry-run"  # within the dataset folder


def predict_run(config: Config, out: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Return hours, requests, tokens, money, bytes and kept rows that a run with this config is likely to have.

    Hours, tokens and money are of the images that are still to be asked about; only a request that is sent can be timed, so
    images whose replies are in the journal come last in the sample. Raises SynthError as `generate_dataset` does.
    """
    progress = progress or NullProgress()
    plan = Plan.open(config, out, progress, is_trial=True)
    config, folder, source = plan.config, plan.dataset, plan.source
    assert source is not None
    progress.message(describe_start(plan))
    trial = DatasetDir(folder.path / FOLDER)
    stats = RequestStats()
    with translate_disk_errors(folder.path), folder.lock(), _emptied(trial.path):
        with Journal(folder.journal) as journal:
            sample = _sample(source, AskSettings.of(plan), config.limit, journal)
        trial.journal.parent.symlink_to(folder.journal.parent.absolute(), target_is_directory=True)
        # Excluded images are not looked for: their source may be large, and the real run reads it once.
        sampled = config.model_copy(update={"exclude": (), "limit": None, "images": None})
        read = Source(
            name=source.name, revision=source.revision, read=lambda start: iter(sample.rows[start:]), decks=source.decks
        )
        trial_plan = replace(Plan.resolve(sampled, trial), source=read)
        assert plan.engine is not None
        trial_plan = trial_plan.with_engine(plan.engine)
        try:
            funnel = run_here(trial_plan, stats, StepsOnly(progress)).funnel
        except NoRowsError as error:
            funnel = error.summaries
        texts = _first_texts(trial)
    is_endless = config.images is not None and plan.spec.is_endless
    total = None if is_endless else source.count()
    choices = {step.name for step in steps_of(trial_plan) if step.is_choice}
    return _predict(sample, funnel, total, config, stats, choices) | {"texts": texts}


class StepsOnly(NullProgress):
    """Passes on how far steps are, and warnings; messages of a trial run name its own folder."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, step: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
        """See Progress."""
        self._progress(step, done, total, metrics)

    def warn(self, text: str) -> None:
        """See Progress."""
        self._progress.warn(text)


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Some rows of a source: `new` images were not asked about before, `answered` ones were met on the way to them.

    `complete` images are among the rows, and need no request: people have written what would be asked.
    """

    rows: list[Sample | Rejected]
    new: int
    answered: int
    complete: int = 0


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Make an empty folder, and remove it at the end; of the journal in it, that is the link alone."""
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        remove(folder)


def _sample(source: Source, settings: AskSettings, limit: int | None, journal: Journal) -> SampledRows:
    """Return the first rows of a source with SAMPLED_IMAGES images that were not asked about, else with images that were."""
    rows: list[Sample | Rejected] = []
    filling: list[Sample] = []
    ids: set[str] = set()
    new = answered = complete = 0
    for row in source.rows:
        if isinstance(row, Rejected) or row.id in ids:
            rows.append(row)
            continue
        ids.add(row.id)
        if not _wanted(row, settings):
            complete += 1
            rows.append(row)
        elif _is_answered(row, settings, journal):
            answered += 1
            filling += [row] if len(filling) < SAMPLED_IMAGES else []
        else:
            new += 1
            rows.append(row)
        if new == SAMPLED_IMAGES or complete == COMPLETE_IMAGES or len(ids) == limit:
            break
    return SampledRows([*rows, *filling[: SAMPLED_IMAGES - new]], new, answered, complete)


def _wanted(sample: Sample, settings: AskSettings) -> tuple[Pair, ...]:
    return settings.requests.wanted(settings.source_texts(sample.to_row()))


def _is_answered(sample: Sample, settings: AskSettings, journal: Journal) -> bool:
    """Return whether the journal has replies to all that can be asked about a sample by the results that are there."""
    results = read_results(sample.id, settings.requests, journal, sample.context)
    requests = build_requests(sample.id, settings.requests, sample.context, results, _wanted(sample, settings))
    return all(journal.last(request.id) for request in requests)


def _first_texts(dataset: DatasetDir) -> list[str]:
    """Return the first texts that all steps kept."""

    def texts() -> Iterator[str]:
        for table in read_batches(
            dataset.step_file("review"), ["final_text", "final_question", "final_answer", "final_record"]
        ):
            for row in table.to_pylist():
                own = row["final_record"] and in_short(json.loads(row["final_record"]))
                yield visible(row["final_text"] or own or f"{row['final_question']} {row['final_answer']}")

    return [text for text, _ in zip(texts(), range(SHOWN_TEXTS), strict=False)] if dataset.step_file("review").exists() else []


def _predict(
    sample: SampledRows,
    funnel: list[StepSummary],
    total: int | None,
    config: Config,
    stats: RequestStats,
    choices: Collection[str],  # steps whose rejections are no losses
) -> dict[str, Any]:
    of_step = {summary.step: summary for summary in funnel}
    read, written, kept = of_step["read"], of_step["validate"].input, of_step["review"].kept
    # A limit counts images that are kept, a source also those that are not.
    scales = [total / read.input] if total is not None and read.input else []
    scales += [config.limit / read.kept] if config.limit and read.kept else []
    kept_images = of_step["write"].kept if "write" in of_step else 0
    scales += [config.images / kept_images] if config.images and kept_images else []
    scale = min(scales, default=1.0)
    images = round(read.kept * scale)
    of_unanswered = sample.new / (sample.new + sample.complete) if sample.new else 0.0
    remaining = round(max(0, images - sample.answered) * of_unanswered)
    of_remaining = remaining / sample.new if sample.new else 0.0
    cost = stats.cost(config.server)
    passed_over = sum(sum(summary.rejected.values()) for summary in funnel if summary.step in choices)
    first_attempts = of_step["ask"].kept
    image_bytes = sum(len(image) for row in sample.rows if isinstance(row, Sample) for image in row.images)
    return {
        "sampled_images": read.kept,
        "sampled_seconds": round(stats.asking_s, 2),
        "asked": stats.asked,
        "images": images,
        "remaining_images": remaining,
        "requests": round(first_attempts * scale),
        "verify_requests": round((stats.total - first_attempts) * scale),
        "retries": round((stats.asked - sum(stats.attempts.values())) * of_remaining),
        "hours": round(stats.asking_s * of_remaining / 3600, 6),  # the steps take microseconds a row
        "prompt_tokens": round(stats.prompt_tokens * of_remaining),
        "reply_tokens": round(stats.reply_tokens * of_remaining),
        "cost": None if cost is None else cost * of_remaining,
        "bytes": round((image_bytes + BYTES_A_TOKEN * stats.reply_tokens) * scale),
        "annotations": round(written * scale),
        "kept_annotations": round(kept * scale),
        "kept_images": round(kept_images * scale),
        "lost_share": wilson_interval(written - kept - passed_over, written - passed_over),
        "lost_by": {
            f"{summary.step}: {reason}": count
            for summary in funnel
            if summary.step not in choices
            for reason, count in summary.rejected.items()
        },
    }
