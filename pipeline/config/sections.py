"""The sections of the settings, and the forms of their values. docs/settings.md explains each key."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from pipeline.text.language_codes import RECOGNISED
from pipeline.text.phrases import PhraseKind
from pipeline.types import DEFAULT_MODEL

TASK, STYLE = r"^[a-z][a-z0-9_]*$", r"^[a-z][a-z0-9-]*$"
ANY_LANGUAGE = "any"
JUDGE = r"^/?[^\s@/:]+([/:][^\s@/:]+)*(@[^\s@:/]+)?(@https?://[^/\s?#@]+(/[^\s?#]*)?)?$"
LANGUAGE = r"^[a-z]{2,3}$"
FIELD = r"^[A-Za-z][A-Za-z0-9_]*$"
NEED = r"^[a-z][a-z0-9_-]*$"
BASE_URL = r"^https?://[^/\s?#@]+(/[^\s?#]*)?$"
HEADER = r"^[A-Za-z0-9-]+$"
HEADER_VALUE = r"^[^\x00-\x08\x0a-\x1f\x7f]*$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
TITLE = r"^[^\x00-\x1f]+$"
LICENSE = r"^[A-Za-z0-9][A-Za-z0-9 .,+-]*$"
# Descriptions for error messages: "X is not ...".
PATTERNS = {
    TASK: "a name in lower case: letters, digits and _",
    STYLE: "the name of a caption style, in lower case",
    LANGUAGE: "a language code of two or three letters, such as de",
    JUDGE: "a model and its server, such as MODEL@http://HOST:8000/v1",
    BASE_URL: "an address with http:// or https://, without a login or a query, such as http://HOST:8000/v1 "
    "(Azure: https://NAME.openai.azure.com/openai/v1)",
    HEADER: "a header name",
    HEADER_VALUE: "a header value on one line",
    VARIABLE: "the name of an environment variable",
    FIELD: "the name of a field: letters, digits and _",
    NEED: "the name of a task or of a caption style",
    TITLE: "a title on one line",
    LICENSE: "the name of a license, such as cc-by-4.0",
}
Task = Annotated[str, Field(pattern=TASK, max_length=40)]
ModelName = Task
Style = Annotated[str, Field(pattern=STYLE, max_length=40)]
# In `verify.judge: MODEL@URL`, this separates the model from the URL.
AT_SERVER = "@http"
AnySection = TypeVar("AnySection", bound="Section")
Item = TypeVar("Item")


def _require_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("named twice")
    return values


def _require_known_language(code: str) -> str:
    if code not in {*RECOGNISED, ANY_LANGUAGE}:
        raise ValueError(f"this language cannot be detected; `{ANY_LANGUAGE}` accepts texts in all languages")
    return code


_as_list = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
_fix_norwegian = BeforeValidator(lambda code: "no" if code is False else code)  # YAML reads `no` as false
Language = Annotated[str, _fix_norwegian, Field(pattern=LANGUAGE), AfterValidator(_require_known_language)]
Distinct = Annotated[tuple[Item, ...], AfterValidator(_require_distinct)]
# One model, or several that are asked one after another until a text passes all checks.
Ladder = Annotated[Distinct[ModelName], _as_list, Field(min_length=1)]


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _refuse_boolean_as_number(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        result = validate(value)
        if isinstance(value, bool) and type(result) in (int, float):
            raise ValueError("Input should be a number")
        return result


# --- addresses of servers


def address_of(url: str) -> str:
    """Return the normalized URL of a server, with the path /v1 if it has none. Raises ValueError."""
    parts = urlsplit(url.rstrip("/").removesuffix("/chat/completions"))
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    default_port = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in (None, default_port) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/') or '/v1'}"


# --- tasks


def _as_json(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("this is neither a JSON schema nor the path of a file that ends in .json")
    return json.dumps(value, ensure_ascii=False, default=str)


PromptText = Annotated[str, Field(pattern=r"\S", max_length=20_000)]
# A condition such as `row.width_px >= 256`. Conditions are stored as pairs, and schemas as strings, because
# caches need hashable settings.
Expression = Annotated[str, Field(pattern=r"\S", max_length=1000)]
_as_pairs = BeforeValidator(lambda values: tuple(values.items()) if isinstance(values, dict) else values)
Conditions = Annotated[tuple[tuple[str, Expression], ...], _as_pairs, PlainSerializer(dict)]
# A JSON schema, whose fields keep their order.
OutputSchema = Annotated[str, BeforeValidator(_as_json), PlainSerializer(json.loads)]
# Boxes are in pixels of the resized image, or in thousandths of its sides.
BoxUnit = Literal["pixels", "thousandths"]
Kind = Literal["caption", "question", "labels", "boxes", "text", "record"]
Label = Annotated[str, Field(pattern=TITLE, min_length=1, max_length=200)]


class TaskConfig(Section):
    """A custom task: its prompt, its replies, and the column that they fill. See docs/custom-tasks.md."""

    name: Task
    kind: Kind
    prompt: PromptText  # a task file may give the path of a template (.j2)
    output: OutputSchema | None = None
    field: Annotated[str, Field(pattern=FIELD)] | None = None
    rows: Annotated[str, Field(pattern=FIELD)] | None = None
    labels: Distinct[Label] = ()
    needs: Distinct[Annotated[str, Field(pattern=NEED)]] = ()
    when: Expression | None = None  # the task is asked only about images for which this is true
    keep_if: Expression | None = None  # if false, the image is dropped before other tasks are asked
    show_image: bool = True
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_words: Annotated[int, Field(ge=1)] | None = None
    max_words: Annotated[int, Field(ge=1)] | None = None
    language: Language | None = None
    coordinates: BoxUnit = "pixels"
    model: Ladder | None = None

    @model_validator(mode="after")
    def _require_possible_length(self) -> "TaskConfig":
        _require_order("min_words", self.min_words, "max_words", self.max_words)
        return self


def _require_order(min_name: str, least: int | None, max_name: str, most: int | None) -> None:
    if least is not None and most is not None and least > most:
        raise ValueError(f"{min_name} is {least}, but {max_name} is {most}: no text has such a length")


def task_names(tasks: Any) -> Any:
    """Return the names of custom tasks, with None for each task that has no name."""
    return [one.get("name") if isinstance(one, dict) else getattr(one, "name", None) for one in tasks or ()]


# --- sections


class GenerateConfig(Section):
    """Prompts and sampling of the model."""

    caption_styles: Distinct[Style] = Field(default=("brief", "detailed"), min_length=1)
    """Caption styles, one request each: `plain`, `detailed`, `dense`, `brief`, `alt`, `tags`, `ocr`, or
    those of your template in `prompt_dir`. Drawn scenes use `brief` and `detailed`.
    """
    when: Conditions = ()
    """Conditions of built-in tasks and caption styles, such as `{qa: row.width_px >= 256}`. Other images are
    skipped for the task. docs/conditions.md explains them.
    """
    caption_words: Annotated[int, Field(ge=1, le=400)] | None = None
    """Approximate number of words per caption. Null uses the length of the style."""
    caption_temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of captions. 0 is greedy."""
    samples: int = Field(default=1, ge=1, le=64)
    """Captions per image and style. The step `select` keeps the best."""
    sample_temperature: float = Field(default=0.5, gt=0, le=2)
    """Temperature of the second and later `samples`, unless the temperature of the first is higher."""
    qa_temperature: float = Field(default=0.3, ge=0, le=2)
    """Sampling temperature of questions. At 0 the model asks similar questions about every image. Higher
    values give less accurate answers.
    """
    max_tokens: int = Field(default=256, ge=1)
    """Maximum tokens of a reply. Long captions may have more: `dense` 768, `ocr` 2,048, and 3 per word of
    `caption_words`. A longer reply is requested again with twice the limit.
    """
    max_attempts: int = Field(default=3, ge=1)
    """Attempts to get a usable reply. After the last attempt, the row is rejected."""
    max_pixels: Annotated[int, Field(ge=28 * 28)] | Literal["auto"] | None = "auto"
    """Larger images are scaled down to this many pixels. `auto` is 1,003,520 (1,280 tokens of Qwen2.5-VL) for
    captions, questions and labels, and 2,007,040 for the style `ocr`, texts, records, boxes, decks and pages.
    Null leaves only the limit of the server's context. Drawn scenes have no limit.
    """
    prompt_dir: Path | None = None
    """Folder of prompt templates, such as `caption/v1.j2`, that replace the built-in ones. `synth init`
    writes them.
    """
    logprobs: bool = False
    """Store the mean and the minimum log-probability of the tokens of each reply, if the server returns them.
    The mean becomes a score of captions and questions.
    """
    min_logprob: Annotated[float, Field(le=0)] | None = None
    """With a ladder, also ask the next model about texts whose mean token log-probability is below this
    value. Null asks the next model only about rejected texts.
    """

    @property
    def wants_logprobs(self) -> bool:
        """Whether servers are asked for the log-probabilities of all replies."""
        return self.logprobs or self.min_logprob is not None


