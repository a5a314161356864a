"""Settings of a run: flags override a `--config` file, which overrides defaults. An unknown key is an error."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.sections import (
    LICENSE,
    TITLE,
    BalanceConfig,
    BaseUrl,
    DedupeConfig,
    Distinct,
    FilterConfig,
    GenerateConfig,
    Section,
    SelectConfig,
    ServerConfig,
    SplitConfig,
    Task,
    TaskConfig,
    VerifyConfig,
    address_of,
    judge_address,
    task_names,
)
from pipeline.text.escape import without_passwords

CONTEXT = "context"  # the role of columns that prompts may use
SCENES, DECKS = "scenes", "scenes-deck"  # sources of drawn images
TINY = "tiny"  # the model that knows drawn images only
LARGE = "Qwen/Qwen2.5-VL-3B-Instruct"
SCENE_PROMPTS = Path(__file__).parents[1] / "scenes" / "prompts"  # the wording that the tiny model learned
NO_MODEL = "none"  # stands for the model where nothing is asked
NO_TASKS = "none"
HUMAN_STYLE = "human"
# What becomes of the captions and questions that a source has, which people wrote:
#   compare  they stay references, with which those of the model are compared
#   keep     they become captions and questions of the dataset, too, and go through all steps like those of the model
#   fill     the same; and the model is asked only for what an image has none of
HumanTexts = Literal["compare", "keep", "fill"]


def _as_text(source: str) -> str:
    try:
        source.encode()
    except UnicodeEncodeError:
        raise ValueError("a path that is no UTF-8 cannot be kept: rename it") from None
    return source


class Config(Section):
    """Everything that decides what a dataset holds. Saved as `run.json`."""

    source: Annotated[str, AfterValidator(_as_text)]
    source_split: Literal["train", "validation", "test"] | None = None
    license: Annotated[str, Field(pattern=LICENSE, max_length=100)] | None = None  # of one's own images
    title: Annotated[str, Field(pattern=TITLE, min_length=1, max_length=200)] | None = None  # of the dataset's card
    columns: dict[str, str] = Field(
        default_factory=dict
    )  # role -> column, for tables with other column names; several with commas for `context`
    drop_context: bool = False  # columns for prompts alone, which no version holds
    allow_urls: bool = False  # fetch images that rows name by URL
    allow_partial: bool = False  # read what the Hub has converted, where that is a first part only
    follow_links: bool = False  # read files outside of the folder that links in it lead to
    split_list: Path | None = None  # which image is in which split, where a copy of Flickr30k has lost it
    limit: Annotated[int, Field(ge=1)] | None = None  # images that are read at most
    images: Annotated[int, Field(ge=1)] | None = None  # images that the version has: it is read on until so many are kept
    # Seconds between the frames that are read of a video; None: 5.
    frame_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: int = 0
    exclude: Distinct[Annotated[str, Field(min_length=1)]] = ()  # SOURCE or SOURCE#SPLIT: images that must not be learned from
    captions: Distinct[
        Annotated[Path, AfterValidator(Path.expanduser)]
    ] = ()  # files of captions, or questions, that people wrote about the images of a folder
    human_texts: HumanTexts = "compare"
    tasks: Distinct[Task] = ("caption", "qa")  # none: no model is asked; own tasks are asked with or without being named
    own_tasks: tuple[TaskConfig, ...] = ()
    engine: Literal["auto", "embedded", "vllm"] = "auto"
    model: str | None = None
    base_url: Distinct[BaseUrl] = ()
    generate: GenerateConfig = GenerateConfig()
    server: ServerConfig = ServerConfig()
    filter: FilterConfig = FilterConfig()
    verify: VerifyConfig = VerifyConfig()
    select: SelectConfig = SelectConfig()
    dedupe: DedupeConfig = DedupeConfig()
    balance: BalanceConfig = BalanceConfig()
    split: SplitConfig = SplitConfig()

    @model_validator(mode="before")
    @classmethod
    def _asks_own_tasks(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("own_tasks"), list | tuple):
            return values
        if not isinstance(values.get("tasks") or (), list | tuple):
            return values  # an error of its own
        names = [name for name in task_names(values["own_tasks"]) if isinstance(name, str)]
        asked = values.get("tasks") or ()
        return values | {"tasks": [*asked, *(name for name in dict.fromkeys(names) if name not in asked)]} if names else values

    @model_validator(mode="before")
    @classmethod
    def _keeps_human_texts_without_tasks(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("tasks") not in (NO_TASKS, [NO_TASKS], (NO_TASKS,)):
            return values
        return {"human_texts": "keep"} | values | {"tasks": []}

    @model_validator(mode="after")
    def _knows_whose_texts_are_whose(self) -> "Config":
        styles = (*self.generate.caption_styles, *(name for name, _ in self.generate.style_prompts))
        if HUMAN_STYLE in (*styles, *(task.name for task in self.own_tasks)):
            raise ValueError(f"{HUMAN_STYLE} is the style of captions that people wrote: give yours another name")
        if NO_TASKS in self.tasks:
            raise ValueError(f"tasks: {NO_TASKS} stands alone")
        if not self.tasks and self.human_texts == "fill":
            raise ValueError("human_texts: fill asks for what is missing, and tasks: none for nothing")
        return self

    @model_validator(mode="after")
    def _makes_something(self) -> "Config":
        if not self.tasks and self.human_texts == "compare":
            raise ValueError("no task is asked and no text of people is kept: name tasks, or human_texts: keep")
        return self

    @model_validator(mode="after")
    def _may_read_as_many_images_as_it_keeps(self) -> "Config":
        if self.limit is not None and self.images is not None and self.limit < self.images:
            raise ValueError(f"images: {self.images} images cannot be kept of the {self.limit} that limit allows")
        return self

    @model_validator(mode="after")
    def _selects_by_what_is_measured(self) -> "Config":
        if self.generate.samples == 1:
            if self.select != SelectConfig():
                raise ValueError("select chooses among several captions: --samples 4")
            return self
        if self.select == SelectConfig(by="consistency", pairs=True) and self.generate.samples == 2:
            raise ValueError("of two captions each agrees with the other as much, so that none is better: --samples 3")
        checks = self.verify.checks
        if self.select.by == "clip" and "alignment" not in checks:
            raise ValueError("select.by clip needs what the check alignment measures: --verify alignment")
        if self.select.by == "judge" and not self.verify.judge:
            raise ValueError("select.by judge needs the scores of another model: --judge MODEL@URL")
        if self.select.by == "longest" and "claims" not in checks:
            raise ValueError("select.by longest needs captions whose claims are checked: --verify claims")
        return self

    @model_validator(mode="after")
    def _has_the_servers_that_it_describes(self) -> "Config":
        used = [*self.base_url, *([self.judge_url] if self.judge_url else [])]
        described = [address_of(url) for url in self.server.endpoints]
        if twice := [url for url in described if described.count(url) > 1]:
            raise ValueError(f"server.endpoints describes {twice[0]} twice")
        if unknown := [url for url in self.server.endpoints if address_of(url) not in map(address_of, used)]:
            named = ", ".join(used) or "no server"
            raise ValueError(f"server.endpoints describes {unknown[0]}, and base_url names {named}")
        return self

    @model_validator(mode="after")
    def _names_each_server_once(self) -> "Config":
        addresses = [address_of(url) for url in self.base_url]  # with its login: two accounts have two limits
        if twice := [address for address in addresses if addresses.count(address) > 1]:
            raise ValueError(f"base_url names the server {without_passwords(twice[0])} twice, in two spellings")
        return self

    @model_validator(mode="after")
    def _names_own_tasks_apart(self) -> "Config":
        names = [task.name for task in self.own_tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two own tasks have the name {twice[0]}")
        return self

    @model_validator(mode="after")
    def _names_columns_that_a_row_can_hold(self) -> "Config":
        if "_type" in self.context:
            raise ValueError("a column of the context cannot be named _type, which `datasets` takes for a description")
        return self

    def recorded(self) -> dict[str, Any]:
        """Return the settings as a folder keeps them (run.json): without passwords in the addresses of servers."""
        values = self.model_dump(mode="json")
        values["base_url"] = [without_passwords(url) for url in self.base_url]
        values["server"]["endpoints"] = {
            without_passwords(url): settings for url, settings in values["server"]["endpoints"].items()
        }
        values["verify"]["judge"] = self.verify.judge and without_passwords(self.verify.judge)
        return values

    @property
    def judge_url(self) -> str:
        """The address of the judge's server; empty if there is none."""
        return judge_address(self.verify.judge)

    @property
    def context(self) -> tuple[str, ...]:
        """The columns of the source that prompts may use, in the order in which they are named."""
        names = (name.strip() for name in self.columns.get(CONTEXT, "").split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    @property
    def published_context(self) -> tuple[str, ...]:
        """Those that go into the rows of a version."""
        return () if self.drop_context else self.context

    @property
    def keeps_human_texts(self) -> bool:
        """Whether the texts that people wrote become captions and questions of the dataset."""
        return self.human_texts != "compare"

    @property
    def asks_model(self) -> bool:
        """Whether a model is asked for anything but the ratings of another one."""
        return bool(self.tasks or self.verify.is_asked)

    @property
    def splits_claims(self) -> bool:
        """Whether the model splits captions into claims; those of drawn scenes are split by rules."""
        return "claims" in self.verify.checks and not self.has_scene_prompts

    @property
    def has_scene_prompts(self) -> bool:
        """Whether the built-in prompts are those that the tiny model learned."""
        return self.source in (SCENES, DECKS) or self.model == TINY

    @property
    def prompt_dirs(self) -> tuple[Path, ...]:
        """The folders of templates, of which the first one that has a template wins; the package has the missing ones."""
        own = (self.generate.prompt_dir,) if self.generate.prompt_dir else ()
        return (*own, SCENE_PROMPTS) if self.has_scene_prompts else own
