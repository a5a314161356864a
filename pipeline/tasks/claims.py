"""Task: claims. The claims of a caption, each with a question that expects yes and one that expects no.

It is asked about a text, without the image; the stage verify then asks the questions about the image.
"""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tasks.base import QUESTION_MARKS, Line, Output, Task

MAX_CLAIMS = 8


class ClaimProbes(Output):
    """One claim, and two questions about it: a model that likes to say yes fails the second."""

    claim: Line
    question: Line
    opposite: Line

    @model_validator(mode="after")
    def _are_two_questions(self) -> "ClaimProbes":
        if not (self.question.endswith(QUESTION_MARKS) and self.opposite.endswith(QUESTION_MARKS)):
            raise PydanticCustomError("question_without_mark", "the question does not end with a question mark")
        if self.question.casefold() == self.opposite.casefold():
            raise PydanticCustomError("opposite_repeats_question", "the opposite question is the question")
        return self


class ClaimSet(Output):
    """Task `claims`: the claims of one caption."""

    claims: Annotated[list[ClaimProbes], Field(min_length=1, max_length=MAX_CLAIMS)]


TASK = Task(name="claims", output=ClaimSet, row=ClaimProbes, rows_field="claims")