def _require_valid_port(url: str) -> str:
    address_of(url)
    return url


def _require_valid_judge(judge: str) -> str:
    _, at, rest = judge.partition(AT_SERVER)
    if at:
        address_of(at.removeprefix("@") + rest)
    return judge


def _refuse_key(variable: str) -> str:
    if _LIKE_A_KEY.match(variable):
        problem = "this looks like an API key; put it in an environment variable, and name the variable here"
        raise ValueError(problem)
    return variable


_LIKE_A_KEY = re.compile(r"(hf_|sk_(live_|test_)?|gsk_|ghp_|r8_|xai_|AIza)(?=[a-zA-Z]*\d)[a-zA-Z0-9]{12,}$")
BaseUrl = Annotated[str, Field(pattern=BASE_URL), AfterValidator(_require_valid_port)]
KeyVariable = Annotated[str, Field(pattern=VARIABLE), AfterValidator(_refuse_key)]
Headers = dict[Annotated[str, Field(pattern=HEADER)], Annotated[str, Field(pattern=HEADER_VALUE)]]
Price = Annotated[float, Field(ge=0)]
EngineName = Literal["auto", "embedded", "vllm"]


class ServerConfig(Section):
    """How vLLM is started and servers are used. Only flags that affect replies invalidate stored replies."""

    flags: tuple[str, ...] = ()
    """Flags for vLLM, like the arguments after `--` on the command line."""
    startup_timeout_s: float = Field(default=900, gt=0)
    """Seconds to load a model, or to wait for a server that is down."""
    max_restarts: int = Field(default=3, ge=0)
    """Maximum restarts of a vLLM server that dies."""
    request_timeout_s: float = Field(default=600, gt=0)
    """Seconds to wait for a reply."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests in flight. Null uses 1.25 times `--max-num-seqs` for vLLM started here, and 32 to 128 for
    another server, depending on its speed.
    """
    key_env: KeyVariable | None = None
    """Environment variable with the key of the servers. Null uses `SYNTH_API_KEY`, or `OPENAI_API_KEY` for
    openai.com.
    """
    headers: Headers = Field(default_factory=dict)
    """Headers of each request. A value such as `$MY_KEY` is read from the environment. Other values are
    stored in `run.json`.
    """
    enforced_schema: bool = True
    """Refuse a server that does not enforce JSON schemas."""
    price_in: Price | None = None
    """Price of a million prompt tokens."""
    price_out: Price | None = None
    """Price of a million reply tokens."""
    max_requests: Annotated[int, Field(ge=1)] | None = None
    """Stop when all runs in the dataset folder together have sent this number of requests."""
    max_total_tokens: Annotated[int, Field(ge=1)] | None = None
    """Stop when all runs in the dataset folder together have used this number of input and output tokens."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Stop when all runs in the dataset folder together have cost this, by `price_in` and `price_out`."""
    max_failure_frac: float = Field(default=0.9, ge=0, le=1)
    """Stop when more than this share of the last 100 replies is unusable. Replies to retries do not count.
    1 never stops.
    """

    @property
    def has_budget(self) -> bool:
        """Whether requests, tokens or money are limited."""
        return (self.max_requests, self.max_total_tokens, self.max_cost) != (None, None, None)

    def price(self, read: float, written: float) -> float | None:
        """Return the cost of tokens, or None if no price is known."""
        if self.price_in is None and self.price_out is None:
            return None
        return (read * (self.price_in or 0) + written * (self.price_out or 0)) / 1e6


