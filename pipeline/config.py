"""Settings of a run: flags override a `--config` file, which overrides defaults. An unknown key is an error."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.errors import ConfigError, did_you_mean, one_line
from pipeline.text.escape import without_passwords
from pipeline.text.language_codes import RECOGNISED

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

TASK, STYLE = r"^[a-z][a-z0-9_]*$", r"^[a-z][a-z0-9-]*$"
Task = Annotated[str, Field(pattern=TASK, max_length=40)]  # defined in pipeline/tasks
Style = Annotated[str, Field(pattern=STYLE, max_length=40)]  # the prompt template decides which exist
MAX_SHOWN_CHARACTERS = 80
CONTEXT = "context"  # the role of columns that prompts may use
AT_SERVER = "@http"  # between the name of a judge and its address
ANY_LANGUAGE = "any"
JUDGE = r"^/?[^\s@/:]+([/:][^\s@/:]+)*(@[^\s@:/]+)?(@https?://[^/\s?#]+(/[^\s?#]*)?)?$"
LANGUAGE = r"^[a-z]{2,3}$"
FIELD = r"^[A-Za-z][A-Za-z0-9_]*$"
NEED = r"^[a-z][a-z0-9_-]*$"
BASE_URL = r"^https?://[^/\s?#]+(/[^\s?#]*)?$"
HEADER = r"^[A-Za-z0-9-]+$"
HEADER_VALUE = r"^[^\x00-\x08\x0a-\x1f\x7f]*$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
TITLE = r"^[^\x00-\x1f]+$"
LICENSE = r"^[A-Za-z0-9][A-Za-z0-9 .,+-]*$"
PATTERNS = {  # what a value that does not match should be
    TASK: "the name of a task, in small letters",
    STYLE: "the name of a caption style, in small letters",
    LANGUAGE: "a language of two or three letters, such as de",
    JUDGE: "a model and the address of its server, such as MODEL@http://HOST:8000/v1",
    BASE_URL: "an address without a query, such as http://HOST:8000/v1 (of Azure: https://NAME.openai.azure.com/openai/v1)",
    HEADER: "the name of a header",
    HEADER_VALUE: "the value of a header, on one line",
    VARIABLE: "the name of an environment variable",
    FIELD: "the name of a field: letters, digits and _",
    NEED: "the name of a task or of a caption style",
    TITLE: "a title on one line",
    LICENSE: "the name of a license, such as cc-by-4.0",
}


# Of a manifest: what decides which rows a version has, and nothing of where or how. Sources and models by public names.
MANIFEST_KEYS = frozenset(
    ("source", "source_split", "allow_partial", "columns", "drop_context", "limit", "rows", "frame_seconds", "seed", "exclude",
     "human_texts", "tasks", "own_tasks", "engine", "model", "generate", "filter", "verify", "select", "dedupe", "balance",
     "split")
)  # fmt: skip
# Sources that name a place of a user's own behind a colon.
LOCAL_SOURCES = ("folder", "archive", "list", "parquet", "pdf", "pdf-pages", "video")
PUBLIC_SOURCE = re.compile(rf"(?!{'|'.join(LOCAL_SOURCES)})[a-z0-9-]+(:[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?)?")
TINY = "tiny"  # the model of the teachers of drawn scenes
NO_MODEL = "none"  # stands for the model where nothing is asked
NO_TASKS = "none"
HUMAN_STYLE = "human"
PUBLIC_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("named twice")
    return values


def _recognised(code: str) -> str:
    if code not in {*RECOGNISED, ANY_LANGUAGE}:
        raise ValueError("no language in which a text can be recognised; with `any`, texts of all languages are kept")
    return code


# YAML reads the code of Norwegian as false.
Language = Annotated[
    str, BeforeValidator(lambda code: "no" if code is False else code), Field(pattern=LANGUAGE), AfterValidator(_recognised)
]
Item = TypeVar("Item")
Distinct = Annotated[tuple[Item, ...], AfterValidator(_distinct)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, and keys of earlier releases are read under their new names."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    OLD_KEYS: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename_old_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        renamed = {cls.OLD_KEYS.get(key, key): value for key, value in values.items()}
        # A section whose lines are all commented out is null in YAML.
        return {key: {} if value is None and _is_section(cls, key) else value for key, value in renamed.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false, and lists of them, where numbers are wanted: pydantic would take them for 1 and 0."""
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            kinds = _kinds_in(cls.model_fields[info.field_name or ""].annotation)
            if not kinds.isdisjoint({int, float}) and bool not in kinds:
                raise PydanticCustomError("bool_for_number", "true is no number")
        return value


