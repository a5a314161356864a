"""What the output models of all tasks share."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

# Something to read on one line: no control characters, and not only spaces.
_LINE = r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$"
Line = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=_LINE)]
MAX_QA_PAIRS = 8
MAX_PAGES = 20  # of a deck; SlideVQA's have no more
# Lengths and patterns are checked afterwards, on the full model: a grammar that counts characters is slow,
# and a model that is cut off in the middle of a sentence by it is worth less than a rejected row.
_NOT_ON_THE_WIRE = frozenset({"title", "description", "minLength", "maxLength", "pattern", "default"})


class Output(BaseModel):
    """Base of all outputs: unknown keys are refused, text is taken as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_question(question: str, answer: str) -> None:
    if not question.endswith("?"):
        raise PydanticCustomError("question_without_mark", "the question does not end with a question mark")
    if answer.casefold() == question.casefold():
        raise PydanticCustomError("answer_repeats_question", "the answer repeats the question")


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
