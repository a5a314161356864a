"""Warnings about the results of a run: rejected rows, with reasons and remedies, and empty splits."""

from collections.abc import Iterator, Sequence

import pyarrow.compute as pc

from pipeline.config.sections import SplitConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.version import Version
from pipeline.errors import TableError, one_line
from pipeline.plan import Plan
from pipeline.sources.duplicates import REPEATED
from pipeline.steps.base import Step
from pipeline.storage.files import read_table
from pipeline.tasks.conditions import is_no_loss
from pipeline.text.reasons import in_words
from pipeline.types import REFUSED_BY_SERVER, SERVER_ERROR

# Versions with fewer rows get no warning about empty splits.
MIN_ROWS_FOR_SPLITS = 3
SEE_REPORT = "`synth report` shows them"
RETRY = "the same command sends them again"
UNANSWERED_MESSAGES = {
    SERVER_ERROR: f"requests got only errors from the server: {RETRY}",
    REFUSED_BY_SERVER: (
        f"requests were rejected by the server: {RETRY}; if images are too large, lower generate.max_pixels"
    ),
}


def describe_warnings(
    steps: Sequence[Step], split: SplitConfig, version: Version, funnel: Sequence[StepSummary]
) -> list[str]:
    """Return warnings about a finished run, such as rejected rows, empty splits and unanswered requests."""
    return [
        *describe_losses(steps, funnel),
        *describe_empty_splits(version, split),
        *describe_unanswered(DatasetDir(version.dataset_dir), funnel),
    ]


def describe_losses(
    steps: Sequence[Step], funnel: Sequence[StepSummary], default_hint: str = SEE_REPORT
) -> Iterator[str]:
    """Yield a warning for each step that rejected more than half of its rows, with a reason and a remedy."""
    steps_by_name = {step.name: step for step in steps}
    for summary in funnel:
        step, rejected = steps_by_name.get(summary.step), dict(summary.rejected)
        same, total = rejected.get("same_as_the_best", 0), sum(rejected.values())
        if 2 * same > total:
            yield (
                f"{same:,} of {total:,} unselected captions are the same as the selected caption: "
                "the server may ignore sample_temperature, which --samples needs"
            )
        if step and step.is_choice:
            continue
        # These rows are not lost: repeated images (another row gets their texts), texts that the next model
        # was asked to replace, and rows that the settings leave out.
        wanted = [reason for reason in rejected if reason == REPEATED or is_no_loss(reason)]
        rows, lost = summary.input - sum(map(rejected.pop, wanted)), sum(rejected.values())
        if 2 * lost > rows:
            reason, count = max(rejected.items(), key=lambda item: item[1])
            hint = step.advice.get(reason, default_hint) if step else default_hint
            share = f"{lost:,} of {rows:,} {summary.unit}, {count:,} of them"
            yield f"`{summary.step}` rejected {share} as {reason.replace('_', ' ')}: {hint}"


def describe_empty_splits(version: Version, split: SplitConfig) -> Iterator[str]:
    """Yield a warning if a split is empty although the version has enough rows."""
    shares = {"train": 1.0, "validation": split.validation_frac, "test": split.test_frac}
    empty = [name for name, share in shares.items() if share and not version.manifest["rows"].get(name)]
    if empty and version.num_rows >= MIN_ROWS_FOR_SPLITS:
        groups = ", or smaller groups (--group-by)" if split.group_by else ""
        verb = "splits have" if len(empty) > 1 else "split has"
        yield (
            f"the {' and the '.join(empty)} {verb} no images, but `synth train` needs some: "
            f"use more images or, for a source without splits, another --seed{groups}"
        )


def describe_unanswered(dataset: DatasetDir, funnel: Sequence[StepSummary]) -> Iterator[str]:
    """Yield warnings about requests that the server refused or did not answer, with an example message."""
    rejected = next((summary.rejected for summary in funnel if summary.step == "validate"), {})
    for reason, message in UNANSWERED_MESSAGES.items():
        if count := rejected.get(reason):
            paths = dataset.step_files("validate", "rejected")
            tables = (read_table(path, ["reason", "reply_text"]) for path in paths)
            replies = (table.filter(pc.equal(table["reason"], reason))["reply_text"] for table in tables)
            text = next((text for column in replies for text in column.drop_null().to_pylist()), None)
            example = "" if text is None else f'; its message: "{one_line(text, 200)}"'
            yield f"{count:,} {message}{example}"


class NoRowsError(TableError):
    """Raised when the steps have rejected every row. `summaries` has one entry per step."""

    def __init__(self, message: str, hint: str, summaries: list[StepSummary]) -> None:
        super().__init__(message, hint=hint)
        self.summaries = summaries


def require_rows(plan: Plan, steps: Sequence[Step], summaries: list[StepSummary]) -> None:
    """Raise NoRowsError, with a hint to the settings to change, if no row is left for a version."""
    config = plan.config
    validated = next(summary for summary in summaries if summary.step == "validate")
    if not validated.input and config.keeps_human_texts:
        hint = "to use a model, pass --tasks caption"
        if "captions" in plan.spec.options:
            hint = f"pass a file of captions: --captions FILE; {hint}"
        elif plan.spec.kind in ("hub", "parquet"):
            hint = f"pass a column of captions: --columns references=COLUMN; {hint}"
        raise NoRowsError(f"{config.source} has no human captions and no human questions", hint, summaries)
    if summaries[-1].kept:
        return
    losses = [*describe_losses(steps, summaries, "the rows are in rejected.parquet of this step")]
    losses += describe_unanswered(plan.dataset, summaries)
    chosen = {reason: count for reason, count in validated.rejected.items() if is_no_loss(reason)}
    losses += [f"{in_words(reason)}: {count:,} {validated.unit}" for reason, count in chosen.items()]
    folder = plan.dataset.path / "steps"
    hint = f"change these settings, then run again; all rejected rows are in {folder}/*/rejected.parquet"
    if config.tasks and 2 * validated.kept < validated.input - sum(chosen.values()):
        attempts = f"generate: {{max_attempts: {config.generate.max_attempts}}}"
        hint += f"; to retry unusable replies more often, raise {attempts}"
    problem = "; ".join(losses) or "every step rejected some rows"
    raise NoRowsError(f"no rows are left, so no version was made: {problem}", hint, summaries)
