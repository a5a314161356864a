"""A run: its stages in order, the checks before it begins, and the two ways to start one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, require_nameable
from pipeline.dataset.reviews import check_edits, format_reviews, merge_reviews, read_reviews, text_name
from pipeline.dataset.version import dataset_folder
from pipeline.errors import ConfigError, SynthError, did_you_mean
from pipeline.executors.base import ClusterOptions, RunResult
from pipeline.executors.local import reading_settings, run_locally
from pipeline.inference.requests import check_prompts
from pipeline.logs import log_to
from pipeline.progress import NullProgress, Progress
from pipeline.sources import open_source, with_source_defaults
from pipeline.stages import balance, dedupe, review, select, split, trim, validate, verify
from pipeline.stages import filter as filter_
from pipeline.stages.base import AllRows, Stage, step_order
from pipeline.stages.review import read_texts
from pipeline.storage.files import read_json, translate_disk_errors, write_text
from pipeline.storage.object_store import is_remote

STAGES = (
    validate.STAGE,
    filter_.STAGE,
    verify.STAGE,
    select.STAGE,
    dedupe.STAGE,
    balance.STAGE,
    trim.STAGE,
    split.STAGE,
    review.STAGE,
)
ORDER = step_order(STAGES)  # of a run that has all of them
FILTER_KEYS = ("min_words", "max_words")  # of an own task


def generate_dataset(
    config: Config,
    out: Path | None = None,
    from_stage: str | None = None,
    progress: Progress | None = None,
    cluster: ClusterOptions | None = None,
) -> RunResult:
    """Run all stages in order and return the version that comes out. Raises SynthError; finished work stays on the disk.

    `out` is the dataset folder, with a `cluster` also one in an object store; default `data/<source>`. With `from_stage`, the
    run starts at this stage from what the one before it left on the disk.
    """
    progress = progress or NullProgress()
    dataset = DatasetDir(out or dataset_folder(config.source))
    require_nameable(dataset.path)
    if is_remote(dataset.path) and cluster is None:
        hint = "pass a folder of this disk, or a cluster: --executor ray"
        raise ConfigError(f"a run in one process cannot write to {dataset.path}", hint=hint)
    config = with_source_defaults(config)
    stages = stages_of(config)
    start, order = from_stage or ORDER[0], step_order(stages)
    if start not in order:
        hint = f"{did_you_mean(start, order)} stages in order: {', '.join(order)}".strip()
        raise ConfigError(f"unknown stage: {start}", hint=hint)
    check_prompts(config)
    if config.balance.entries:
        balance.read_entries(config.balance.entries)
    with translate_disk_errors(dataset.path):
        refuse_other_settings(dataset, config, start)
    if cluster is not None:
        if config.images is not None:
            hint = "say how many images to read: --limit N"
            raise ConfigError("--images reads on until enough images are kept, which a cluster cannot", hint=hint)
        from pipeline.executors.ray.executor import run_on_cluster

        return run_on_cluster(config, DatasetDir(dataset.path.absolute()), stages, cluster, progress)
    source = open_source(reading_settings(config)) if start == "source" else None
    for text in source.messages if source else ():
        progress.message(text)
    with translate_disk_errors(dataset.path), dataset.lock(), log_to(dataset.path):
        return run_locally(config, dataset, stages, start, source, progress)


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Return the stages between generate and version that a run with these settings has, in order."""
    return tuple(stage for stage in STAGES if stage.is_wanted(config))


