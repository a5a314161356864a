"""The plan of a run: the settings with all names resolved.

`Config` holds the user's settings. `Plan` holds the values of the run: the source, the tasks with their
prompts, the model and its revision, and how images are compared. `Plan.open` makes every check that can fail
before anything is written. A run, `preview` and `estimate` all call it. No later code resolves a name.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import NO_MODEL, Config, expand_user
from pipeline.dataset.directory import DatasetDir, require_utf8_path
from pipeline.dataset.manifest import asked_tasks
from pipeline.dataset.records import DONE, PREPARED, read_record
from pipeline.dataset.version import dataset_folder
from pipeline.digests import digest, public_name
from pipeline.errors import ConfigError, EngineError
from pipeline.images.decode import PATCH_PX
from pipeline.inference.engines import EngineChoice, box_unit_of, choose_engine, pick_engine
from pipeline.inference.model_licenses import license_of
from pipeline.inference.request_checks import check_requests
from pipeline.inference.requests import RequestPlan
from pipeline.inference.vllm import require_vllm
from pipeline.progress import Progress
from pipeline.sources import find_source, open_source, with_source_defaults
from pipeline.sources.base import SourceSpec
from pipeline.sources.source_files import skip_digests
from pipeline.storage.files import read_json, translate_disk_errors
from pipeline.storage.object_store import is_remote
from pipeline.tasks import Tasks
from pipeline.tasks.base import MAX_QA_PAIRS
from pipeline.tasks.checks import MAX_CLAIMS, PHRASINGS, REPAIR
from pipeline.types import DEFAULT_MODEL, Engine, Source


class Model(NamedTuple):
    """A model of a run: its publishable name and its revision."""

    name: str
    revision: str


@dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know. Pickling leaves out the opened source and the engines.

    `config` includes the source's defaults. The keys of `models` and `engines` are names in the settings.
    """

    config: Config
    dataset: DatasetDir
    spec: SourceSpec
    tasks: Tasks
    requests: RequestPlan
    models: Mapping[str, Model] = field(default_factory=dict)
    source: Source | None = None
    engines: Mapping[str, EngineChoice] = field(default_factory=dict)

    @classmethod
    def resolve(
        cls, config: Config, dataset: DatasetDir, models: Mapping[str, Model] | None = None
    ) -> "Plan":
        """Resolve all names in the settings without access to the source or a server."""
        config = with_source_defaults(config)
        spec, tasks = find_source(config.source), Tasks(config.tasks, config.custom_tasks)
        revisions = {name: model.revision for name, model in (models or {}).items()}
        requests = RequestPlan.of(config, tasks, revisions)
        return cls(config, dataset, spec, tasks, requests, models or {})

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
        """Resolve the settings, open the source and choose the models. Report the plan on one line.

        `out` is the dataset folder, by default `data/SOURCE`. It can be in an object store only if
        `in_cluster` is True. With `is_trial`, the source files are not hashed. Raises SynthError on failure.
        """
        dataset = DatasetDir(out or dataset_folder(config.source))
        require_utf8_path(dataset.path)
        if is_remote(dataset.path) and not in_cluster:
            hint = "pass a local folder, or use --executor ray"
            raise ConfigError(f"only --executor ray can write to {out}", hint=hint)
        plan = cls.resolve(config, dataset)
        check_requests(plan.requests, plan.config.verify)
        with translate_disk_errors(dataset.path):
            refuse_other_source(dataset, plan.config)
            # Report a damaged version now, not at the end of the run.
            dataset.versions()
        with translate_disk_errors(dataset.path), skip_digests() if is_trial else nullcontext():
            source = open_source(plan.config)
        for text in source.messages:
            progress.message(text)
        names = plan.model_names
        engines = {name: _choose_engine(plan, name, progress, in_cluster=in_cluster) for name in names}
        models = {name: Model(public_name(one.model), one.revision) for name, one in engines.items()}
        plan = replace(cls.resolve(plan.config, dataset, models), source=source, engines=engines)
        plan.refuse_equal_models()
        if plan.needs_clip:
            from pipeline.images.clip import require_clip

            require_clip(plan.clip_model)
        progress.message(describe_start(plan))
        return plan

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.resolve, (self.config, self.dataset, self.models)

    @property
    def task_models(self) -> tuple[str, ...]:
        """The names of the models that tasks use, without the models of checks."""
        names = (name for task in self.tasks.asked for name in self.requests.models_of(task.name))
        return tuple(dict.fromkeys(names))

    @property
    def writers(self) -> tuple[str, ...]:
        """The names of the models that write or repair texts. The first one is the main model of the run."""
        repair = self.requests.models_of(REPAIR.name) if self.config.verify.repair else ()
        return tuple(dict.fromkeys((*(self.task_models or (self.requests.default_model,)), *repair)))

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the models of the run. The models that write texts come first."""
        asked = asked_tasks(self.config, self.tasks)
        names = (name for task in asked for name in self.requests.models_of(task.name))
        return tuple(dict.fromkeys((*self.writers, *names)))

    @property
    def engine(self) -> EngineChoice:
        """The engine of the main model."""
        return self.engines[self.writers[0]]

    def describe_models(self) -> dict[str, dict[str, str]]:
        """Return the name, revision and license of each model for the manifest."""
        return {
            name: model._asdict() | ({"license": license_of(model.name)} if model.name != NO_MODEL else {})
            for name, model in self.models.items()
        }

    def record_models(self) -> dict[str, Any]:
        """Return the models with digests of their settings, for the record of a step."""
        settings = {name: _settings_digest(self.config.of_model(name)) for name in self.models}
        return {"models": self.describe_models(), "model_settings": settings}

    def refuse_equal_models(self) -> None:
        """Raise ConfigError if a task has the same model twice, or if the judge also writes texts."""
        for task in self.tasks.asked:
            names = self.requests.models_of(task.name)
            if len({self.models[name].revision for name in names}) < len(names):
                problem = f"two models of the task {task.name} are the same: {', '.join(names)}"
                raise ConfigError(problem, hint="leave out all but one of the equal models in `task_models`")
        if self.config.judge_model is None:
            return
        judge = self.models[self.config.judge_model]
        for writer in map(self.models.__getitem__, self.writers):
            if judge.revision == writer.revision or _base_name(judge.name) == _base_name(writer.name):
                problem = f"the judge {judge.name} also writes the texts, and rates its own texts too high"
                raise ConfigError(problem, hint="pass another model")

    @property
    def clip_model(self) -> str:
        """The name of the CLIP model that compares captions with images."""
        name = self.config.verify.clip_model
        return self.spec.clip_model if name == "auto" else name

    @property
    def needs_clip(self) -> bool:
        """Whether captions are compared with their images."""
        return "alignment" in self.config.verify.checks and not self.requests.has_decks


def _base_name(model: str) -> str:
    """Return a model's name without its folder or organization, and without its revision."""
    return model.partition("@")[0].rpartition("/")[2]


