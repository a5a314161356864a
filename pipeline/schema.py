"""What a model must answer: one pydantic model a task, seen in two ways.

`wire_schema` is what the constrained decoder enforces: types, order and enums, and only keywords that guidance really
enforces. The model itself is the rest: lengths, a question that ends with "?", an answer that is not the question.
"""

import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from pipeline.arithmetic import agrees

AnswerType = Literal["yes/no", "number", "other"]
# Something to read on one line: no control characters, and not only spaces.
_LINE = r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$"
Line = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=_LINE)]

DeckAnswerType = Literal["span", "number", "arithmetic"]

MAX_QA_PAIRS = 8
MAX_PAGES = 20  # of a deck; SlideVQA's have no more


class Output(BaseModel):
    """Base of all outputs: unknown keys are refused, text is taken as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Caption(Output):
    """Task `caption`: one description of one image."""

    caption: Line


class QAPair(Output):
    """One question about the image with its answer. The type comes first: the model plans before it asks."""

    answer_type: AnswerType
    question: Line
    answer: Line

    @model_validator(mode="after")
    def _is_a_question_with_an_answer(self) -> "QAPair":
        _check_question(self.question, self.answer)
        if self.answer_type == "yes/no" and self.answer.casefold() not in ("yes", "no"):
            raise PydanticCustomError("answer_not_yes_or_no", "the answer to a yes/no question is neither yes nor no")
        return self


class QASet(Output):
    """Task `qa`: a few pairs about one image."""

    qa: Annotated[list[QAPair], Field(min_length=1, max_length=MAX_QA_PAIRS)]


class DeckQAPair(Output):
    """One question about a deck. Its pages come before it: the model plans before it asks; the calculation before its answer.

    Validate with the context {"pages": number of pages}, so that evidence cannot lie outside of the deck.
    """

    answer_type: DeckAnswerType
    evidence_pages: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_PAGES)], ...], Field(min_length=1, max_length=MAX_PAGES)]
    question: Line
    expression: Annotated[str, StringConstraints(max_length=200)]
    answer: Line

    @model_validator(mode="after")
    def _is_a_question_about_the_deck(self, info: ValidationInfo) -> "DeckQAPair":
        _check_question(self.question, self.answer)
        if list(self.evidence_pages) != sorted(set(self.evidence_pages)):
            raise PydanticCustomError("evidence_not_in_order", "evidence pages are in order, each once")
        if info.context and self.evidence_pages[-1] > info.context["pages"]:
            raise PydanticCustomError("evidence_outside_deck", "an evidence page lies outside of the deck")
        if self.answer_type == "arithmetic" and not agrees(self.expression, self.answer):
            raise PydanticCustomError("expression_disagrees", "the expression does not evaluate to the answer")
        if self.answer_type != "arithmetic" and self.expression:
            raise PydanticCustomError("expression_not_asked_for", "an expression belongs to arithmetic only")
        return self


class DeckQASet(Output):
    """Task `deck_qa`: a few pairs about one deck."""

    qa: Annotated[tuple[DeckQAPair, ...], Field(min_length=1, max_length=MAX_QA_PAIRS)]


class Answer(Output):
    """Task `answer`: the answer to a question that somebody else asked."""

    answer: Line


OUTPUTS: dict[str, type[Output]] = {"caption": Caption, "qa": QASet, "deck_qa": DeckQASet, "answer": Answer}
ANNOTATIONS: dict[str, type[Output]] = {"caption": Caption, "qa": QAPair, "deck_qa": DeckQAPair, "answer": Answer}  # one row

# Lengths and patterns are checked afterwards, on the full model: a grammar that counts characters is slow,
# and a model that is cut off in the middle of a sentence by it is worth less than a rejected row.
_NOT_ON_THE_WIRE = frozenset({"title", "description", "minLength", "maxLength", "pattern", "default"})


def broken_rule(task: str, fields: dict[str, Any], pages: int = 1) -> str | None:
    """Return the first rule that an annotation breaks, as a word for its rejected row; None where it is sound.

    `fields` may hold more than the task's; `pages` is how many the annotated document has.
    """
    model = ANNOTATIONS[task]
    try:
        model.model_validate({name: fields.get(name) for name in model.model_fields}, context={"pages": pages})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return "_".join([*(str(part) for part in first["loc"]), str(first["type"])])
    return None


def _check_question(question: str, answer: str) -> None:
    if not question.endswith("?"):
        raise PydanticCustomError("question_without_mark", "the question does not end with a question mark")
    if answer.casefold() == question.casefold():
        raise PydanticCustomError("answer_repeats_question", "the answer repeats the question")


@cache
def wire_schema(task: str) -> dict[str, Any]:
    """Return the JSON schema that the decoder enforces for `task`; not to be changed."""
    schema: dict[str, Any] = _strip(OUTPUTS[task].model_json_schema())
    return schema


def dump(output: Output) -> str:
    """Return the one way an output is written: keys in schema order, no white space."""
    return json.dumps(output.model_dump(), ensure_ascii=False, separators=(",", ":"))


def _strip(node: Any, *, is_properties: bool = False) -> Any:
    if isinstance(node, dict):
        return {
            key: _strip(value, is_properties=key in ("properties", "$defs") and not is_properties)
            for key, value in node.items()
            if is_properties or key not in _NOT_ON_THE_WIRE
        }
    return [_strip(item) for item in node] if isinstance(node, list) else node
