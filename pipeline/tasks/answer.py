"""Task: answer. The answer to a given question; the stage verify checks annotations with it."""

from pipeline.tasks.base import Line, Output, Task


class Answer(Output):
    """Task `answer`: the answer to a given question."""

    answer: Line


TASK = Task(name="answer", output=Answer, row=Answer)