def _settings_digest(config: Config) -> str:
    """Return a digest of the settings that choose a model."""
    return digest([config.model, config.base_url, config.engine, config.server.flags])


def _choose_engine(plan: Plan, name: str, progress: Progress, *, in_cluster: bool) -> EngineChoice:
    """Choose the engine for a model. If none is available, use the replies stored by the last run.

    The last run must have had the same model settings. At a new request, the original error is raised.
    """
    config = plan.config.of_model(name)
    log = plan.dataset.path / ("vllm.log" if name == DEFAULT_MODEL else f"vllm-{name}.log")
    last = ("ask", DONE) if name in plan.task_models else ("verify", PREPARED)
    record = read_record(plan.dataset, *last)
    has_replies = record.get("model_settings", {}).get(name) == _settings_digest(config)
    try:
        # Without stored replies, the run needs vLLM. Check this before `choose_engine` contacts the Hub.
        starts_server = config.asks_model and not config.base_url and pick_engine(config)[0] == "vllm"
        if starts_server and not (has_replies or in_cluster):
            require_vllm()
        return choose_engine(config, plan.requests, log, progress)
    except EngineError as error:
        if not has_replies:
            raise
        model, problem = record["models"][name], error

    def fail() -> Engine:
        raise problem

    progress.warn(f"{problem}: the run uses the stored replies, and stops at the first new request")
    return EngineChoice("vllm", model["name"], model["revision"], fail, config.base_url)


