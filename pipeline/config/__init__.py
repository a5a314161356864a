"""Settings of a run: options override a `--config` file, which overrides defaults."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.sections import (
    AT_SERVER,
    LICENSE,
    TITLE,
    BalanceConfig,
    BaseUrl,
    DedupeConfig,
    Distinct,
    EngineName,
    FilterConfig,
    GenerateConfig,
    ImageFilterConfig,
    Ladder,
    ModelConfig,
    ModelName,
    Section,
    SelectConfig,
    ServerConfig,
    SplitConfig,
    Task,
    TaskConfig,
    VerifyConfig,
    address_of,
    task_names,
)
from pipeline.types import DEFAULT_MODEL

CONTEXT = "context"
SCENES, DECKS = "scenes", "scenes-deck"
TINY = "tiny"
LARGE = "Qwen/Qwen2.5-VL-3B-Instruct"
SCENE_PROMPTS = Path(__file__).parents[1] / "scenes" / "prompts"  # the tiny model was trained on this wording
NO_MODEL = "none"
JUDGE_MODEL = "judge"
NO_TASKS = "none"
HUMAN_STYLE = "human"
# How human texts in the source are used. `compare`: as references for the model's texts. `keep`: also as
# annotations. `fill`: the same as `keep`, but the model writes only missing annotations.
HumanTexts = Literal["compare", "keep", "fill"]


def _require_utf8(source: str) -> str:
    try:
        source.encode()
    except UnicodeEncodeError:
        raise ValueError("the path is not UTF-8: rename it") from None
    return source


def expand_user(path: str | Path) -> Path:
    """Replace `~` by the home folder. A name such as `~draft`, which is not the name of a user, is kept."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser() raises RuntimeError


