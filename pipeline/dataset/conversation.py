"""Columns that other trainers read as they are: one caption as `text`, and all texts of an image as `messages`.

They follow from `captions` and `qa` of the same row, so they are no part of a version's digest. `messages` is the format of
conversations that chat templates of transformers and TRL read: the first turn shows the image.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.tables import HUMAN, STRING

PREFERRED_STYLES = (HUMAN, "plain", "brief", "detailed")  # of which one caption is taken where there is room for one
QUESTIONS = {  # that the captions of a style answer, in a conversation
    HUMAN: "What does this image show?",
    "plain": "Describe this image in one sentence.",
    "brief": "Describe this image briefly.",
    "detailed": "Describe this image in detail.",
    "alt": "Write alternative text for this image.",
    "tags": "List tags for this image.",
    "ocr": "What text can be read in this image?",
}
AGAIN = "Say it in other words."  # of another caption of the same style
PART = pa.struct([pa.field("type", STRING), pa.field("text", STRING)])
MESSAGE = pa.struct([pa.field("role", STRING), pa.field("content", pa.list_(PART))])
READER_COLUMNS = pa.schema([pa.field("text", STRING), pa.field("messages", pa.list_(MESSAGE))])
IMAGE_PART = {"type": "image", "text": None}


def preferred_caption(captions: Sequence[tuple[str, str]]) -> str | None:
    """Return one of the captions (style, text): the first of the first preferred style, else the first; None without any."""
    by_style = dict(reversed(captions))
    named = next((by_style[name] for name in PREFERRED_STYLES if name in by_style), None)
    return named or (captions[0][1] if captions else None)


def turns(captions: Iterable[tuple[str, str]], questions: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield what a user asks and an assistant answers: for each caption (style, text), then the questions about the image."""
    last = None
    for style, text in sorted(captions, key=lambda caption: _rank(caption[0])):
        yield AGAIN if style == last else QUESTIONS.get(style, f"Write a caption of this image in the style {style}."), text
        last = style
    yield from questions


def _rank(style: str) -> tuple[int, str]:
    known = [*QUESTIONS]
    return (known.index(style) if style in known else len(known), style)


def messages(asked: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return turns as messages, the first of which shows the image."""
    conversation: list[dict[str, Any]] = []
    for question, answer in asked:
        shown = [] if conversation else [IMAGE_PART]
        conversation.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return conversation


def reader_columns(columns: Sequence[str]) -> list[str]:
    """Return the names of reader columns that files of rows with these columns have: none for decks, or without pixels."""
    return [name for name in READER_COLUMNS.names if name not in columns] if "image" in columns else []


def with_reader_columns(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Return rows of a version with these reader columns behind their own."""
    texts: list[str | None] = []
    conversations: list[list[dict[str, Any]]] = []
    for row in rows.select(["captions", "qa"]).to_pylist():
        captions = [(caption["style"], caption["text"]) for caption in row["captions"]]
        texts.append(preferred_caption(captions))
        conversations.append(messages(turns(captions, ((pair["question"], pair["answer"]) for pair in row["qa"]))))
    made = {"text": texts, "messages": conversations}
    for name in names:
        rows = rows.append_column(READER_COLUMNS.field(name), pa.array(made[name], READER_COLUMNS.field(name).type))
    return rows
