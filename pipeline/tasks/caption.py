"""Task: caption. One description of one image."""

from typing import Any

from pipeline.tasks.base import Line, Output, Task, tidy_texts
from pipeline.text.artifacts import without_afterthoughts


class Caption(Output):
    """Task `caption`: one description of one image."""

    caption: Line


def tidy_caption(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a caption on one line, up to the first paragraph in which the model goes on about something else."""
    text = fields.get("caption")
    return tidy_texts({**fields, "caption": without_afterthoughts(text)} if isinstance(text, str) and "\n" in text else fields)


TASK = Task(
    name="caption",
    output=Caption,
    row=Caption,
    tidy_row=tidy_caption,
    text_field="caption",
    has_styles=True,
    temperature_key="caption_temperature",
    card_category="image-to-text",
)
