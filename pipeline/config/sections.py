"""The sections of the settings, one a step or a part that asks models, and the forms of names, addresses and languages."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.text.language_codes import RECOGNISED

TASK, STYLE = r"^[a-z][a-z0-9_]*$", r"^[a-z][a-z0-9-]*$"
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
    BASE_URL: "an address with http:// or https:// and without a query, such as http://HOST:8000/v1 (of Azure: https://NAME.openai.azure.com/openai/v1)",
    HEADER: "the name of a header",
    HEADER_VALUE: "the value of a header, on one line",
    VARIABLE: "the name of an environment variable",
    FIELD: "the name of a field: letters, digits and _",
    NEED: "the name of a task or of a caption style",
    TITLE: "a title on one line",
    LICENSE: "the name of a license, such as cc-by-4.0",
}
Task = Annotated[str, Field(pattern=TASK, max_length=40)]  # defined in pipeline/tasks
Style = Annotated[str, Field(pattern=STYLE, max_length=40)]  # the prompt template decides which exist
AT_SERVER = "@http"  # between the name of a judge and its address


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
    """Base of all sections: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, values: Any) -> Any:
        """Read null as an empty section: YAML returns null for a section whose lines are all commented out."""
        if not isinstance(values, dict):
            return values
        return {key: {} if value is None and _is_section(cls, key) else value for key, value in values.items()}

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


# --- addresses of servers


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


# --- sections


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

    @model_validator(mode="after")
    def _allows_some_length(self) -> "TaskConfig":
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"min_words is {self.min_words}, and max_words {self.max_words}: no text is so long")
        return self


def task_names(entries: Any) -> Any:
    """Return the names of own tasks, as far as they have one."""
    return [entry.get("name") if isinstance(entry, dict) else getattr(entry, "name", None) for entry in entries or ()]


class GenerateConfig(Section):
    """Prompts and sampling of the model."""

    caption_styles: Distinct[Style] = Field(default=("brief", "detailed"), min_length=1)  # of photographs: plain, detailed
    style_prompts: StylePrompts = ()  # texts of caption styles of one's own, by name
    caption_words: Annotated[int, Field(ge=1, le=150)] | None = None  # about how many; None: by the style
    caption_temperature: float = Field(default=0.0, ge=0, le=2)
    samples: int = Field(default=1, ge=1, le=64)  # captions of each style that are asked for; the step select keeps the best
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


def _named_not_given(variable: str) -> str:
    if _LIKE_A_KEY.match(variable):
        raise ValueError("it looks like a key; put the key into an environment variable, and name that one here")
    return variable


BaseUrl = Annotated[str, Field(pattern=BASE_URL), AfterValidator(_with_valid_port)]
KeyVariable = Annotated[str, Field(pattern=VARIABLE), AfterValidator(_named_not_given)]
_LIKE_A_KEY = re.compile(
    r"(hf_|sk_(live_|test_)?|gsk_|ghp_|r8_|xai_|AIza)(?=[a-zA-Z]*\d)[a-zA-Z0-9]{12,}$"
)  # keys that would pass as the name of a variable
Headers = dict[Annotated[str, Field(pattern=HEADER)], Annotated[str, Field(pattern=HEADER_VALUE)]]


class EndpointConfig(Section):
    """What differs for one server of several. What is not set is as for all of them (ServerConfig)."""

    key_env: KeyVariable | None = None
    headers: Headers = Field(default_factory=dict)  # beside those for all servers
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    weight: float = Field(default=1.0, gt=0)  # a server of weight 2 has twice as many requests in flight as one of 1


