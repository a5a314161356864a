"""What a model must answer: one pydantic model a task, seen in two ways.

`wire_schema` is what the constrained decoder enforces: types, order and enums, and only keywords that guidance really
enforces. The model itself is the rest: lengths, a question that ends with "?", an answer that is not the question.
"""

import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

AnswerType = Literal["yes/no", "number", "other"]
# Something to read on one line: no control characters, and not only spaces.
_LINE = r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$"
Line = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=_LINE)]

MAX_QA_PAIRS = 8


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
        if not self.question.endswith("?"):
            raise PydanticCustomError("question_without_mark", "the question does not end with a question mark")
        if self.answer.casefold() == self.question.casefold():
            raise PydanticCustomError("answer_repeats_question", "the answer repeats the question")
        if self.answer_type == "yes/no" and self.answer.casefold() not in ("yes", "no"):
            raise PydanticCustomError("answer_not_yes_or_no", "the answer to a yes/no question is neither yes nor no")
        return self


class QASet(Output):
    """Task `qa`: a few pairs about one image."""

    qa: Annotated[list[QAPair], Field(min_length=1, max_length=MAX_QA_PAIRS)]


class Answer(Output):
    """Task `answer`: the answer to a question that somebody else asked."""

    answer: Line


OUTPUTS: dict[str, type[Output]] = {"caption": Caption, "qa": QASet, "answer": Answer}
ANNOTATIONS: dict[str, type[Output]] = {"caption": Caption, "qa": QAPair, "answer": Answer}  # what one row holds

# Lengths and patterns are checked afterwards, on the full model: a grammar that counts characters is slow,
# and a model that is cut off in the middle of a sentence by it is worth less than a rejected row.
_NOT_ON_THE_WIRE = frozenset({"title", "description", "minLength", "maxLength", "pattern", "default"})


def broken_rule(task: str, fields: dict[str, Any]) -> str | None:
    """Return the first rule that an annotation breaks, as a word for its rejected row; None where it is sound."""
    model = ANNOTATIONS[task]
    try:
        model.model_validate({name: fields.get(name) for name in model.model_fields})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return "_".join([*(str(part) for part in first["loc"]), str(first["type"])])
    return None


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
