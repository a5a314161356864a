"""Columns for other readers: one caption a row, and a conversation that shows the image once."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.conversation import (
    AGAIN,
    QUESTIONS,
    preferred_caption,
    reader_columns,
    turns,
    with_reader_columns,
)
from pipeline.tables import row_schema


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([], None),
        ([("alt", "a")], "a"),
        ([("detailed", "d"), ("brief", "b"), ("plain", "p")], "p"),
        ([("plain", "p"), ("human", "h"), ("human", "i")], "h"),
    ],
)
def test_one_caption_is_that_of_a_person_else_a_plain_one(captions: list[tuple[str, str]], expected: str | None) -> None:
    assert preferred_caption(captions) == expected


def test_captions_answer_the_question_of_their_style_and_questions_follow() -> None:
    captions = [("zen", "z"), ("plain", "p"), ("human", "h"), ("human", "i"), ("detailed", "d")]
    assert [*turns(captions, [("How many?", "2")])] == [
        (QUESTIONS["human"], "h"),
        (AGAIN, "i"),
        (QUESTIONS["plain"], "p"),
        (QUESTIONS["detailed"], "d"),
        ("Write a caption of this image in the style zen.", "z"),
        ("How many?", "2"),
    ]


def test_columns_are_added_behind_those_of_the_rows_but_for_names_that_are_taken() -> None:
    row: dict[str, Any] = {"captions": [{"text": "A dog.", "style": "plain"}], "qa": []}
    rows = pa.Table.from_pylist([row, {"captions": [], "qa": []}], schema=row_schema(["captions", "qa"]))
    made = with_reader_columns(rows, reader_columns(["image"]))
    assert made.column_names == ["captions", "qa", "text", "messages"]
    assert made["text"].to_pylist() == ["A dog.", None]
    conversation, empty = made["messages"].to_pylist()
    assert [message["role"] for message in conversation] == ["user", "assistant"] and empty == []
    assert [[part["type"] for part in message["content"]] for message in conversation] == [["image", "text"], ["text"]]
    assert reader_columns(["image", "text"]) == ["messages"]
    assert reader_columns(["pages"]) == reader_columns(["sample_id"]) == []