def _kinds_in(kind: Any) -> set[Any]:
    """Return the types that stand in the type of a setting: of `tuple[Annotated[int, ...], ...] | None` int, among others."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return {kind}.union(*map(_kinds_in, get_args(kind))) if get_origin(kind) not in (None, Literal) else {kind}


def _is_section(section: type[Section], key: Any) -> bool:
    kind = section.model_fields[key].annotation if key in section.model_fields else None
    return isinstance(kind, type) and issubclass(kind, Section)


AnySection = TypeVar("AnySection", bound=Section)


def _pairs(values: Any) -> Any:
    return tuple(values.items()) if isinstance(values, dict) else values


StyleText = Annotated[str, Field(pattern=r"\S", max_length=20_000)]
# By name; as pairs, since settings of prompts are keys of caches.
StylePrompts = Annotated[tuple[tuple[Style, StyleText], ...], BeforeValidator(_pairs), PlainSerializer(dict)]


BoxUnit = Literal["pixels", "thousandths"]  # of the image as the model sees it; of its sides
Kind = Literal["caption", "question", "labels", "boxes", "text", "record"]


def _json_text(value: Any) -> Any:
    """Return a JSON schema as text, in which the order of its fields is kept; a text, which names a model, as it is."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else value


def _json_value(text: str | None) -> Any:
    try:
        return json.loads(text) if text and text.startswith("{") else text
    except ValueError:
        return text


# A JSON schema, or the `module:Model` of pydantic that has one. As text, since tasks are keys of caches.
OutputSchema = Annotated[str, BeforeValidator(_json_text), PlainSerializer(_json_value)]
Label = Annotated[str, Field(pattern=TITLE, min_length=1, max_length=200)]


class TaskConfig(Section):
    """A task of one's own: what is asked, the form of the reply, and what the dataset makes of it."""

    name: Annotated[str, Field(pattern=TASK, max_length=40)]
    kind: Kind  # captions and questions join those of `caption` and `qa`; the others fill a column of the task's name
    prompt: Annotated[str, Field(pattern=r"\S", max_length=20_000)]  # a template; in a task's file also the path of one (.j2)
    output: OutputSchema | None = None  # of a whole reply: a JSON schema, or module:Model; None: the usual one of the kind
    field: Annotated[str, Field(pattern=FIELD)] | None = None  # of a reply that is the text or the value; None: its only one
    rows: Annotated[str, Field(pattern=FIELD)] | None = None  # a list in the reply, each item of which is an annotation
    labels: Distinct[Label] = ()  # the only ones that labels, or those of boxes, may be
    needs: Distinct[Annotated[str, Field(pattern=NEED)]] = ()  # tasks or caption styles whose results the prompt uses
    show_image: bool = True  # False: the prompt alone, with results of other tasks or columns of the source
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # None: generate.max_tokens
    min_words: Annotated[int, Field(ge=1)] | None = None  # of a caption, a question or a text
    max_words: Annotated[int, Field(ge=1)] | None = None
    language: Language | None = None  # of its texts; None: that of `filter`, if there is one
    coordinates: BoxUnit = "pixels"  # of boxes, as the model writes them


def _named(entries: Any) -> Any:
    """Return the names of own tasks, as far as they have one."""
    return [entry.get("name") if isinstance(entry, dict) else getattr(entry, "name", None) for entry in entries or ()]


