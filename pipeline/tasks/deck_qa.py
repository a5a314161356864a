"""Task: deck_qa. A few questions about a deck of pages, with evidence pages and arithmetic."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from pipeline.tasks.arithmetic import equals_rounded
from pipeline.tasks.base import MAX_PAGES, MAX_QA_PAIRS, Line, Output, Task, check_question

DeckAnswerType = Literal["span", "number", "arithmetic"]


class DeckQAPair(Output):
    """One question about a deck. Pages come before the question, and the calculation before the answer, to plan first.

    Validate with the context {"pages": number of pages}, so that evidence cannot lie outside of the deck.
    """

    answer_type: DeckAnswerType
    evidence_pages: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_PAGES)], ...], Field(min_length=1, max_length=MAX_PAGES)]
    question: Line
    expression: Annotated[str, StringConstraints(max_length=200)]
    answer: Line

    @model_validator(mode="after")
    def _is_a_question_about_the_deck(self, info: ValidationInfo) -> "DeckQAPair":
        check_question(self.question, self.answer)
        if list(self.evidence_pages) != sorted(set(self.evidence_pages)):
            raise PydanticCustomError("evidence_not_in_order", "evidence pages are in order, each once")
        if info.context and self.evidence_pages[-1] > info.context["pages"]:
            raise PydanticCustomError("evidence_outside_deck", "an evidence page lies outside of the deck")
        if self.answer_type == "arithmetic" and not equals_rounded(self.expression, self.answer):
            raise PydanticCustomError("expression_disagrees", "the expression does not evaluate to the answer")
        if self.answer_type != "arithmetic" and self.expression:
            raise PydanticCustomError("expression_not_asked_for", "an expression belongs to arithmetic only")
        return self


class DeckQASet(Output):
    """Task `deck_qa`: a few pairs about one deck."""

    qa: Annotated[tuple[DeckQAPair, ...], Field(min_length=1, max_length=MAX_QA_PAIRS)]


TASK = Task(
    name="deck_qa",
    output=DeckQASet,
    row=DeckQAPair,
    rows_field="qa",
    asks_about_decks=True,
    card_category="document-question-answering",
)
