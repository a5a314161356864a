"""What a model must answer: one pydantic model a task, seen in two ways.

`wire_schema` is what the constrained decoder enforces: types, order and enums, and only keywords that guidance really
enforces. The model itself is the rest: lengths, a question that ends with "?", an answer that is not the question.
"""

from functools import cache
from typing import Any

from pydantic import ValidationError

from pipeline.tasks.answer import Answer
from pipeline.tasks.base import Output, _strip
from pipeline.tasks.caption import Caption
from pipeline.tasks.deck_qa import DeckQAPair, DeckQASet
from pipeline.tasks.qa import QAPair, QASet

OUTPUTS: dict[str, type[Output]] = {"caption": Caption, "qa": QASet, "deck_qa": DeckQASet, "answer": Answer}
ANNOTATIONS: dict[str, type[Output]] = {"caption": Caption, "qa": QAPair, "deck_qa": DeckQAPair, "answer": Answer}  # one row


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


@cache
def wire_schema(task: str) -> dict[str, Any]:
    """Return the JSON schema that the decoder enforces for `task`; not to be changed."""
    schema: dict[str, Any] = _strip(OUTPUTS[task].model_json_schema())
    return schema