Servers = Mapping[str, ServerConfig]


def cost_of(tokens: Mapping[str, tuple[float, float]], servers: Servers) -> float | None:
    """Return the cost of prompt and reply tokens by model, or None if no price is known."""
    # The journal may have replies of a model that is no longer in the settings. The price of the default
    # model is used for them.
    costs = [servers.get(name, servers[DEFAULT_MODEL]).price(*used) for name, used in tokens.items()]
    known = [cost for cost in costs if cost is not None]
    return sum(known) if known else None


class ModelConfig(Section):
    """A model in `models`, with its engine or servers. All other settings come from the section `server`."""

    model: str | None = None
    base_url: Distinct[BaseUrl] = ()
    engine: EngineName = "auto"
    key_env: KeyVariable | None = None  # null: SYNTH_<NAME>_API_KEY
    headers: Headers = Field(default_factory=dict)
    flags: tuple[str, ...] = ()
    concurrency: Annotated[int, Field(ge=1)] | None = None
    price_in: Price | None = None
    price_out: Price | None = None

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "ModelConfig":
        if self.engine == "embedded" and self.base_url:
            raise ValueError("`base_url` and `engine: embedded` cannot be combined")
        if self.flags and (self.base_url or self.engine == "embedded"):
            raise ValueError("`flags` are for vLLM, but synth starts no server for this model")
        return self