def apply_reviews(dataset: DatasetDir, files: Sequence[Path], progress: Progress | None = None) -> RunResult:
    """Add files of reviews to those of a dataset folder, and make the version that follows from them.

    Raises ConfigError, and changes nothing, if a file holds no reviews, an edit cannot be used, or no review is about this
    dataset; else see `generate_dataset`.
    """
    progress = progress or NullProgress()
    with translate_disk_errors(dataset.path):
        config = _settings_of(dataset)
        new = [(review, path) for path in files for review in read_reviews(path)]
        if not new:
            raise ConfigError(
                f"no review in {', '.join(map(str, files))}", hint="review texts in a report, then export the reviews"
            )
        with dataset.lock() as check:
            paths = dataset.stage_files("split")
            if not dataset.stage("split").exists() and not dataset.finished.exists():
                raise ConfigError(f"{dataset.path} has no finished run to review", hint="run `synth generate` in it first")
            before = read_reviews(dataset.reviews) if dataset.reviews.exists() else []
            samples = {review.sample_id for review in [*before, *(review for review, _ in new)]}
            rows = {text_name(row): row for row in read_texts(AllRows(paths), samples, "sample_id")}
            known = {*rows, *(review.resulting_name for review in before)}
            if not any(review.name in known for review, _ in new):
                raise ConfigError(
                    f"none of the {len(new)} reviews matches a text of {dataset.path}",
                    hint="name the dataset folder that the report was made of; its texts may be those of an older version",
                )
            merged = merge_reviews(before, [review for review, _ in new], rows)
            for name, flaw in check_edits(merged, rows, config.own_tasks).items():
                review, from_file = merged[name], {review.resulting_name: path for review, path in new}
                text = f"{review.question} {review.answer}" if review.text is None else review.text
                path = from_file.get(review.resulting_name, dataset.reviews)
                raise ConfigError(f"{path}: the edited text {text[:80]!r} cannot be used: {flaw}", hint="edit it again")
            write_text(dataset.reviews, format_reviews(merged.values()))
            try:
                if dataset.stage("split").exists():
                    with log_to(dataset.path):
                        return run_locally(config, dataset, stages_of(config), "review", None, progress)
                from pipeline.executors.ray.executor import review_on_cluster

                return review_on_cluster(config, DatasetDir(dataset.path.absolute()), stages_of(config), progress, check)
            except SynthError:
                write_text(dataset.reviews, format_reviews(before))
                raise


def refuse_other_settings(dataset: DatasetDir, config: Config, start: str) -> None:
    """Raise ConfigError for another source in the same folder, or, with --from-stage, settings that an earlier stage lacked."""
    if not dataset.run_file.exists():
        return
    now, before = config.recorded(), dataset.settings()
    if not isinstance(before, dict) or not before.keys() >= now.keys():
        raise ConfigError(f"{dataset.run_file} is not a run of synth", hint="choose another folder: --out DIR")
    source = str(before["source"])
    if not _is_same_source(source, config.source):
        hint = f"choose another folder (--out DIR); if it is the same, name it as before: --source {source}"
        raise ConfigError(f"{dataset.path} holds data from {source}, not {config.source}", hint=hint)
    later = ORDER[ORDER.index(start) :]
    free = {"base_url", "engine", "server", *later}  # sections of stages that run now may have changed
    free |= {"images"} if "trim" in later else set()
    if start in ORDER[ORDER.index("filter") :]:
        now["own_tasks"], before["own_tasks"] = (_without_bounds(settings["own_tasks"]) for settings in (now, before))
    changed = [name for name in now if start != ORDER[0] and name not in free and now[name] != before[name]]
    if changed:
        raise ConfigError(f"{changed[0]} has changed since the stages before {start} ran", hint="run without --from-stage")


def _is_same_source(one: str, other: str) -> bool:
    """Return whether two names mean one source: a path may be spelled in several ways."""
    (kind, _, path), (other_kind, _, other_path) = one.partition(":"), other.partition(":")
    is_local = bool(path and other_path) and "://" not in path + other_path
    return one == other or (
        kind == other_kind and is_local and Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()
    )


def _without_bounds(own_tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return own tasks without what the stage filter judges their texts by."""
    return [{name: value for name, value in task.items() if name not in FILTER_KEYS} for task in own_tasks]


def _settings_of(dataset: DatasetDir) -> Config:
    """Return the settings of the last run in a dataset folder."""
    if not dataset.run_file.exists():
        raise ConfigError(f"{dataset.path} is not a folder that synth generate has written", hint="name one: --data DIR")
    try:
        return Config.model_validate(read_json(dataset.run_file))
    except (ValidationError, ValueError):
        raise ConfigError(f"{dataset.run_file} is not a run of synth", hint="choose another folder: --out DIR") from None