class GenerateConfig(Section):
    """Prompts and sampling of the model."""

    OLD_KEYS: ClassVar = {"attempts": "max_attempts", "prompts": "prompt_dir"}

    caption_styles: Distinct[Style] = Field(default=("brief", "detailed"), min_length=1)  # of photographs: plain, detailed
    style_prompts: StylePrompts = ()  # texts of caption styles of one's own, by name
    prompt_version: Literal[1, 2] = 1  # of photographs: 2; settings of earlier releases have none, and mean 1
    caption_words: Annotated[int, Field(ge=1, le=150)] | None = None  # about how many; None: by the style
    caption_temperature: float = Field(default=0.0, ge=0, le=2)
    samples: int = Field(default=1, ge=1, le=64)  # captions of each style that are asked for; the stage select keeps the best
    sample_temperature: float = Field(default=0.8, gt=0, le=2)  # of all but the first, which is as if it were the only one
    qa_temperature: float = Field(default=0.3, ge=0, le=2)  # greedy asks the same about every image; higher is less true
    max_tokens: int = Field(default=256, ge=1)
    max_attempts: int = Field(default=3, ge=1)  # to get a usable reply
    max_pixels: Annotated[int, Field(ge=28 * 28)] | None = None  # larger images are scaled down; None: the model's own limit
    prompt_dir: Path | None = None  # a folder of templates that override the built-in ones, such as caption/v1.j2
    batch_size: int = Field(default=64, ge=1)  # of the embedded engine; not part of the request id


def _with_valid_port(url: str) -> str:
    address_of(url)  # raises ValueError for a port that there is not
    return url


BaseUrl = Annotated[str, Field(pattern=BASE_URL), AfterValidator(_with_valid_port)]
Headers = dict[Annotated[str, Field(pattern=HEADER)], Annotated[str, Field(pattern=HEADER_VALUE)]]


class EndpointConfig(Section):
    """What differs for one server of several. What is not set is as for all of them (ServerConfig)."""

    key_env: Annotated[str, Field(pattern=VARIABLE)] | None = None
    headers: Headers = {}  # beside those for all servers
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    weight: float = Field(default=1.0, gt=0)  # a server of weight 2 has twice as many requests in flight as one of 1


class ServerConfig(Section):
    """How vLLM is started and used. Only flags that may change a reply are part of a dataset's identity."""

    OLD_KEYS: ClassVar = {
        "start_seconds": "startup_timeout_s",
        "restarts": "max_restarts",
        "reply_seconds": "request_timeout_s",
    }

    flags: tuple[str, ...] = ()  # passed to vLLM unchanged; override the default flags
    startup_timeout_s: float = Field(default=900, gt=0)  # to load a model, or to wait for a server that is down
    max_restarts: int = Field(default=3, ge=0)  # of a server that dies
    request_timeout_s: float = Field(default=600, gt=0)  # for one reply
    concurrency: Annotated[int, Field(ge=1)] | None = None  # requests in flight; None: adapts to the server
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None  # that are sent to each server; None: as it answers
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None  # that each server reads and writes
    key_env: Annotated[str, Field(pattern=VARIABLE)] | None = None  # the environment variable of the key; None: SYNTH_API_KEY
    headers: Headers = {}  # of each request; $NAME is of the environment
    endpoints: dict[BaseUrl, EndpointConfig] = {}  # by address, as in base_url
    enforced_schema: bool = True  # a server that does not enforce JSON schemas is refused
    price_in: Annotated[float, Field(ge=0)] | None = None  # of a million tokens that are read; max_cost counts by it
    price_out: Annotated[float, Field(ge=0)] | None = None  # of a million tokens that are written
    max_requests: Annotated[int, Field(ge=1)] | None = None  # that all runs in the dataset folder may send
    max_total_tokens: Annotated[int, Field(ge=1)] | None = None  # that they may read and write
    max_cost: Annotated[float, Field(gt=0)] | None = None  # that they may cost, by the prices above
    max_failure_frac: float = Field(default=0.9, ge=0, le=1)  # of the last 100 replies that may be unusable; 1: all

    @model_validator(mode="after")
    def _knows_what_the_budget_buys(self) -> "ServerConfig":
        if self.max_cost is not None and self.price_in is None and self.price_out is None:
            raise ValueError("max_cost needs a price: price_in, price_out or both")
        return self

    @property
    def has_budget(self) -> bool:
        """Whether requests, tokens or money are limited."""
        return (self.max_requests, self.max_total_tokens, self.max_cost) != (None, None, None)

    def price(self, prompt_tokens: float, reply_tokens: float) -> float | None:
        """Return what so many tokens cost; None if no price is known."""
        if self.price_in is None and self.price_out is None:
            return None
        return (prompt_tokens * (self.price_in or 0) + reply_tokens * (self.price_out or 0)) / 1e6