def refuse_other_source(dataset: DatasetDir, config: Config) -> None:
    """Raise ConfigError if a dataset folder holds data from a different source."""
    if not dataset.run_file.exists():
        return
    try:
        source = read_json(dataset.run_file)["source"]
        is_same = _source_place(source) == _source_place(config.source)
    except (ValueError, LookupError, TypeError, AttributeError):
        hint = "use another folder: --out DIR"
        raise ConfigError(f"{dataset.run_file} was not written by synth", hint=hint) from None
    if not is_same:
        hint = f"choose another --out DIR, or, if the two sources are the same, pass --source {source}"
        raise ConfigError(f"{dataset.path} has data from {source}, not from {config.source}", hint=hint)


def _source_place(source: str) -> tuple[str, str | Path]:
    """Return the kind and place of a source, such as ("folder", path). Local paths are resolved."""
    kind, _, place = source.partition(":")
    return kind, place if not place or "://" in place else expand_user(place).resolve()


# --- the opening line of a run


def describe_engine(plan: Plan) -> str:
    """Return the main model's engine or server URLs, its license, and the maximum size of images."""
    engine, bound = plan.engine, plan.requests.largest_pixels
    place = "vLLM, started here" if engine.name == "vllm" else "in this process"
    if engine.urls:
        place = ", ".join(engine.urls)
    tokens = f"; images: at most {bound:,} px, about {bound // PATCH_PX**2:,} tokens" if bound else ""
    return f"{place}; {license_of(plan.models[plan.writers[0]].name)}{tokens}"


def describe_start(plan: Plan) -> str:
    """Return the opening line of a run: source, folder, tasks, models, prompts and requests per image."""
    config = plan.config
    start, kept = f"{config.source} to {plan.dataset.path}", "keeps human captions and questions"
    if not config.asks_model:
        return f"{start}: {kept}; uses no model"
    main = plan.writers[0]
    asked = f"{_tasks_of(plan, main)} ({describe_engine(plan)})"
    human = f"{kept}, and " if config.keeps_human_texts else ""
    missing = " for missing texts:" if config.human_texts == "fill" else ""
    prompts = f"; prompts: {folder}" if (folder := config.generate.prompt_dir) else ""
    others = [name for name in plan.model_names if name not in (main, config.judge_model)]
    more = "".join(f"; {_tasks_of(plan, name)} ({license_of(plan.models[name].name)})" for name in others)
    rated = f"; rated by {plan.models[config.judge_model].name}" if config.judge_model else ""
    notes = "".join(f"; note: {note}" for note in describe_boxes(plan))
    asked += f"{more}{rated}{prompts}{describe_requests(plan)}{notes}"
    return f"{start}: {human}requests{missing} {asked}"


def _tasks_of(plan: Plan, name: str) -> str:
    tasks = (task.name for task in plan.tasks.asked if name in plan.requests.models_of(task.name))
    return f"{', '.join(tasks) or 'checks'} from {plan.models[name].name}"


def describe_requests(plan: Plan) -> str:
    """Return the number of requests per image, and the maximum number of requests that check its texts."""
    requests, verify = plan.requests, plan.config.verify
    if not requests.pairs:
        return ""
    asked = [(plan.tasks[name], requests.count_replies(plan.tasks[name])) for name, _ in requests.pairs]
    captions = sum(replies for task, replies in asked if task.text_field)
    questions = sum(MAX_QA_PAIRS for task, _ in asked if task.rows_field == "qa")
    per_caption = {"claims": 1 + len(PHRASINGS) * MAX_CLAIMS, "covers": questions}
    per_question = {"round_trip": 1, "blind": 1, "evidence": 1}
    checks = sum(
        captions * per_caption.get(check, 0) + questions * per_question.get(check, 0)
        for check in verify.checks
    )
    checks += captions * verify.repair + (captions + questions) * bool(verify.judge)
    unit = "deck" if requests.has_decks else "image"
    more = f", and up to {checks:,} to check the texts (`synth estimate` counts them)" if checks else ""
    count = requests.count(requests.pairs)
    return f"; {count:,} request{'s' if count > 1 else ''} per {unit}{more}"


def describe_boxes(plan: Plan) -> Iterator[str]:
    """Yield a note for each model that writes boxes in a different unit than its task expects."""
    for task in plan.config.custom_tasks:
        for name in plan.requests.models_of(task.name) if task.kind == "boxes" else ():
            model = plan.models[name].name
            unit = box_unit_of(model)
            if unit not in (None, task.coordinates):
                expected = f"but the task {task.name} expects {task.coordinates}: set its `coordinates`"
                yield f"{model} writes boxes in {unit}, {expected}"
