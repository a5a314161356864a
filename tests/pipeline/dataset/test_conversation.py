"""Tests of the columns `text` (one caption) and `messages` (a conversation)."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.dataset import conversation
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
def test_human_caption_is_preferred_to_others(captions: list[tuple[str, str]], expected: str | None) -> None:
    assert conversation.preferred_caption(captions) == expected


def test_turns_ask_for_each_style_and_end_with_questions() -> None:
    captions = [("zen", "z"), ("plain", "p"), ("human", "h"), ("human", "i"), ("detailed", "d")]
    assert [*conversation.turns(captions, [("How many?", "2")])] == [
        (conversation.QUESTIONS["human"], "h"),
        (conversation.REPHRASE, "i"),
        (conversation.QUESTIONS["plain"], "p"),
        (conversation.QUESTIONS["detailed"], "d"),
        ("Write a caption of this image in the style zen.", "z"),
        ("How many?", "2"),
    ]


def test_each_custom_task_turn_has_a_prompt_and_the_value_as_json_or_text() -> None:
    texts = (" List tags. ", "It is {{ row.title }}.", "Find them.", "Write a note.")
    names = ("tags", "offer", "things", "note")
    tasks = [{"name": name, "prompt": text} for name, text in zip(names, texts, strict=True)]
    kinds = {"tags": "labels", "offer": "record", "things": "boxes", "note": "text"}
    own = {name: {"kind": kind, "is_list": kind == "boxes"} for name, kind in kinds.items()}
    prompts = conversation.value_prompts({"config": {"custom_tasks": tasks}, "own_columns": own})
    things = [{"box": [1, 2, 3, 4], "label": "cat"}]
    row = {"tags": ["cat", "dög"], "offer": {"color": None}, "things": things, "note": "A note"}
    assert [*conversation.value_turns(row, prompts)] == [
        ("List tags.", '["cat", "dög"]'),
        ("Write offer of this image.", '{"color": null}'),
        ("Find them.", '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]'),
        ("Write a note.", "A note"),
    ]
    empty = {**row, "tags": None, "things": []}
    assert [*conversation.value_turns(empty, prompts)][1] == ("Find them.", "[]")


def test_text_and_messages_columns_are_added_unless_the_table_has_columns_of_that_name() -> None:
    row: dict[str, Any] = {"captions": [{"text": "A dog.", "style": "plain"}], "qa": []}
    rows = pa.Table.from_pylist([row, {"captions": [], "qa": []}], schema=row_schema(["captions", "qa"]))
    extended = conversation.with_reader_columns(rows, conversation.reader_columns(["image"]), {})
    assert extended.column_names == ["captions", "qa", "text", "messages"]
    assert extended["text"].to_pylist() == ["A dog.", None]
    messages, empty = extended["messages"].to_pylist()
    assert [message["role"] for message in messages] == ["user", "assistant"] and empty == []
    kinds = [[part["type"] for part in message["content"]] for message in messages]
    assert kinds == [["image", "text"], ["text"]]
    assert conversation.reader_columns(["image", "text"]) == ["messages"]
    assert conversation.reader_columns(["pages"]) == conversation.reader_columns(["sample_id"]) == []