class FilterConfig(Section):
    """Bounds on the texts that are kept; words are counted after openings such as "The image shows" are removed."""

    OLD_KEYS: ClassVar = {
        "max_repeated_trigrams": "max_duplicate_trigram_frac",
        "min_distinct_words": "min_distinct_word_frac",
        "max_foreign_letters": "max_non_latin_frac",
    }

    min_caption_words: int = Field(default=5, ge=1)
    max_caption_words: int = Field(default=150, ge=1)
    min_question_words: int = Field(default=3, ge=1)
    max_question_words: int = Field(default=30, ge=1)
    max_answer_words: int = Field(default=10, ge=1)
    max_duplicate_trigram_frac: float = Field(default=0.4, ge=0, le=1)  # in texts of twelve words or more
    min_distinct_word_frac: float = Field(default=0.35, ge=0, le=1)
    language: Annotated[Language | None, BeforeValidator(lambda code: None if code == ANY_LANGUAGE else code)] = "en"
    min_language_score: float = Field(default=0.6, ge=0, le=1)  # confidence of the detector that rejects another language
    max_non_latin_frac: float = Field(default=0.0, ge=0, le=1)  # of letters outside of quotes, if the language is Latin


Check = Literal["round_trip", "claims", "covers", "blind", "evidence", "alignment", "references"]


class VerifyConfig(Section):
    """Checks that ask the model about annotations again, with their thresholds. Only named checks are run."""

    OLD_KEYS: ClassVar = {"min_blind_share": "min_blind_frac", "max_luck": "max_answer_frequency", "clip": "clip_model"}

    checks: Distinct[Check] = ()
    min_claims_supported: float = Field(default=1.0, ge=0, le=1)  # share of a caption's claims
    repair: bool = False  # captions with false claims are written again without them, and checked again
    judge: Annotated[str, Field(pattern=JUDGE)] | None = None  # MODEL@URL: another model that rates each text
    judge_may_be_writer: bool = False  # a model likes its own texts
    min_rating: Annotated[int, Field(ge=1, le=5)] | None = None  # of each part of the rubric; None: only measured
    min_coverage: Annotated[float, Field(ge=0, le=1)] | None = None  # share of the image's questions; None: only measured
    min_shared_words: Annotated[float, Field(ge=0, le=1)] | None = None  # with captions of the source; None: only measured
    min_blind_frac: float = Field(default=0.8, gt=0, le=1)  # of images with one question, for an answer to need no image
    max_answer_frequency: float = Field(default=0.1, ge=0, le=1)  # above it, an answer may be right by chance
    clip_model: str = "auto"  # of `alignment`: auto, clip, metaclip, tiny-clip, a folder or a Hub id
    min_alignment: Annotated[float, Field(ge=-1, le=1)] | None = None  # cosine; None: only the lowest are rejected
    lowest_alignment_frac: float = Field(default=0.05, ge=0, lt=1)  # of the captions of each style, rejected

    @model_validator(mode="after")
    def _repairs_what_it_checks(self) -> "VerifyConfig":
        if self.repair and "claims" not in self.checks:
            raise ValueError("repair needs the check claims, which finds what is false: --verify claims")
        return self

    @property
    def is_asked(self) -> bool:
        """Whether anything is to be checked."""
        return bool(self.checks or self.judge)


Selection = Literal["consistency", "clip", "judge", "longest"]


class SelectConfig(Section):
    """How the best of several captions of one image and style is found (generate.samples)."""

    by: Selection = "consistency"
    pairs: bool = False  # the best and the worst are published together, to learn preferences from


class DedupeConfig(Section):
    """Which images and captions count as duplicates."""

    images: Literal["auto", "photos", "graphics", "none"] = "auto"  # auto: decks and pages are graphics, drawn scenes none
    max_images_per_caption: int = Field(default=5, ge=1)  # of captions that say the same about different images


class BalanceConfig(Section):
    """Limits on over-represented answers and captions."""

    OLD_KEYS: ClassVar = {
        "max_answer_share": "max_answer_frac",
        "max_yes_no_share": "max_yes_no_frac",
        "tail_share": "tail_frac",
    }

    max_answer_frac: float = Field(default=0.4, gt=0, le=1)  # of the questions of one type
    max_yes_no_frac: float = Field(default=0.55, ge=0.5, le=1)  # of yes, or of no; also of two other answers
    min_questions_per_type: int = Field(default=50, ge=1)  # rarer types are balanced together
    tail_frac: Annotated[float, Field(gt=0, lt=1)] | None = None  # MetaCLIP's p for captions, such as 0.06; None: all are kept
    entries: Path | None = None  # a file of entries to balance captions over; None: all words of the captions

    def max_share(self, answers: Collection[str]) -> float:
        """Return the largest share that one of these answers to one type of question may have."""
        return self.max_yes_no_frac if len(answers) <= 2 or {"yes", "no"} & set(answers) else self.max_answer_frac


