"""The plan of a run: everything that its settings name, resolved once.

`Config` is what a user wrote. `Plan` is what will be done: the source, the tasks with their prompts, the model and its
revision, how images are compared. `Plan.open` makes every check that can fail before anything is written; `run`, `preview`
and the forecast of `--dry-run` share it. After that, no function looks a name up in the settings.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, require_nameable
from pipeline.dataset.records import read_record
from pipeline.dataset.version import dataset_folder
from pipeline.digests import public_name
from pipeline.errors import ConfigError, EngineError
from pipeline.images.near_duplicates import ImageKind
from pipeline.inference.engines import EngineChoice, choose_engine, choose_judge
from pipeline.inference.requests import RequestPlan, check_prompts
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source, holds_decks, open_source, with_source_defaults
from pipeline.sources.base import SourceSpec
from pipeline.sources.source_files import skip_digests
from pipeline.storage.files import translate_disk_errors
from pipeline.tasks import Tasks
from pipeline.types import Engine, Source

ENDLESS = 1 << 31  # the limit of a source without an end, such as drawn scenes


@dataclass(frozen=True)
class Plan:
    """What a run will do. It is pickled without the open source and engine, which workers open themselves."""

    config: Config  # as the user wrote it, with the defaults of the source
    dataset: DatasetDir  # of the whole run, whose folder may hold several shards
    spec: SourceSpec
    tasks: Tasks
    requests: RequestPlan
    image_kind: ImageKind | None  # how images are compared; None: they are known to be distinct
    has_decks: bool  # the samples are documents of several pages
    model: str = ""  # the publishable name of the model that writes
    judge_revision: str = ""  # of the model that rates; empty if there is none
    source: Source | None = None
    engine: EngineChoice | None = None
    judge: EngineChoice | None = None

    @classmethod
    def resolve(
        cls, config: Config, dataset: DatasetDir, model: str = "", revision: str = "", judge_revision: str = ""
    ) -> "Plan":
        """Resolve all names in the settings of a run. Neither the source nor a server is asked anything."""
        config = with_source_defaults(config)
        tasks = Tasks(config.tasks, config.own_tasks)
        return cls(
            config=config,
            dataset=dataset,
            spec=find_source(config.source),
            tasks=tasks,
            requests=RequestPlan.of(config, tasks, revision),
            image_kind=choose_image_kind(config),
            has_decks=holds_decks(config),
            model=model,
            judge_revision=judge_revision,
        )

    @classmethod
    def open(cls, config: Config, out: Path | None, progress: Progress, *, is_trial: bool = False) -> "Plan":
        """Resolve the settings, open the source and choose the model. Raises SynthError for all that cannot work.

        `out` is the dataset folder, `data/SOURCE` by default. For a trial of a few images, the source is opened without
        digests of its files.
        """
        dataset = DatasetDir(out or dataset_folder(config.source))
        require_nameable(dataset.path)
        plan = cls.resolve(config, dataset)
        check_prompts(plan.requests, has_checks=plan.config.verify.is_asked)
        with translate_disk_errors(dataset.path):
            refuse_other_source(dataset, plan.config)
            dataset.versions()  # one that is damaged is an error at the end, too
        quick: AbstractContextManager[None] = skip_digests() if is_trial else nullcontext()
        with quick:
            source = open_source(reading_settings(plan))
        for text in source.messages:
            progress.message(text)
        engine = _choose_engine(plan.config, dataset, progress)
        plan = replace(plan, source=source).with_engine(engine)
        plan.require_scorer()
        if plan.config.verify.judge:
            judge = plan.choose_judge(progress)
            plan = replace(plan, judge=judge, judge_revision=judge.revision)
        return plan

    def with_engine(self, engine: EngineChoice) -> "Plan":
        """Return the plan with a chosen engine."""
        requests = replace(self.requests, revision=engine.revision)
        return replace(self, engine=engine, model=public_name(engine.model), requests=requests)

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.resolve, (self.config, self.dataset, self.model, self.requests.revision, self.judge_revision)

    @property
    def clip_model(self) -> str:
        """The CLIP by which captions are compared with images."""
        name = self.config.verify.clip_model
        return self.spec.clip_model if name == "auto" else name

    @property
    def needs_clip(self) -> bool:
        """Whether captions are compared with their images."""
        return "alignment" in self.config.verify.checks and not self.has_decks

    def require_scorer(self) -> None:
        """Raise EngineError if the checks need a CLIP that is not available: requests may take days, so this comes first."""
        if self.needs_clip:
            from pipeline.images.clip import require_clip

            require_clip(self.clip_model)

    def choose_judge(self, progress: Progress | None = None) -> EngineChoice:
        """Choose the judge. Raises ConfigError or EngineError if it cannot be asked, or is the model that writes."""
        if self.judge is not None:
            return self.judge
        return choose_judge(self.config, self.requests.revision, progress, self.model or None)


def _choose_engine(config: Config, dataset: DatasetDir, progress: Progress) -> EngineChoice:
    """Choose the engine; that of the last run in this folder if its server does not answer.

    Other thresholds, splits or exports need no reply, and so no server. If a request must be sent, the error is raised then.
    """
    try:
        return choose_engine(config, dataset.server_log, progress)
    except EngineError as error:
        model = read_record(dataset, "ask").get("model")
        if not (model and config.base_url and dataset.run_file.exists()) or config.server.flags:
            raise
        if any(config.recorded()[name] != dataset.settings()[name] for name in ("model", "base_url", "engine")):
            raise
        problem = error

    def fail() -> Engine:
        raise problem

    progress.warn(f"{problem}: the run goes on as long as it needs no reply")
    return EngineChoice("vllm", model["name"], model["revision"], "the model of the last run", fail)


def reading_settings(plan: Plan) -> Config:
    """Return the settings with which the source is opened: with `--images N` it may be read to its end."""
    if plan.config.images is None:
        return plan.config
    return plan.config.model_copy(update={"limit": ENDLESS if plan.spec.is_endless else None})


def refuse_other_source(dataset: DatasetDir, config: Config) -> None:
    """Raise ConfigError if a dataset folder holds data from another source."""
    if not dataset.run_file.exists():
        return
    try:
        before = dataset.settings()
    except ValueError:
        before = {}
    if not isinstance(before, dict) or not before.keys() >= config.recorded().keys():
        raise ConfigError(f"{dataset.run_file} is not a run of synth", hint="choose another folder: --out DIR")
    source = str(before["source"])
    if not _is_same_source(source, config.source):
        hint = f"choose another folder (--out DIR); if it is the same, name it as before: --source {source}"
        raise ConfigError(f"{dataset.path} holds data from {source}, not {config.source}", hint=hint)


def _is_same_source(one: str, other: str) -> bool:
    """Return whether two names stand for the same source: a path may be written in several ways."""
    (kind, _, path), (other_kind, _, other_path) = one.partition(":"), other.partition(":")
    is_local = bool(path and other_path) and "://" not in path + other_path
    return one == other or (
        kind == other_kind and is_local and Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()
    )
