"""Task: caption. One description of one image."""

from pipeline.tasks.base import Line, Output, Task


class Caption(Output):
    """Task `caption`: one description of one image."""

    caption: Line


TASK = Task(
    name="caption",
    prompt="caption/v1",
    output=Caption,
    row=Caption,
    text_field="caption",
    has_styles=True,
    temperature_key="caption_temperature",
    card_category="image-to-text",
)
