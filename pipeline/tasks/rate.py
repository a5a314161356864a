"""Task: rate. A judge's scores for one text about an image, by a rubric."""

from typing import Annotated, Literal

from pydantic import StringConstraints

from pipeline.tasks.base import Output, Task

Score = Literal["1", "2", "3", "4", "5"]


class Rating(Output):
    """Task `rate`: what is wrong, in a few words, and a score for each part of the rubric; 5 is best."""

    flaw: Annotated[str, StringConstraints(max_length=2000)]  # empty where nothing is wrong
    relevance: Score
    grounding: Score
    correctness: Score
    form: Score


TASK = Task(name="rate", prompts=("rate/v1",), output=Rating, row=Rating)
