"""The plan of a run: the settings with all names resolved.

`Config` is what the user wrote. `Plan` is what the run uses: the source, the tasks with their prompts, the
model and its revision, and how images are compared. `Plan.open` makes every check that can fail before
anything is written. A run, `preview` and `--estimate` share it. No later code resolves a name.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, require_utf8_path
from pipeline.dataset.records import read_record
from pipeline.dataset.version import dataset_folder
from pipeline.digests import public_name
from pipeline.errors import ConfigError, EngineError
from pipeline.inference.engines import EngineChoice, choose_engine, choose_judge
from pipeline.inference.requests import RequestPlan, check_prompts
from pipeline.inference.verification import check_conditions
from pipeline.progress import Progress
from pipeline.sources import find_source, holds_decks, open_source, with_source_defaults
from pipeline.sources.base import SourceSpec
from pipeline.sources.source_files import skip_digests
from pipeline.storage.files import translate_disk_errors
from pipeline.storage.object_store import is_remote
from pipeline.tasks import Tasks
from pipeline.types import Engine, Source

# The image limit of an endless source, such as drawn scenes.
ENDLESS = 1 << 31
MODEL_SETTINGS = ("model", "base_url", "engine")


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know. Pickling leaves out the open source and the engines.

    `config` includes the defaults of the source. With `has_decks`, samples are documents of several pages.
    `model` is the publishable name of the model.
    """

    config: Config
    dataset: DatasetDir
    spec: SourceSpec
    tasks: Tasks
    requests: RequestPlan
    has_decks: bool
    model: str = ""
    judge_revision: str = ""
    source: Source | None = None
    engine: EngineChoice | None = None
    judge: EngineChoice | None = None

    @classmethod
    def resolve(
        cls,
        config: Config,
        dataset: DatasetDir,
        model: str = "",
        revision: str = "",
        judge_revision: str = "",
    ) -> "Plan":
        """Resolve all names in the settings without access to the source or a server."""
        config = with_source_defaults(config)
        tasks = Tasks(config.tasks, config.custom_tasks)
        return cls(
            config=config,
            dataset=dataset,
            spec=find_source(config.source),
            tasks=tasks,
            requests=RequestPlan.of(config, tasks, revision),
            has_decks=holds_decks(config),
            model=model,
            judge_revision=judge_revision,
        )

    @classmethod
    def open(
        cls,
        config: Config,
        out: Path | None,
        progress: Progress,
        *,
        is_trial: bool = False,
        in_cluster: bool = False,
    ) -> "Plan":
        """Resolve the settings, open the source and choose the model. Raises SynthError if any of this fails.

        `out` is the dataset folder, by default `data/SOURCE`. Only a cluster can write to an object store.
        A trial does not hash the source files.
        """
        dataset = DatasetDir(out or dataset_folder(config.source))
        require_utf8_path(dataset.path)
        if is_remote(dataset.path) and not in_cluster:
            hint = "pass a local folder, or --executor ray without --estimate"
            raise ConfigError(f"only --executor ray can write to {out}", hint=hint)
        if in_cluster and config.images is not None:
            hint = "set how many images to read instead: --limit N"
            raise ConfigError("--images is not supported by --executor ray", hint=hint)
        plan = cls.resolve(config, dataset)
        check_prompts(plan.requests, has_checks=plan.config.verify.is_asked)
        check_conditions(plan.config.verify, plan.requests)
        with translate_disk_errors(dataset.path):
            refuse_other_source(dataset, plan.config)
            # Report a damaged version now, not at the end of the run.
            dataset.versions()
        digests: AbstractContextManager[None] = skip_digests() if is_trial else nullcontext()
        with digests:
            source = open_source(reading_settings(plan))
        for text in source.messages:
            progress.message(text)
        engine = _choose_engine(plan.config, dataset, progress)
        requests = replace(plan.requests, revision=engine.revision)
        model = public_name(engine.model)
        plan = replace(plan, source=source, engine=engine, model=model, requests=requests)
        if plan.needs_clip:
            from pipeline.images.clip import require_clip

            require_clip(plan.clip_model)
        if plan.config.verify.judge:
            judge = plan.choose_judge(progress)
            plan = replace(plan, judge=judge, judge_revision=judge.revision)
        return plan

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.resolve, (
            self.config,
            self.dataset,
            self.model,
            self.requests.revision,
            self.judge_revision,
        )

    @property
    def clip_model(self) -> str:
        """The name of the CLIP model that compares captions with images."""
        name = self.config.verify.clip_model
        return self.spec.clip_model if name == "auto" else name

    @property
    def needs_clip(self) -> bool:
        """Whether captions are compared with their images."""
        return "alignment" in self.config.verify.checks and not self.has_decks

    def choose_judge(self, progress: Progress | None = None) -> EngineChoice:
        """Return the judge. Raises ConfigError or EngineError if it is missing or is the captioning model."""
        if self.judge is not None:
            return self.judge
        return choose_judge(self.config, self.requests.revision, progress, self.model or None)


def _choose_engine(config: Config, dataset: DatasetDir, progress: Progress) -> EngineChoice:
    """Choose the engine. If its server does not answer, use the model of the last run in this folder.

    A run with only new thresholds or splits needs no reply. Otherwise the first request raises the error.
    """
    try:
        return choose_engine(config, dataset.server_log, progress)
    except EngineError as error:
        model = read_record(dataset, "ask").get("model")
        if not (model and config.base_url and dataset.run_file.exists()) or config.server.flags:
            raise
        if any(config.recorded()[name] != dataset.settings()[name] for name in MODEL_SETTINGS):
            raise
        problem = error

    def fail() -> Engine:
        raise problem

    progress.warn(f"{problem}: continuing with the stored replies; stops at the first new request")
    return EngineChoice("vllm", model["name"], model["revision"], "the model of the last run", fail)


def reading_settings(plan: Plan) -> Config:
    """Return the settings for opening the source. With `--images N`, the source may be read to its end."""
    if plan.config.images is None:
        return plan.config
    return plan.config.model_copy(update={"limit": ENDLESS if plan.spec.is_endless else None})


def refuse_other_source(dataset: DatasetDir, config: Config) -> None:
    """Raise ConfigError if a dataset folder holds data from a different source."""
    if not dataset.run_file.exists():
        return
    try:
        recorded = dataset.settings()
    except ValueError:
        recorded = {}
    if not isinstance(recorded, dict) or not recorded.keys() >= config.recorded().keys():
        raise ConfigError(
            f"{dataset.run_file} was not written by synth", hint="use another folder: --out DIR"
        )
    source = str(recorded["source"])
    if _source_place(source) != _source_place(config.source):
        hint = f"choose another --out DIR; if it is the same source, pass it as before: --source {source}"
        raise ConfigError(f"{dataset.path} has data from {source}, not from {config.source}", hint=hint)


def _source_place(source: str) -> tuple[str, str | Path]:
    """Return the kind and place of a source, such as ("folder", path). Local paths are resolved."""
    kind, _, place = source.partition(":")
    return kind, place if not place or "://" in place else Path(place).expanduser().resolve()
