"""The definition of a task, and the base class of all output models.

A task has two models. The output model describes a whole reply. The constrained decoder enforces types, field
order and enums of the output model (the wire schema). The row model describes one annotation in a reply, and
checks all other rules, such as lengths.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

from pipeline.config.sections import GenerateConfig
from pipeline.tasks.boxes import Frame
from pipeline.text.normalize import tidy

# One line of text without control characters that has at least one non-space character.
_LINE = r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$"
MAX_LINE_CHARACTERS = 100_000
Line = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LINE_CHARACTERS, pattern=_LINE)]
MAX_QA_PAIRS = 8
# These are the ASCII, the Chinese and Japanese, and the Arabic question mark.
QUESTION_MARKS = ("?", "\uff1f", "\u061f")
# A deck has at most this many pages, as in SlideVQA.
MAX_PAGES = 20
# By default, an image has at most 1,280 tokens of 28 x 28 px, as Qwen's model card recommends. Tasks about
# small print or exact positions allow 2,560 tokens.
MAX_PIXELS, MAX_DETAIL_PIXELS = 1_003_520, 2_007_040
# JSON may hold these characters, but a table may not.
_SURROGATE = re.compile("[\ud800-\udfff]")
# "a cat and a cat and a cat and a cat and" repeats three words four times.
MAX_REPEATS = 4
# The row model checks lengths and patterns. A grammar that counts characters is slow and cuts sentences off.
_NOT_ON_THE_WIRE = frozenset({"title", "description", "minLength", "maxLength", "pattern", "default"})


class Output(BaseModel):
    """Base class of all output models. Refuses unknown keys, and does not change strings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def tidy_texts(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row with tidy strings, so that a line break does not lead to a rejection."""
    return {name: tidy(value) if isinstance(value, str) else value for name, value in fields.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Defines the request to a model about a sample, and the conversion of a reply to rows."""

    name: str
    output: type[Output]
    row: type[Output]
    # This field of a reply lists the rows. Without it, the reply is one row.
    rows_field: str | None = None
    # A plain reply without JSON becomes the value of this field.
    plain_field: str | None = None
    tidy_row: Callable[[dict[str, Any]], dict[str, Any]] = tidy_texts
    # This field of a row fills the column `text`.
    text_field: str | None = None
    asks_about_decks: bool = False
    # There is one request for each of `generate.caption_styles`.
    has_styles: bool = False
    temperature_key: str = "qa_temperature"
    card_category: str | None = None
    # Images that do not meet this condition are dropped.
    keep_if: str | None = None
    # The prompt uses the results of these tasks or caption styles.
    needs: tuple[str, ...] = ()
    shows_image: bool = True
    # None means generate.max_tokens.
    max_tokens: int | None = None
    # None means filter.language.
    language: str | None = None
    box_field: str | None = None
    own_prompt: str | None = None
    # Images may have up to MAX_DETAIL_PIXELS.
    shows_detail: bool = False

    def wire_schema(self) -> dict[str, Any]:
        """Return the JSON schema that the decoder enforces, unless the prompt asks for a plain text."""
        return dict(strip_schema(self.output.model_json_schema()))

    def asks_for_json(self, prompt: str) -> bool:
        """Return whether a prompt asks for JSON. A template may do so for a task with plain replies."""
        return self.plain_field is None or f'{{"{self.plain_field}":' in prompt

    def max_pixels(self, style: str = "") -> int:
        """Return the default bound on the pixels of an image."""
        return MAX_DETAIL_PIXELS if self.shows_detail or style == "ocr" else MAX_PIXELS

    def temperature(self, generate: GenerateConfig) -> float:
        """Return the sampling temperature for the first attempt."""
        return float(getattr(generate, self.temperature_key))

    @property
    def prompt(self) -> str:
        """The name of a built-in task's prompt template."""
        return f"{self.name}/v1"

    @property
    def result_schema(self) -> dict[str, Any]:
        """The closed schema (output_schema.py) of the result that conditions use."""
        return {"type": "array", "items": {"type": "object"}} if self.rows_field else {"type": "string"}

    def rows_of(self, reply: Any) -> list[Any] | None:
        """Return the rows of a parsed reply, or None if it has no list of rows. A bare list is accepted."""
        rows: Any = [reply]
        if self.rows_field:
            rows = reply.get(self.rows_field) if isinstance(reply, dict) else reply
        return rows if isinstance(rows, list) else None

    def nothing_found(self) -> tuple[dict[str, Any], str | None]:
        """Return the columns and the error for a reply with an empty list of rows."""
        return {}, "off_schema"

    def read_row(self, item: Any, frame: Frame | None = None) -> tuple[dict[str, Any], str | None]:  # noqa: ARG002
        """Return the columns of one row of a reply, and an error or None. `frame` is for converting boxes."""
        if isinstance(item, str) and len(self.row.model_fields) == 1:
            item = dict.fromkeys(self.row.model_fields, item)
        item = _with_texts(item)
        if not _is_readable(item):
            return {}, "off_schema"
        fields = self.tidy_row(item)
        columns = fields if self.text_field is None else {**fields, "text": fields.get(self.text_field)}
        return columns, find_unusable(texts_in(fields))


def texts_in(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, except field names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def find_unusable(texts: Iterable[str]) -> str | None:
    """Return an error code if a text is a refusal or repeats itself in a loop, or else None."""
    from pipeline.text.refusals import is_declined  # this import compiles large regular expressions

    texts = list(texts)
    if any(map(is_declined, texts)):
        return "refusal"
    return "repeats_itself" if any(_repeats(text.casefold().split()) for text in texts) else None


def has_surrogate(value: Any) -> bool:
    """Return whether a string or field name in a JSON value has half of a surrogate pair."""
    return bool(_SURROGATE.search(json.dumps(value, ensure_ascii=False)))


def _repeats(words: list[str]) -> bool:
    """Return whether a text ends with MAX_REPEATS repetitions of the same one to eight words."""
    sizes = range(1, min(8, len(words) // MAX_REPEATS) + 1)
    return any(words[-size * MAX_REPEATS :] == words[-size:] * MAX_REPEATS for size in sizes)


def _with_texts(item: Any) -> Any:
    """Convert numbers and booleans to strings, because some servers enforce no schema."""
    if not isinstance(item, dict):
        return item
    words = {True: "yes", False: "no"}
    scalars = {name: value for name, value in item.items() if isinstance(value, bool | int | float)}
    return item | {name: words[v] if isinstance(v, bool) else str(v) for name, v in scalars.items()}


def _is_readable(item: Any) -> bool:
    """Return whether an item fits in a table: all fields are strings, or page numbers in `evidence_pages`."""
    if not isinstance(item, dict):
        return False
    pages = item.get("evidence_pages", [])
    has_pages = isinstance(pages, list) and all(type(page) is int and 0 < page < 2**31 for page in pages)
    texts = [value for name, value in item.items() if name != "evidence_pages"]
    return has_pages and all(isinstance(text, str) and not _SURROGATE.search(text) for text in texts)


def check_question(question: str, answer: str) -> None:
    """Raise PydanticCustomError if a question has no question mark at the end, or equals the answer."""
    if not question.endswith(QUESTION_MARKS):
        raise PydanticCustomError("question_without_mark", "the question does not end with a question mark")
    if answer.casefold() == question.casefold():
        raise PydanticCustomError("answer_repeats_question", "the answer repeats the question")


def strip_schema(node: Any, *, is_properties: bool = False) -> Any:
    """Return a JSON schema without keywords that decoders need not enforce. The row model checks them."""
    if isinstance(node, dict):
        return {
            key: strip_schema(value, is_properties=key in ("properties", "$defs") and not is_properties)
            for key, value in node.items()
            if is_properties or key not in _NOT_ON_THE_WIRE
        }
    return [strip_schema(item) for item in node] if isinstance(node, list) else node