class SplitConfig(Section):
    """The shares of images that are held out. The rest is `train`."""

    validation_frac: float = Field(default=0.1, ge=0, lt=1)
    test_frac: float = Field(default=0.1, ge=0, lt=1)
    group_by: Literal["folder", "prefix"] | None = (
        None  # images of one folder, or of one name but for its last number: one split
    )

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> "SplitConfig":
        if self.validation_frac + self.test_frac >= 1:
            raise ValueError("validation_frac and test_frac add up to 1 or more")
        return self


# What becomes of the captions and questions that a source has, which people wrote:
#   compare  they stay references, with which those of the model are compared
#   keep     they become captions and questions of the dataset, too, and go through all stages like those of the model
#   fill     the same; and the model is asked only for what an image has none of
HumanTexts = Literal["compare", "keep", "fill"]


class Config(Section):
    """Everything that decides what a dataset holds. Saved as `run.json`."""

    OLD_KEYS: ClassVar = {"never": "exclude"}

    source: str
    source_split: Literal["train", "validation", "test"] | None = None
    license: Annotated[str, Field(pattern=LICENSE, max_length=100)] | None = None  # of one's own images
    title: Annotated[str, Field(pattern=TITLE, min_length=1, max_length=200)] | None = None  # of the dataset's card
    columns: dict[str, str] = {}  # role -> column, for tables with other column names; several with commas for `context`
    drop_context: bool = False  # columns for prompts alone, which no version holds
    allow_urls: bool = False  # fetch images that rows name by URL
    allow_partial: bool = False  # read what the Hub has converted, where that is a first part only
    follow_links: bool = False  # read files outside of the folder that links in it lead to
    split_list: Path | None = None  # which image is in which split, where a copy of Flickr30k has lost it
    limit: Annotated[int, Field(ge=1)] | None = None  # images that are read at most
    rows: Annotated[int, Field(ge=1)] | None = None  # images that the version has: it is read on until so many are kept
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
        names = [name for name in _named(values["own_tasks"]) if isinstance(name, str)]
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
        if self.limit is not None and self.rows is not None and self.limit < self.rows:
            raise ValueError(f"rows: {self.rows} images cannot be kept of the {self.limit} that limit allows")
        return self

    @model_validator(mode="after")
    def _selects_by_what_is_measured(self) -> "Config":
        if self.generate.samples == 1:
            if self.select != SelectConfig():
                raise ValueError("select chooses among several captions: --samples 4")
            return self
        checks = self.verify.checks
        if self.select.by == "clip" and "alignment" not in checks:
            raise ValueError("select.by clip needs what the check alignment measures: --verify alignment")
        if self.select.by == "judge" and not self.verify.judge:
            raise ValueError("select.by judge needs the marks of another model: --judge MODEL@URL")
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

    def endpoint(self, url: str) -> EndpointConfig:
        """Return what the settings say of the server at this address: its own values, else those for all; the key its own."""
        server, address = self.server, address_of(url)
        own = next((of for name, of in server.endpoints.items() if address_of(name) == address), EndpointConfig())
        own_names = {name.lower() for name in own.headers}
        return EndpointConfig(
            key_env=own.key_env,
            headers={name: value for name, value in server.headers.items() if name.lower() not in own_names} | own.headers,
            requests_per_minute=own.requests_per_minute or server.requests_per_minute,
            tokens_per_minute=own.tokens_per_minute or server.tokens_per_minute,
            weight=own.weight,
        )

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
        return "claims" in self.verify.checks and self.generate.prompt_version > 1


def address_of(url: str) -> str:
    """Return the address under which a server speaks the protocol: with /v1 where no path is given, and in one spelling."""
    parts = urlsplit(url.rstrip("/").removesuffix("/chat/completions"))
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    user, at, _ = parts.netloc.rpartition("@")
    usual = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in (None, usual) else f":{parts.port}"
    return f"{parts.scheme}://{user}{at}{host}{port}{parts.path.rstrip('/') or '/v1'}"


