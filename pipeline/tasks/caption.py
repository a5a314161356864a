"""The task `caption`, which asks for a description of one image."""

from typing import Any

from pipeline.tasks.base import Line, Output, Task, tidy_texts


class Caption(Output):
    """One description of one image."""

    caption: Line


def tidy_caption(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with the caption on one line, without later paragraphs that do not belong to it."""
    text = fields.get("caption")
    if isinstance(text, str) and "\n" in text:
        # This import is slow, because it compiles large regular expressions.
        from pipeline.text.artifacts import without_afterthoughts

        fields = {**fields, "caption": without_afterthoughts(text)}
    return tidy_texts(fields)


# Minimum token limits of styles with long replies.
STYLE_TOKENS = {"dense": 768, "ocr": 2048}


TASK = Task(
    name="caption",
    output=Caption,
    row=Caption,
    tidy_row=tidy_caption,
    text_field="caption",
    plain_field="caption",
    has_styles=True,
    temperature_key="caption_temperature",
    card_category="image-to-text",
)