class ServerConfig(Section):
    """How vLLM is started and used. Only flags that may change a reply are part of a dataset's identity."""

    flags: tuple[str, ...] = ()  # passed to vLLM unchanged; override the default flags
    startup_timeout_s: float = Field(default=900, gt=0)  # to load a model, or to wait for a server that is down
    max_restarts: int = Field(default=3, ge=0)  # of a server that dies
    request_timeout_s: float = Field(default=600, gt=0)  # for one reply
    concurrency: Annotated[int, Field(ge=1)] | None = None  # requests in flight; None: adapts to the server
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None  # that are sent to each server; None: as it answers
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None  # that each server reads and writes
    key_env: KeyVariable | None = None  # the environment variable of the key; None: SYNTH_API_KEY
    headers: Headers = Field(default_factory=dict)  # of each request; $NAME is of the environment
    endpoints: dict[BaseUrl, EndpointConfig] = Field(default_factory=dict)  # by address, as in base_url
    enforced_schema: bool = True  # a server that does not enforce JSON schemas is refused
    price_in: Annotated[float, Field(ge=0)] | None = None  # of a million tokens that are read; max_cost counts by it
    price_out: Annotated[float, Field(ge=0)] | None = None  # of a million tokens that are written
    judge_price_in: Annotated[float, Field(ge=0)] | None = None  # of what the judge reads; None: as for the writer
    judge_price_out: Annotated[float, Field(ge=0)] | None = None
    max_requests: Annotated[int, Field(ge=1)] | None = None  # that all runs in the dataset folder may send
    max_total_tokens: Annotated[int, Field(ge=1)] | None = None  # that they may read and write
    max_cost: Annotated[float, Field(gt=0)] | None = None  # that they may cost, by the prices above
    max_failure_frac: float = Field(default=0.9, ge=0, le=1)  # of the last 100 replies that may be unusable; 1: all

    @model_validator(mode="after")
    def _knows_what_the_budget_buys(self) -> "ServerConfig":
        if self.max_cost is not None and not self._has_prices:
            raise ValueError("max_cost needs a price: price_in, price_out or both")
        return self

    @property
    def has_budget(self) -> bool:
        """Whether requests, tokens or money are limited."""
        return (self.max_requests, self.max_total_tokens, self.max_cost) != (None, None, None)

    @property
    def _has_prices(self) -> bool:
        return any(price is not None for price in (self.price_in, self.price_out, self.judge_price_in, self.judge_price_out))

    def endpoint(self, url: str) -> EndpointConfig:
        """Return the settings of the server at this address: its own values, else those for all; the key its own."""
        address = address_of(url)
        own = next((of for name, of in self.endpoints.items() if address_of(name) == address), EndpointConfig())
        own_names = {name.lower() for name in own.headers}
        return EndpointConfig(
            key_env=own.key_env,
            headers={name: value for name, value in self.headers.items() if name.lower() not in own_names} | own.headers,
            requests_per_minute=own.requests_per_minute or self.requests_per_minute,
            tokens_per_minute=own.tokens_per_minute or self.tokens_per_minute,
            weight=own.weight,
        )

    def price(self, read: float, written: float, judge_read: float = 0, judge_written: float = 0) -> float | None:
        """Return what so many tokens cost, those of the judge included; None if no price is known."""
        if not self._has_prices:
            return None
        price_in, price_out = self.price_in or 0, self.price_out or 0
        judge_in = price_in if self.judge_price_in is None else self.judge_price_in
        judge_out = price_out if self.judge_price_out is None else self.judge_price_out
        of_writer = (read - judge_read) * price_in + (written - judge_written) * price_out
        return (of_writer + judge_read * judge_in + judge_written * judge_out) / 1e6


class FilterConfig(Section):
    """Bounds on the texts that are kept; words are counted after openings such as "The image shows" are removed."""

    min_caption_words: Annotated[int, Field(ge=1)] | None = None  # None: 5 in English, and 3 in languages that need fewer
    max_caption_words: int = Field(default=150, ge=1)
    min_question_words: int = Field(default=3, ge=1)
    max_question_words: int = Field(default=30, ge=1)
    max_answer_words: int = Field(default=10, ge=1)
    max_duplicate_trigram_frac: float = Field(default=0.4, ge=0, le=1)  # in texts of twelve words or more
    min_distinct_word_frac: float = Field(default=0.35, ge=0, le=1)
    language: Annotated[Language | None, BeforeValidator(lambda code: None if code == ANY_LANGUAGE else code)] = "en"
    min_language_score: float = Field(default=0.6, ge=0, le=1)  # confidence of the detector that rejects another language
    max_non_latin_frac: float = Field(default=0.0, ge=0, le=1)  # of letters outside of quotes, if the language is Latin

    @model_validator(mode="after")
    def _allows_some_length(self) -> "FilterConfig":
        for name in ("caption", "question"):
            least, most = getattr(self, f"min_{name}_words"), getattr(self, f"max_{name}_words")
            if least is not None and least > most:
                raise ValueError(f"min_{name}_words is {least}, and max_{name}_words {most}: no text is so long")
        return self


Check = Literal["round_trip", "claims", "covers", "blind", "evidence", "alignment", "references"]


class VerifyConfig(Section):
    """Checks that ask the model about annotations again, with their thresholds. Only named checks are run."""

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
