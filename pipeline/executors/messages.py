"""What a user is told of a run: what it is about to do, and where it lost rows, why, and what to change."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow.compute as pc

from pipeline.config import NO_MODEL, Config
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.dataset.version import REJECTIONS_FILE, Version
from pipeline.digests import public_name
from pipeline.errors import one_line
from pipeline.inference.engines import EngineChoice, find_family
from pipeline.plan import Plan
from pipeline.sources.duplicates import REPEATED
from pipeline.steps.base import Step
from pipeline.storage.files import read_table
from pipeline.tables import HUMAN
from pipeline.tasks import tasks_making
from pipeline.tasks.prompts import describe_prompts
from pipeline.types import REFUSED_BY_SERVER, SERVER_ERROR

ENOUGH_ROWS = 20  # of which usually some are in each split
REPORTED = "`synth report` shows them"
AGAIN = "the same command asks again"
_UNANSWERED = {
    SERVER_ERROR: f"requests got nothing but errors from the server: {AGAIN}",
    REFUSED_BY_SERVER: f"requests were refused by the server: {AGAIN}; if images are too large, set generate.max_pixels",
}


def describe_engine(config: Config, choice: EngineChoice) -> str:
    """Return where the model is: the addresses of its servers, or how it runs here."""
    return ", ".join(re.sub("//[^/@]*@", "//", url) for url in config.base_url) or {"vllm": "vLLM, started here"}.get(
        choice.name, "in this process"
    )


def describe_start(plan: Plan) -> str:
    """Return the opening line of a run: what is asked of which model, with which prompts, what people wrote, where it goes.

    Raises ConfigError or EngineError if texts are to be rated by a judge that cannot be asked: nothing is paid for before that.
    """
    config, choice, dataset = plan.config, plan.engine, plan.dataset
    assert choice is not None
    kept = "keeps the captions and questions that people wrote"
    if choice.model == NO_MODEL:
        return f"{config.source} to {dataset.path}: {kept}; asks no model"
    what = ", ".join(config.tasks) or "checks"
    asked = f"{what} of {public_name(choice.model)} ({describe_engine(config, choice)})"
    people = f"{kept}, and " if config.keeps_human_texts else ""
    missing = " what is missing:" if config.human_texts == "fill" else ""
    prompts = describe_prompts(plan.tasks.asked, config.generate.prompt_dir, config.generate.style_prompts)
    rated = ""
    if config.verify.judge:
        rated = f"; rated by {plan.choose_judge().model}"
    about_boxes = "".join(f"; note: {note}" for note in describe_boxes(config, choice.model))
    return f"{config.source} to {dataset.path}: {people}asks{missing} {asked}{rated}; prompts: {prompts}{about_boxes}"


def describe_boxes(config: Config, model: str) -> Iterator[str]:
    """Yield a note for each task whose boxes are read in another unit than the model is known to write."""
    family = find_family(model)
    for task in config.own_tasks if family else ():
        if task.kind == "boxes" and family and task.coordinates != family.boxes:
            yield (
                f"{family.name} writes boxes in {family.boxes}, and the task {task.name} reads them as {task.coordinates}: "
                "set its coordinates"
            )


def describe_warnings(steps: Sequence[Step], plan: Plan, version: Version, funnel: Sequence[StepSummary]) -> list[str]:
    """Return warnings about steps that rejected most rows, texts and splits of which none is left, and unanswered requests."""
    config = plan.config
    missing = describe_missing(steps, plan, version) if config.asks_model else ()
    return [
        *describe_title(version, config),
        *describe_losses(steps, funnel),
        *missing,
        *describe_empty_splits(version, config),
        *describe_unanswered(DatasetDir(version.dataset_dir), funnel),
    ]


def describe_title(version: Version, config: Config) -> Iterator[str]:
    """Yield a warning if the version of the same rows has another title than the settings."""
    title = version.manifest.get("title")
    if config.title and title != config.title:
        kept = f"the title {title}" if title else "a card without a title"
        yield f"{version.name} keeps {kept}: a title alone makes no version"


def describe_losses(steps: Sequence[Step], funnel: Sequence[StepSummary], shown: str = REPORTED) -> Iterator[str]:
    """Yield a warning for each step that rejected more than half of its rows: how many, why, and what to change.

    `shown` says where they are, if nothing is known that could be changed.
    """
    advice = {step.name: step.advice for step in steps}
    choices = {step.name for step in steps if step.is_choice}
    for summary in funnel:
        same, rejected = summary.rejected.get("same_as_the_best", 0), sum(summary.rejected.values())
        if 2 * same > rejected:
            text = f"{same:,} of {rejected:,} captions that were not taken are the same as the one that was"
            yield f"{text}: the server may pay no heed to sample_temperature, so that --samples gives nothing"
        if summary.step in choices:
            continue
        losses = {reason: count for reason, count in summary.rejected.items() if reason != REPEATED}  # its texts are kept
        lost, total = sum(losses.values()), summary.input - summary.rejected.get(REPEATED, 0)
        if 2 * lost > total:
            reason, count = max(losses.items(), key=lambda item: item[1])
            hint = advice.get(summary.step, {}).get(reason, shown)
            share = f"{lost:,} of {total:,} {summary.unit}"
            yield f"{summary.step} rejected {share}, {count:,} for {reason.replace('_', ' ')}: {hint}"


def describe_missing(steps: Sequence[Step], plan: Plan, version: Version) -> Iterator[str]:
    """Yield a warning for captions, and one for questions, that were asked for and of which none is left."""
    measured = version.manifest["measured"]
    config, pairs = plan.config, plan.requests.pairs
    missing: list[tuple[str, str]] = []
    if not measured.get("answers"):
        missing += [(name, "questions") for name in config.tasks if name in tasks_making("questions")]
    for name in tasks_making("captions").intersection(config.tasks):
        styles = {style for task, style in pairs if task == name}
        styles |= {HUMAN} if config.human_texts == "fill" else set()  # then a model is asked only where there is none by people
        if styles.isdisjoint(measured.get("captions", {})):
            missing.append((name, "captions"))
    if not missing:
        return
    advice = {step.name: step.advice for step in steps}
    rejections = read_table(version.path / REJECTIONS_FILE, ["step", "reason", "task"])  # which may be in an object store
    for task, name in missing:
        lost = rejections.filter(pc.equal(rejections["task"], task))
        reasons = Counter(zip(lost["step"].to_pylist(), lost["reason"].to_pylist(), strict=True))
        if reasons:
            (step, reason), count = reasons.most_common(1)[0]
            hint = advice.get(step, {}).get(reason, REPORTED)
            yield f"none of the {name} is left: {step} rejected {count:,} for {reason.replace('_', ' ')}: {hint}"


def describe_empty_splits(version: Version, config: Config) -> Iterator[str]:
    """Yield a warning for splits that were to have images and have none, in a version of enough images for each."""
    shares = {"train": 1.0, "validation": config.split.validation_frac, "test": config.split.test_frac}
    empty = [split for split, share in shares.items() if share and not version.manifest["rows"].get(split)]
    if empty and version.num_rows >= ENOUGH_ROWS:
        groups = ", or group them by less (--group-by)" if config.split.group_by else ""
        hint = f"where the source states no splits, try another --seed{groups}"
        yield f"no image is in the {' and the '.join(empty)} split, which `synth train` needs: {hint}"


def describe_unanswered(dataset: DatasetDir, funnel: Sequence[StepSummary]) -> Iterator[str]:
    """Yield a warning for requests that the server refused, or did not answer, with what it said of one of them."""
    rejected = next((summary.rejected for summary in funnel if summary.step == "validate"), {})
    for reason, what in _UNANSWERED.items():
        if count := rejected.get(reason):
            yield f"{count:,} {what}{_words_of_server(dataset, reason)}"


def _words_of_server(dataset: DatasetDir, reason: str) -> str:
    for path in dataset.step_files("validate", "rejected"):
        table = read_table(path, ["reason", "reply_text"])
        said = table.filter(pc.equal(table["reason"], reason))["reply_text"].drop_null()
        if len(said):
            return f'; it said "{one_line(said[0].as_py(), 200)}"'
    return ""
