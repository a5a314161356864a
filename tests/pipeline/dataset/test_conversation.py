"""Columns for other readers: one caption a row, and a conversation that shows the image once."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset.conversation import (
    AGAIN,
    QUESTIONS,
    messages,
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


def test_messages_take_turns_and_show_the_image_once() -> None:
    told = messages([("What?", "A dog."), ("Where?", "Here.")])
    assert [message["role"] for message in told] == ["user", "assistant"] * 2
    kinds = [[part["type"] for part in message["content"]] for message in told]
    assert kinds == [["image", "text"], ["text"], ["text"], ["text"]]
    assert [part["text"] for message in told for part in message["content"]] == [None, "What?", "A dog.", "Where?", "Here."]


def test_columns_are_added_behind_those_of_the_rows_but_for_names_that_are_taken() -> None:
    row: dict[str, Any] = {"captions": [{"text": "A dog.", "style": "plain"}], "qa": []}
    rows = pa.Table.from_pylist([row, {"captions": [], "qa": []}], schema=row_schema(["captions", "qa"]))
    made = with_reader_columns(rows, reader_columns(["image"]))
    assert made.column_names == ["captions", "qa", "text", "messages"]
    assert made["text"].to_pylist() == ["A dog.", None]
    assert [len(told) for told in made["messages"].to_pylist()] == [2, 0]
    assert reader_columns(["image", "text"]) == ["messages"]
    assert reader_columns(["pages"]) == reader_columns(["sample_id"]) == []
