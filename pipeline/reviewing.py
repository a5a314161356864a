"""Apply human reviews to a dataset: make a new version without reading the source or asking a model."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, no_dataset
from pipeline.dataset.records import read_record
from pipeline.dataset.reviews import AppliedReviews, Review, format_lines, merge_lines, read_lines, text_name
from pipeline.errors import ConfigError
from pipeline.inference.queue import RequestStats
from pipeline.logs import log_to
from pipeline.plan import Plan
from pipeline.progress import NullProgress, Progress
from pipeline.run import RunResult, run, run_here, steps_of
from pipeline.steps import review, split
from pipeline.steps.base import AllRows
from pipeline.steps.review import read_texts
from pipeline.storage.files import read_json, translate_disk_errors, write_text

# The step before the review step.
SPLIT = split.STEP.name
REVIEW_FIRST = "review texts in a report, then export the reviews"
RUN_FIRST = "finish its run first: repeat its `synth generate` command"


def apply_reviews(dataset: DatasetDir, files: Sequence[Path], progress: Progress | None = None) -> RunResult:
    """Add review files to a dataset folder, and make a new version with these reviews.

    Audit verdicts change no row. They only set the error rates of the new version. Raises ConfigError and
    changes nothing if a file holds no reviews, an edit is unusable, or no review matches a text. Raises the
    errors of `generate_dataset` too.
    """
    progress = progress or NullProgress()
    with translate_disk_errors(dataset.path):
        plan = Plan.resolve(_recorded_settings(dataset), dataset)
        sources = {path: read_lines(path) for path in files}
        new = [line for lines in sources.values() for line in lines]
        if not new:
            raise ConfigError(f"no reviews in {', '.join(map(str, files))}", hint=REVIEW_FIRST)
        with dataset.lock() as check:
            paths = dataset.step_files(SPLIT)
            if not paths:
                raise ConfigError(f"{dataset.path} has no finished run to review", hint=RUN_FIRST)
            before = read_lines(dataset.reviews) if dataset.reviews.exists() else []
            merged = merge_lines([*before, *new])
            reviews = [line for line in merged if isinstance(line, Review)]
            samples = {line.sample_id for line in merged}
            rows = {text_name(row): row for row in read_texts(AllRows(paths), samples, "sample_id")}
            edited = {line.resulting_name for line in before if isinstance(line, Review)}
            if not any(line.name in rows or line.name in edited for line in new):
                problem = f"none of the {len(new)} reviews matches a text in {dataset.path}"
                hint = "pass the dataset folder that the report shows; the report may show an older version"
                raise ConfigError(problem, hint=hint)
            for edit, problem in AppliedReviews.of(reviews, rows, plan.tasks).unusable:
                text = edit.text or f"{edit.question} {edit.answer}"
                path = next((path for path, lines in sources.items() if edit in lines), dataset.reviews)
                hint = "edit the text again"
                problem = f"{path}: the edited text {text[:80]!r} cannot be used: {problem}"
                raise ConfigError(problem, hint=hint)
            write_text(dataset.reviews, format_lines(merged))
            try:
                if dataset.step_file(SPLIT).exists():
                    require_records([dataset], plan)
                    with log_to(dataset.path):
                        return run_here(plan, RequestStats(), progress, first=review.STEP.name)
                from pipeline.executors.ray.executor import open_finished

                executor = open_finished(plan, progress, check)
                require_records(executor.shards, plan)
                return run(plan, executor, RequestStats(), progress, first=review.STEP.name)
            except Exception:
                write_text(dataset.reviews, format_lines(before))
                raise


def require_records(shards: Sequence[DatasetDir], plan: Plan) -> None:
    """Raise ConfigError unless the same run has finished all steps before the review in all shards."""
    *before, _, _ = steps_of(plan)
    is_finished = all(read_record(shard, step.name).get("files") for shard in shards for step in before)
    if not is_finished or len({read_record(shard, SPLIT)["key"] for shard in shards}) > 1:
        raise ConfigError(f"{plan.dataset.path} has no finished run to review", hint=RUN_FIRST)


def _recorded_settings(dataset: DatasetDir) -> Config:
    if not dataset.run_file.exists():
        raise no_dataset(dataset.path)
    try:
        return Config.model_validate(read_json(dataset.run_file))
    except (ValidationError, ValueError):
        hint = "pass another dataset folder"
        raise ConfigError(f"{dataset.run_file} was not written by synth", hint=hint) from None