def judge_address(judge: str | None) -> str:
    """Return the address in MODEL@URL; empty if there is none."""
    _, at, rest = (judge or "").partition(AT_SERVER)
    return at.removeprefix("@") + rest


def origin_of(url: str) -> tuple[str, str]:
    """Return the scheme, and the host with its port, of a server."""
    parts = urlsplit(address_of(url))
    return parts.scheme, parts.netloc.rpartition("@")[2]


def current_settings(values: dict[str, Any], section: type[Section] = Config) -> dict[str, Any]:
    """Return settings under today's names of keys, in all sections."""
    renamed = {section.OLD_KEYS.get(key, key): value for key, value in values.items()}
    for name, field in section.model_fields.items():
        inner, value = field.annotation, renamed.get(name)
        if isinstance(inner, type) and issubclass(inner, Section) and isinstance(value, dict):
            renamed[name] = current_settings(value, inner)
    return renamed


def resolve(config_file: Path | None = None, **flags: Any) -> Config:
    """Merge defaults, the file and the flags that are not None, in this order. Raises ConfigError for a bad key or value."""
    values, is_manifest = _settings_of_file(config_file) if config_file else ({}, False)
    if config_file and is_manifest:
        _refuse_foreign_files(config_file, values, flags)
        values = _public_settings(values)
        if isinstance(values.setdefault("generate", {}), dict):
            values["generate"].setdefault("prompt_version", 1)  # earlier releases did not say it
    elif isinstance(values.get("own_tasks"), list):  # a manifest holds its tasks in full, and names no files
        values["own_tasks"] = [_whole_task(task) for task in values["own_tasks"]]
    if flags.get("base_url") is not None and isinstance(values.get("server"), dict):
        judge = [section.get("judge") for section in (flags.get("verify"), values.get("verify")) if isinstance(section, dict)]
        values["server"] = _of_servers(values["server"], flags["base_url"], str(next(filter(None, judge), "")))
    if (given := flags.pop("own_tasks", None)) is not None:
        values["own_tasks"] = _with_others(given, values.get("own_tasks"))
    for name, value in flags.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] |= value  # a section: keys that it does not name stay as in the file
        elif value is not None:
            values[name] = value
    if "source" not in values and values.keys() <= {*Config.model_fields, *Config.OLD_KEYS}:
        raise ConfigError("no source given", hint="say --source scenes, or --source folder:PATH; `synth sources` lists them")
    return validate(Config, values)


def _of_servers(server: dict[str, Any], base_url: Any, judge: str) -> dict[str, Any]:
    """Return the section `server` of a file without what it says of servers that --base-url has left out."""
    endpoints = server.get("endpoints")
    used = [*map(str, base_url), *filter(None, [judge_address(judge)])]
    if not isinstance(endpoints, dict) or not all(re.match(BASE_URL, str(url)) for url in (*endpoints, *used)):
        return server  # an error of its own
    kept = {url: of for url, of in endpoints.items() if address_of(url) in map(address_of, used)}
    return server | {"endpoints": kept}


def _with_others(given: Any, of_file: Any) -> Any:
    """Return own tasks of a file of settings with those of options, which replace others of the same name."""
    if not isinstance(given, list | tuple):
        return given  # an error of its own
    added = [_whole_task(task) for task in given]
    names = _named(added)
    known = of_file if isinstance(of_file, list) else []
    return [*(task for task in known if not (isinstance(task, dict) and task.get("name") in names)), *added]


def _whole_task(task: Any) -> Any:
    """Return a task in full, with the texts of the files that it names, from its file if it is a path."""
    return read_task(Path(task)) if isinstance(task, str | Path) else _with_texts(task, Path())


def read_task(path: Path) -> dict[str, Any]:
    """Read a task of one's own from its file. Raises ConfigError if the file, or one that it names, cannot be read."""
    return validate(
        TaskConfig, _with_texts(read_yaml(path, "a line such as `kind: caption`"), path.parent), f"{path}: "
    ).model_dump(exclude_unset=True)


