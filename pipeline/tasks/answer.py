"""Task: answer. The answer to a given question; verify asks it about annotations."""

from pipeline.tasks.base import Line, Output, Task


class Answer(Output):
    """Task `answer`: the answer to a question that somebody else asked."""

    answer: Line


TASK = Task(name="answer", prompt="answer/v1", output=Answer, row=Answer)