class ImageFilterConfig(Section):
    """Bounds on images. Images outside of them are rejected before the model is asked."""

    enabled: bool = True
    """Reject images that are too small, too narrow or of one color. False keeps these images."""
    min_side_px: int = Field(default=32, ge=1)
    """Minimum pixels of the shorter side."""
    max_aspect_ratio: float = Field(default=20.0, ge=1)
    """Maximum length of the longer side, as a multiple of the shorter side."""
    min_contrast: float = Field(default=5.0, ge=0, le=255)
    """Minimum difference of a color channel (0 to 255) between two areas, each 1/64 of the width and height.
    Black and blank images have less than 5.
    """


class FilterConfig(Section):
    """Bounds on texts. Words are counted without openings such as "The image shows"."""

    min_caption_words: Annotated[int, Field(ge=1)] | None = None
    """Minimum words of a caption. Null uses the bound of the style: 3 for `alt`, 30 for `dense`, 2 for
    `tags`, 1 for `ocr`, and for others 5 in English and 3 in other languages.
    """
    max_caption_words: Annotated[int, Field(ge=1)] | None = None
    """Maximum words of a caption. Null uses the bound of the style: 150 for `plain` and `brief`, 30 for
    `alt`, 300 for `detailed`, 60 for `tags`, none for `ocr`, and 600 for others.
    """
    max_caption_characters: Annotated[int, Field(ge=1)] | None = None
    """Maximum characters of a caption. Null uses 125 for the style `alt`, and no limit for other styles."""
    min_question_words: int = Field(default=3, ge=1)
    """Minimum words of a question."""
    max_question_words: int = Field(default=30, ge=1)
    """Maximum words of a question."""
    max_answer_words: int = Field(default=10, ge=1)
    """Maximum words of an answer."""
    max_duplicate_trigram_frac: float = Field(default=0.4, ge=0, le=1)
    """Maximum share of repeated trigrams, in texts of twelve words or more."""
    min_distinct_word_frac: float = Field(default=0.35, ge=0, le=1)
    """Minimum share of distinct words, in texts of twelve words or more."""
    reject_phrases: Distinct[PhraseKind] = ()
    """Reject English captions with these phrases: `hedge` (possibly, appears to be), `mood` (a sense of
    calm), `absence` (there are no cars), `image` (the image). The manifest counts them if the
    language is English or `any`.
    """
    language: Annotated[
        Language | None, BeforeValidator(lambda code: None if code == ANY_LANGUAGE else code)
    ] = "en"
    """ISO 639 code of the language of prompts and texts. `any` keeps all languages."""
    min_language_score: float = Field(default=0.6, ge=0, le=1)
    """Reject a text only if the language detector has at least this confidence."""
    max_non_latin_frac: float = Field(default=0.0, ge=0, le=1)
    """Maximum share of non-Latin letters outside of quotes, for languages in Latin script."""

    @model_validator(mode="after")
    def _require_possible_lengths(self) -> "FilterConfig":
        for text in ("caption", "question"):
            low, high = f"min_{text}_words", f"max_{text}_words"
            _require_order(low, getattr(self, low), high, getattr(self, high))
        return self


Check = Literal["round_trip", "claims", "covers", "blind", "evidence", "alignment"]