def _with_texts(task: Any, folder: Path) -> Any:
    """Return a task with the texts of the template and the schema that it names as files."""
    if not isinstance(task, dict):
        return task
    texts = {}
    for key, suffix in (("prompt", ".j2"), ("output", ".json")):
        name = task.get(key)
        if isinstance(name, str) and name.endswith(suffix) and len(name.split()) == 1:
            try:
                text = (folder / name).read_text(encoding="utf-8")
                texts[key] = json.loads(text) if suffix == ".json" else text
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot read {folder / name}: {error}", hint=f"the {key} of a task names it") from None
    return task | texts


def _without_twice(path: Path, node: yaml.Node) -> yaml.Node:
    """Return the node of a file. Raises ConfigError if a key stands twice in it: YAML would take the last, without a word."""
    waiting, seen = [node], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or not isinstance(one, yaml.CollectionNode):  # an anchor may be named many times
            continue
        seen.add(id(one))
        keys = set[tuple[str, str]]()
        for item in one.value:
            key, *values = item if isinstance(item, tuple) else (None, item)
            waiting += values
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    problem = f"{path}, line {key.start_mark.line + 1}: the key {key.value} stands twice"
                    raise ConfigError(problem, hint="remove one of them")
                keys.add((key.tag, key.value))
    return node


def read_yaml(path: Path, example: str) -> dict[str, Any]:
    """Read a file of settings; the only reader of YAML. Raises ConfigError if it does not hold keys and values."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        values = None if node is None else yaml.constructor.SafeConstructor().construct_document(_without_twice(path, node))
    except (OSError, UnicodeDecodeError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(
            f"cannot read config file {path}: {problem}", hint=f"pass a YAML file; it may hold {example}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {one_line(error, 1000)}", hint=f"it may hold {example}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config file {path} must hold keys and values", hint=f"it may hold {example}")
    return values or {}


def validate(section: type[AnySection], values: dict[str, Any], where: str = "") -> AnySection:
    """Return settings from keys and values. Raises ConfigError that names the first invalid key or value, after `where`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # An unknown key says more than one that is missing, which may be the same with a letter lost.
        first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
        key, known = ".".join(str(part) for part in first["loc"]), _keys(section)
        page = "docs/own-tasks.md" if section is TaskConfig else "docs/settings.md"
        # Of the section that the key is in, or is.
        section_of = key if any(name.startswith(f"{key}.") for name in known) else key.rpartition(".")[0]
        near = [name for name in known if name.rpartition(".")[0] == section_of]
        every_key = f"known keys: {', '.join(near or known)}"
        if first["type"] == "extra_forbidden":
            elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = did_you_mean(key, known) or (f"did you mean {' or '.join(elsewhere)}?" if elsewhere else every_key)
            raise ConfigError(f"{where}unknown config key: {key}", hint=hint) from None
        key = re.sub(r"(\.(\d+|int|float|str))+$", "", key)  # of an item of a list, or one of several types
        if not key:  # a rule about several of them
            problem = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where}{problem}", hint=f"{page} explains each setting") from None
        if first["type"] == "missing":
            raise ConfigError(f"{where}{key} is missing", hint=every_key) from None
        all_shown = "`synth config --all` shows all settings; " if section is Config else ""
        is_rule = first["type"] in ("value_error", "assertion_error")  # and not about which keys there are
        hint = f"{all_shown}{page} explains {key}" if key in known or is_rule else every_key
        raise ConfigError(f"{where}bad value for {key}: {_flaw(first)}", hint=hint) from None


def _flaw(error: "ErrorDetails") -> str:
    """Return what is wrong with a value, in our words."""
    value, context = error["input"], error.get("ctx", {})
    shown = repr(value) if len(repr(value)) <= MAX_SHOWN_CHARACTERS else f"{repr(value)[:MAX_SHOWN_CHARACTERS]}..."
    wanted = {
        "tuple_type": "a list, such as [a, b]",
        "list_type": "a list, such as [a, b]",
        "dict_type": "keys and values",
        "model_type": "keys and values, indented below it",
        "model_attributes_type": "keys and values, indented below it",
        "string_type": "a text",
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "bool_for_number": "a number; YAML reads yes, no, on and off as true and false",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "path_type": "a path",
        "literal_error": f"one of {context.get('expected')}",
        "greater_than": f"more than {context.get('gt')}",
        "greater_than_equal": f"{context.get('ge')} or more",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"{context.get('le')} or less",
        "too_short": "at least one item",
        "string_too_short": "at least one character",
        "string_too_long": f"at most {context.get('max_length')} characters",
    }.get(error["type"])
    if error["type"] == "string_pattern_mismatch":
        wanted = PATTERNS.get(str(context.get("pattern")), f"a text that matches {context.get('pattern')}")
    if wanted is None:  # a rule of our own
        rule = error["msg"].removeprefix("Value error, ")
        return rule if isinstance(value, dict | BaseModel) else f"{rule} ({shown})"  # a section may hold keys of servers
    is_unquoted = isinstance(value, bool) and error["type"] == "string_type"
    quotes = "; YAML reads yes, no, on and off so: put it in quotes" if is_unquoted else ""
    return f"{shown} is not {wanted}{quotes}"


