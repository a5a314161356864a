"""Tasks of the step `verify`, which checks annotations by further requests. Users cannot select these tasks.

`answer`, `confirm` and `rate` show the image. `claims`, `covers`, `repair` and blind questions do not.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from pipeline.tasks.base import Line, Output, Task
from pipeline.tasks.caption import Caption, tidy_caption
from pipeline.text.language import FUNCTION_WORDS, count_words
from pipeline.text.language_codes import SENTENCE_ENDS, YES_OR_NO
from pipeline.text.normalize import words_of

MAX_CLAIMS = 24  # per caption
# Annotators listed one fact per 3.6 words of long captions (DeCapBench, 2025).
WORDS_PER_CLAIM = 3.6
CANNOT_TELL = "cannot tell"
_FIRST_WORD_ALONE = re.compile(r"\W*\w+\s*(?:[^\w\s]|$)")
# Questions about a claim, with the answers that confirm it. Each pair expects yes and no, because some models
# always give the same answer.
PHRASINGS = (
    ("Is it true that {}?", "yes"),
    ("Is it false that {}?", "no"),
    ("Does the image show that {}?", "yes"),
    ("Is it wrong to say that {}?", "no"),
)
# The evidence against a claim is the number of answers that refute it, minus the number that confirm it.
MAX_EVIDENCE = len(PHRASINGS)
# A claim needs at least this evidence to be refuted: both answers of a pair, or three of four answers.
REFUTED = 2
Score = Literal["1", "2", "3", "4", "5"]


class Answer(Output):
    """The answer to a question about an image (task `answer`) or about a caption (task `covers`)."""

    answer: Line


class Verdict(Output):
    """The answer to a question about a claim."""

    answer: Literal["yes", "no", "cannot tell"]


class ClaimText(Output):
    """One claim of a caption."""

    claim: Line


class ClaimList(Output):
    """The claims of one caption."""

    claims: Annotated[list[Line], Field(min_length=1, max_length=MAX_CLAIMS)]


class Rating(Output):
    """A judge's rating of a text: the wrong words in it, whether it is wrong, and one score per criterion."""

    wrong_words: Annotated[str, StringConstraints(max_length=2000)]  # empty if nothing is wrong
    is_wrong: Literal["yes", "no"]
    relevance: Score
    grounding: Score
    correctness: Score
    form: Score


def tidy_verdict(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a verdict, with the answer reduced to `yes`, `no` or `cannot tell` if possible."""
    from pipeline.rules import says_nothing  # this import compiles large regular expressions

    answer = fields.get("answer")
    if not isinstance(answer, str):
        return fields
    first = next(iter(words_of(answer)), answer.rstrip(SENTENCE_ENDS))
    # "No, it is not visible." refutes a claim, and "No idea." gives no answer.
    begins_verdict = first in YES_OR_NO and _FIRST_WORD_ALONE.match(answer)
    is_unknown = says_nothing(answer) and not begins_verdict
    return fields | {"answer": CANNOT_TELL if is_unknown else YES_OR_NO.get(first, answer)}


def questions_about(claim: str) -> list[tuple[str, str]]:
    """Return a question about a claim for each of PHRASINGS, with the answer that confirms it."""
    clause = claim.rstrip(SENTENCE_ENDS)
    first = clause.partition(" ")[0].lower()
    if first in FUNCTION_WORDS:
        clause = clause[:1].lower() + clause[1:]
    return [(phrasing.format(clause), expected) for phrasing, expected in PHRASINGS]


def count_claims(caption: str) -> int:
    """Estimate the number of claims in a caption from its number of words."""
    return max(1, min(MAX_CLAIMS, round(count_words(caption, words_of(caption)) / WORDS_PER_CLAIM)))


ANSWER = Task(name="answer", output=Answer, row=Answer)
BLIND = Task(name="answer", output=Answer, row=Answer, shows_image=False)
CLAIMS = Task(name="claims", output=ClaimList, row=ClaimText, rows_field="claims", shows_image=False)
CONFIRM = Task(name="confirm", output=Verdict, row=Verdict, tidy_row=tidy_verdict)
COVERS = Task(name="covers", output=Answer, row=Answer, shows_image=False)
RATE = Task(name="rate", output=Rating, row=Rating)
REPAIR = Task(name="repair", output=Caption, row=Caption, tidy_row=tidy_caption, shows_image=False)
CHECKING = (ANSWER, CLAIMS, CONFIRM, COVERS, RATE, REPAIR)
