"""Columns for other trainers: one caption as `text`, and all texts and values as `messages`.

`messages` has the format that chat templates in transformers and TRL read. A version's digest does not depend
on these columns, because they are computed from the others.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.tables import HUMAN, STRING
from pipeline.tasks.boxes import BOX_FIELDS

PREFERRED_STYLES = (HUMAN, "plain", "brief", "detailed")
# The question that precedes a caption of each style in a conversation.
QUESTIONS = {
    HUMAN: "What does this image show?",
    "plain": "Describe this image in one sentence.",
    "brief": "Describe this image briefly.",
    "detailed": "Describe this image in detail.",
    "alt": "Write alternative text for this image.",
    "tags": "List tags for this image.",
    "ocr": "What text can be read in this image?",
}
REPHRASE = "Say it in other words."
PART = pa.struct([pa.field("type", STRING), pa.field("text", STRING)])
MESSAGE = pa.struct([pa.field("role", STRING), pa.field("content", pa.list_(PART))])
READER_COLUMNS = pa.schema([pa.field("text", STRING), pa.field("messages", pa.list_(MESSAGE))])
IMAGE_PART = {"type": "image", "text": None}


def preferred_caption(captions: Sequence[tuple[str, str]]) -> str | None:
    """Return the caption in the most preferred style, or else the first. Captions are (style, text)."""
    first_by_style = dict(reversed(captions))
    preferred = next((first_by_style[style] for style in PREFERRED_STYLES if style in first_by_style), None)
    return preferred or (captions[0][1] if captions else None)


def turns(
    captions: Iterable[tuple[str, str]], questions: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) turns: captions (style, text) in the order of QUESTIONS, then `questions`."""
    last = None
    ranks = {style: rank for rank, style in enumerate(QUESTIONS)}
    for style, text in sorted(captions, key=lambda caption: (ranks.get(caption[0], len(ranks)), caption[0])):
        question = QUESTIONS.get(style, f"Write a caption of this image in the style {style}.")
        yield REPHRASE if style == last else question, text
        last = style
    yield from questions


def value_prompts(manifest: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the prompt and kind of each custom task's column. A generic text replaces Jinja templates."""
    tasks, own = manifest["config"].get("custom_tasks", ()), manifest.get("own_columns", {})
    prompts = {task["name"]: task["prompt"].strip() for task in tasks if "{" not in task["prompt"]}
    return {name: (prompts.get(name) or f"Write {name} of this image.", own[name]["kind"]) for name in own}


def value_turns(row: dict[str, Any], prompts: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield (prompt, value) for each value of a custom task: a text, or JSON with boxes as `bbox_2d`."""
    for name, (prompt, kind) in prompts.items():
        value = row[name]
        if kind == "boxes" and value is not None:
            boxes = value if isinstance(value, list) else [value]
            value = [
                {BOX_FIELDS[0] if field in BOX_FIELDS else field: box[field] for field in box}
                for box in boxes
            ]
        if value is not None:
            yield prompt, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def messages(asked: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return turns as messages between a user and an assistant."""
    conversation: list[dict[str, Any]] = []
    for question, answer in asked:
        image = [] if conversation else [IMAGE_PART]
        conversation.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return conversation


def reader_columns(columns: Sequence[str]) -> list[str]:
    """Return the reader columns that are not in `columns`, or [] for rows without `image`."""
    return [name for name in READER_COLUMNS.names if name not in columns] if "image" in columns else []


def with_reader_columns(
    rows: pa.Table, names: Sequence[str], prompts: dict[str, tuple[str, str]]
) -> pa.Table:
    """Append the reader columns `names` to rows of a version. `prompts` are those of `value_prompts`."""
    values: dict[str, list[Any]] = {"text": [], "messages": []}
    for row in rows.select(["captions", "qa", *prompts]).to_pylist():
        captions = [(caption["style"], caption["text"]) for caption in row["captions"]]
        questions = [(pair["question"], pair["answer"]) for pair in row["qa"]]
        values["text"].append(preferred_caption(captions))
        values["messages"].append(messages([*turns(captions, questions), *value_turns(row, prompts)]))
    for name in names:
        field = READER_COLUMNS.field(name)
        rows = rows.append_column(field, pa.array(values[name], field.type))
    return rows