def describe_settings(config: Config, file: Path | None, options: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return (key, value as YAML, origin) of every setting; an origin is an option, the file, or `default`."""
    values = config.model_dump(mode="json")
    in_file = current_settings(_settings_of_file(file)[0]) if file else {}
    rows = []
    for key in _keys(Config):
        section, _, name = key.partition(".")
        value = values[section][name] if name else values[section]
        is_in_file = name in (in_file.get(section) or {}) if name else section in in_file
        origin = options.get(key) or (str(file) if is_in_file else "default")
        shown = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
        rows.append((key, shown, origin))
    return rows


def _settings_of_file(file: Path) -> tuple[dict[str, Any], bool]:
    """Return the settings in a file, and whether it is the manifest of a version."""
    values = read_yaml(file, "a line such as `limit: 100`")
    if isinstance(values.get("config"), dict) and "version" in values:
        return current_settings(values["config"]), True
    if file.name == "manifest.json":  # cards print a command that names it: it must not be any other file of settings
        raise ConfigError(
            f"{file} is not a manifest of a version", hint="a file of settings has another name, such as synth.yaml"
        )
    return values, False


def _refuse_foreign_files(file: Path, settings: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for what a manifest must not decide, or cannot bring along: servers, and files that its rows need."""
    hint = "copy the settings that you want to a file of your own, and name your files and servers there"
    if foreign := [key for key in ("base_url", "server") if settings.get(key)]:
        raise ConfigError(f"the manifest {file} names {foreign[0]}, which would get your images and your key", hint=hint)
    used = [key for key in ("split_list", "captions") if settings.get(key) and not flags.get(key)]
    for section, key in (("generate", "prompt_dir"), ("balance", "entries")):
        values = settings.get(section)
        used += [f"{section}.{key}"] if isinstance(values, dict) and values.get(key) else []
    own_tasks = settings.get("own_tasks")
    for task in own_tasks if isinstance(own_tasks, list) else ():
        if not isinstance(task, dict) or isinstance(task.get("output"), str):
            raise ConfigError(f"the manifest {file} names Python code as the output of a task", hint=hint)
    verify = settings.get("verify")
    if isinstance(verify, dict) and AT_SERVER in str(verify.get("judge")):
        raise ConfigError(f"the manifest {file} names a judge's server, which would get your images and your key", hint=hint)
    if used:
        raise ConfigError(f"the version of {file} was made with a file of its maker: {used[0]}", hint=hint)


def _public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a manifest that decide which rows its version has: a manifest may be a stranger's.

    What says where or how is left out, and has to be given anew: places, permissions, names that are a path here.
    """
    kept = {key: value for key, value in settings.items() if key in MANIFEST_KEYS and value is not None}
    if isinstance(kept.get("exclude"), list):
        kept["exclude"] = [name for name in kept["exclude"] if PUBLIC_SOURCE.fullmatch(str(name).partition("#")[0])]
    verify = kept.get("verify")
    if isinstance(verify, dict) and not _is_public_model(verify.get("clip_model", "auto")):
        kept["verify"] = {key: value for key, value in verify.items() if key != "clip_model"}
    if "model" in kept and not _is_public_model(kept["model"]):
        del kept["model"]
    if not PUBLIC_SOURCE.fullmatch(str(kept.get("source", ""))):
        kept.pop("source", None)
    return kept


def _is_public_model(name: Any) -> bool:
    """Return whether a name is a model of the Hub or a keyword (tiny, auto), and no path that exists here."""
    text = str(name)
    return bool(PUBLIC_MODEL.fullmatch(text)) and not ("/" in text and Path(text).exists())


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _keys(inner, f"{name}.")
        else:
            names.append(prefix + name)
    return names