class VerifyConfig(Section):
    """Checks of annotations. With a null threshold, a check only measures."""

    checks: Distinct[Check] = ()
    """Checks: `round_trip`, `claims`, `covers`, `blind`, `evidence`, `alignment`."""
    when: Conditions = ()
    """Conditions of checks, `repair` and `judge`, such as `{judge: scores.precision < 0.8}`. Other texts are
    kept without the check.
    """
    calibration: int = Field(default=200, ge=0)
    """Maximum images whose human captions measure how often `claims` refutes true claims. 0 also turns
    `max_true_captions_lost` off.
    """
    max_true_captions_lost: float = Field(default=0.1, ge=0, le=1)
    """Maximum share of true captions that `claims` may reject, estimated with human captions."""
    repair: bool = False
    """Rewrite captions that have a false claim. Needs the check `claims`."""
    judge: Annotated[str, Field(pattern=JUDGE), AfterValidator(_require_valid_judge)] | None = None
    """Second model that scores each text: a name in `models`, or `MODEL@URL`."""
    min_rating: Annotated[int, Field(ge=1, le=5)] | None = None
    """Minimum of each score of the judge, from 1 to 5. Null rejects no text."""
    min_coverage: Annotated[float, Field(ge=0, le=1)] | None = None
    """Minimum share of the image's questions that a caption answers. Null rejects no text."""
    min_blind_frac: float = Field(default=0.8, gt=0, le=1)
    """A question counts as answerable without an image if this share of its images has the same answer."""
    clip_model: str = "auto"
    """CLIP of the check `alignment`: `auto`, `clip`, `metaclip`, `tiny-clip`, a folder or a Hub id."""
    min_alignment: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Minimum cosine similarity of image and caption. Null uses `lowest_alignment_frac`."""
    lowest_alignment_frac: float = Field(default=0.05, ge=0, lt=1)
    """Share of the captions of each style that is rejected as least similar to their images."""

    @model_validator(mode="after")
    def _require_claims_for_repair(self) -> "VerifyConfig":
        if self.repair and "claims" not in self.checks:
            raise ValueError("`repair` needs the check `claims`, so pass --verify claims")
        return self

    @property
    def is_asked(self) -> bool:
        """Whether any check or judge is enabled."""
        return bool(self.checks or self.judge)


class SelectConfig(Section):
    """How the best of several captions of one image and style is chosen (generate.samples)."""

    by: Literal["likelihood", "clip", "judge"] = "likelihood"
    """Rule that chooses the best of `generate.samples` captions: `likelihood`, `clip` or `judge`."""
    pairs: bool = False
    """Store the worst caption next to the best, as `captions[].rejected`."""


class DedupeConfig(Section):
    """Which images and captions count as duplicates."""

    images: Literal["auto", "photos", "graphics", "none"] = "auto"
    """`photos` rejects near-duplicates, `graphics` only groups them, `none` compares no images. `auto` uses
    `graphics` for decks and pages, `none` for drawn scenes, and `photos` otherwise.
    """
    max_images_per_caption: int = Field(default=5, ge=1)
    """Maximum images that share one caption."""


class BalanceConfig(Section):
    """Limits on over-represented answers."""

    max_answer_frac: float = Field(default=0.4, gt=0, le=1)
    """Maximum share of one answer among the questions of one type."""
    max_yes_no_frac: float = Field(default=0.55, ge=0.5, le=1)
    """Like `max_answer_frac`, for types with at most two different answers, or with the answer yes or no."""
    min_questions_per_type: int = Field(default=50, ge=1)
    """Types with fewer questions are treated as one type."""

    def max_share(self, answers: Collection[str]) -> float:
        """Return the maximum share of one answer. `answers` are the distinct answers of one type."""
        is_binary = len(answers) <= 2 or {"yes", "no"} & set(answers)
        return self.max_yes_no_frac if is_binary else self.max_answer_frac


class SplitConfig(Section):
    """The shares of images that are held out. The rest is `train`."""

    validation_frac: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images in the validation split, if the source has no splits."""
    test_frac: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images in the test split, if the source has no splits."""
    group_by: Literal["folder", "prefix"] | None = None
    """`folder` keeps the images of each subfolder in one split, `prefix` keeps images together whose names
    differ only in the last number. Null uses `folder` for documents and videos.
    """

    @model_validator(mode="after")
    def _require_training_images(self) -> "SplitConfig":
        if self.validation_frac + self.test_frac >= 1:
            raise ValueError("validation_frac and test_frac must add up to less than 1")
        return self
