"""Task: caption. One description of one image."""

from pipeline.tasks.base import Line, Output


class Caption(Output):
    """Task `caption`: one description of one image."""

    caption: Line