class Config(Section):
    """Everything that decides the content of a dataset. Saved as `run.json`."""

    source: Annotated[str, AfterValidator(_require_utf8)]
    """Source of the images. `synth doctor --sources` lists all sources."""
    source_split: Literal["train", "validation", "test"] | None = None
    """Split of the source to read: `train`, `validation` or `test`. Null reads all splits."""
    license: Annotated[str, Field(pattern=LICENSE, max_length=100)] | None = None
    """License of your own images, such as `cc-by-4.0`. Without it, a dataset of a local source is pushed as
    private.
    """
    title: Annotated[str, Field(pattern=TITLE, min_length=1, max_length=200)] | None = None
    """Title of the dataset card. Null uses the name of the folder or source."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Roles of columns: `image`, `pages`, `references`, `question`, `answer`, `split`, and `context` for
    columns that prompts use. `question=none` and `split=none` ignore columns of these names. Null guesses
    by name.
    """
    drop_context: bool = False
    """Use the columns of `context` in prompts only, and do not store them in versions."""
    follow_links: bool = False
    """Follow links in the folder to files outside of it. These files are published with the dataset."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Stop after reading this many images. Null reads all images (`scenes`: 1000)."""
    frame_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds between two frames of a video. Null uses 5."""
    seed: int = 0
    """Seed of drawn scenes, sampled replies, balancing and splits."""
    exclude: Distinct[Annotated[str, Field(min_length=1)]] = ()
    """Sources whose images and near-duplicates are rejected, such as `flickr30k#test`."""
    captions: Distinct[Annotated[Path, AfterValidator(expand_user)]] = ()
    """Files with human captions or questions about the images of a folder: COCO, Karpathy, JSON, JSON lines
    or CSV, also compressed (`.gz`).
    """
    human_texts: HumanTexts = "compare"
    """Use of human texts: `compare` stores them as references, `keep` also makes them annotations, `fill`
    asks the model only for missing texts.
    """
    tasks: Distinct[Task] = ("caption", "qa")
    """Tasks to ask the model. Null uses `caption` and `qa`, `deck_qa` for decks, and no built-in task if
    there are custom tasks. `none` asks no model.
    """
    custom_tasks: tuple[TaskConfig, ...] = ()
    """Custom tasks, each as the path of its file or as its keys and values."""
    engine: EngineName = "auto"
    """`vllm` uses a server, `embedded` runs the tiny model in this process. `auto` uses vLLM if it finds a
    GPU and vLLM.
    """
    model: str | None = None
    """A folder, a Hub id, a name that the server offers, a name in `models`, or `tiny`. Null chooses by
    source and engine.
    """
    base_url: Distinct[BaseUrl] = ()
    """URLs of running servers. A URL without a path gets `/v1`."""
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    """Further models by name, each with `model`, `base_url`, `engine`, `key_env`, `headers`, `flags`,
    `concurrency`, `price_in` and `price_out`.
    """
    task_models: dict[Task, Ladder] = Field(default_factory=dict)
    """The model of each task, `checks` and `repair`: a name in `models`, or `default`. A list is a ladder:
    the next model is asked for the texts that the previous model failed to write.
    """
    generate: GenerateConfig = GenerateConfig()
    server: ServerConfig = ServerConfig()
    image_filter: ImageFilterConfig = ImageFilterConfig()
    filter: FilterConfig = FilterConfig()
    verify: VerifyConfig = VerifyConfig()
    select: SelectConfig = SelectConfig()
    dedupe: DedupeConfig = DedupeConfig()
    balance: BalanceConfig = BalanceConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="before")
    @classmethod
    def _complete_tasks(cls, values: Any) -> Any:
        """Add the custom tasks to `tasks`. `tasks: none` means no tasks, and keeps human texts by default."""
        if not isinstance(values, dict):
            return values
        if values.get("tasks") in (NO_TASKS, [NO_TASKS], (NO_TASKS,)):
            values = {"human_texts": "keep"} | values | {"tasks": []}
        tasks, custom_tasks = values.get("tasks") or (), values.get("custom_tasks")
        if isinstance(custom_tasks, list | tuple) and isinstance(tasks, list | tuple):
            names = dict.fromkeys(name for name in task_names(custom_tasks) if isinstance(name, str))
            if names:
                return values | {"tasks": [*tasks, *(name for name in names if name not in tasks)]}
        return values

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        if HUMAN_STYLE in (*self.generate.caption_styles, *(task.name for task in self.custom_tasks)):
            yield f"`{HUMAN_STYLE}` is the style of human captions: choose another name"
        if NO_TASKS in self.tasks:
            yield f"`tasks: {NO_TASKS}` excludes other tasks"
        if not self.tasks and self.human_texts == "fill":
            yield "`human_texts: fill` needs a model for the missing texts, but `tasks: none` uses no model"
        if not self.tasks and self.human_texts == "compare":
            yield "no texts would be made: set `tasks`, or keep human texts (`human_texts: keep`)"
        if name := _first_repeated(task.name for task in self.custom_tasks):
            yield f"two custom tasks have the name {name}"
        if "_type" in self.context:
            yield "a context column cannot be named `_type`: `datasets` reserves this name"
        yield from self._select_contradictions()
        yield from self._server_contradictions()

    def _select_contradictions(self) -> Iterator[str]:
        by, checks = self.select.by, self.verify.checks
        if self.generate.samples == 1:
            if self.select != SelectConfig():
                yield "`select` needs several captions to choose from: pass --samples 4"
            return
        if by == "clip" and "alignment" not in checks:
            yield "`select.by: clip` needs the check `alignment`: pass --verify alignment"
        if by == "judge" and not self.verify.judge:
            yield "`select.by: judge` needs the scores of a judge: pass --judge MODEL@URL"

    def _server_contradictions(self) -> Iterator[str]:
        if url := _first_repeated(map(address_of, self.base_url)):
            yield f"`base_url` lists the server {url} twice, in two spellings"
        if DEFAULT_MODEL in self.models:
            yield f"`models` has the name {DEFAULT_MODEL}, which is reserved for `model`: choose another name"
        if JUDGE_MODEL in self.models and AT_SERVER in (self.verify.judge or ""):
            yield f"`verify.judge` and `models.{JUDGE_MODEL}` both define a judge: set `verify.judge: judge`"
        priced: tuple[ServerConfig | ModelConfig, ...] = (self.server, *self.models.values())
        is_priced = any((one.price_in, one.price_out) != (None, None) for one in priced)
        if self.server.max_cost is not None and not is_priced:
            yield "`server.max_cost` needs a price: `price_in`, `price_out` or both"

    @property
    def default_model(self) -> str:
        """The name of the model that tasks use by default."""
        return self.model if self.model in self.models and not self.base_url else DEFAULT_MODEL

    @property
    def judge_model(self) -> str | None:
        """The name of the judge's model, or None without a judge."""
        judge = self.verify.judge
        names = {DEFAULT_MODEL: self.default_model}
        return JUDGE_MODEL if AT_SERVER in (judge or "") else names.get(judge or "", judge)

    def of_model(self, name: str) -> "Config":
        """Return the settings for one model, as if it were the only model of the run.

        `name` is a model in `models`, or the judge. Its servers get its own key and headers. Without these,
        they get the key and headers of the section `server`, if `base_url` lists these servers.
        """
        if name == DEFAULT_MODEL:
            return self
        own = self.models.get(name)
        if own is None:
            model, _, rest = (self.verify.judge or "").partition(AT_SERVER)
            own = ModelConfig(model=model, base_url=(AT_SERVER.removeprefix("@") + rest,))
        own_key = own.key_env or f"SYNTH_{name.upper()}_API_KEY"
        access: dict[str, Any] = {"key_env": own_key, "headers": own.headers}
        shared = set(map(address_of, self.base_url)).issuperset(map(address_of, own.base_url))
        if shared and not own.headers and own_key not in os.environ:
            access = {}
        changes = own.model_dump(include={"concurrency", "price_in", "price_out"}, exclude_unset=True)
        server = self.server.model_copy(update=access | changes | {"flags": own.flags})
        only = {"model": own.model, "base_url": own.base_url, "engine": own.engine, "server": server}
        return self.model_copy(update=only | {"models": {}})

    @property
    def servers(self) -> dict[str, ServerConfig]:
        """The server settings of each model, by model name."""
        judge = (self.judge_model,) if self.judge_model == JUDGE_MODEL else ()
        return {name: self.of_model(name).server for name in (DEFAULT_MODEL, *self.models, *judge)}

    @property
    def context(self) -> tuple[str, ...]:
        """The columns of the source that prompts may use, in the order of the settings."""
        names = (name.strip() for name in self.columns.get(CONTEXT, "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def keeps_human_texts(self) -> bool:
        """Whether human texts become captions and questions of the dataset."""
        return self.human_texts != "compare"

    @property
    def asks_model(self) -> bool:
        """Whether any task, check or judge sends requests to a model."""
        return bool(self.tasks or self.verify.is_asked)

    @property
    def splits_claims(self) -> bool:
        """Whether a model splits captions into claims. For drawn scenes, fixed rules split the captions."""
        return "claims" in self.verify.checks and not self.has_scene_prompts

    @property
    def has_scene_prompts(self) -> bool:
        """Whether built-in prompts have the wording that the tiny model was trained on."""
        return self.source in (SCENES, DECKS) or self.model == TINY

    @property
    def prompt_dirs(self) -> tuple[Path, ...]:
        """The folders of prompt templates by precedence, without the built-in ones of the package."""
        own = (self.generate.prompt_dir,) if self.generate.prompt_dir else ()
        return (*own, SCENE_PROMPTS) if self.has_scene_prompts else own


def _first_repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
