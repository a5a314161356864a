"""Tasks of the step `verify`, which checks annotations by further requests. Users cannot select these tasks.

`answer` and `rate` show the image. `claims`, `covers`, `repair` and blind questions show only text.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tasks.base import QUESTION_MARKS, Line, Output, Task
from pipeline.tasks.caption import Caption, tidy_caption

MAX_CLAIMS = 8
Score = Literal["1", "2", "3", "4", "5"]


class Answer(Output):
    """The answer to a question about an image (task `answer`) or about a caption (task `covers`)."""

    answer: Line


class ClaimProbes(Output):
    """One claim, with a question that expects "yes" and an opposite one that exposes constant answers."""

    claim: Line
    question: Line
    opposite: Line

    @model_validator(mode="after")
    def _check_questions(self) -> "ClaimProbes":
        if not (self.question.endswith(QUESTION_MARKS) and self.opposite.endswith(QUESTION_MARKS)):
            raise PydanticCustomError(
                "question_without_mark", "the question does not end with a question mark"
            )
        if self.question.casefold() == self.opposite.casefold():
            raise PydanticCustomError(
                "opposite_repeats_question", "the opposite question repeats the question"
            )
        return self


class ClaimSet(Output):
    """The claims of one caption."""

    claims: Annotated[list[ClaimProbes], Field(min_length=1, max_length=MAX_CLAIMS)]


class Rating(Output):
    """A judge's rating of a text: the problem in a few words, and one score per criterion."""

    flaw: Annotated[str, StringConstraints(max_length=2000)]  # empty if nothing is wrong
    relevance: Score
    grounding: Score
    correctness: Score
    form: Score


ANSWER = Task(name="answer", output=Answer, row=Answer)
BLIND = Task(name="answer", output=Answer, row=Answer, shows_image=False)
CLAIMS = Task(name="claims", output=ClaimSet, row=ClaimProbes, rows_field="claims", shows_image=False)
COVERS = Task(name="covers", output=Answer, row=Answer, shows_image=False)
RATE = Task(name="rate", output=Rating, row=Rating)
REPAIR = Task(  # removes false claims
    name="repair", output=Caption, row=Caption, tidy_row=tidy_caption, shows_image=False
)
CHECKING = (ANSWER, CLAIMS, COVERS, RATE, REPAIR)
