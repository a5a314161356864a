"""Custom tasks: replies become columns, and contradicting settings are errors."""

import json
from typing import Any

import pytest

from pipeline.config.sections import TaskConfig
from pipeline.errors import ConfigError
from pipeline.tasks import Tasks, find_broken_rule, wire_schema
from pipeline.tasks.boxes import Frame
from pipeline.tasks.custom import NOTHING_FOUND, CustomTask, build_task
from pipeline.tasks.prompts import render
from pipeline.tasks.replies import read_fields
from pipeline.types import Reply

FRAME = Frame(560, 280)
TEXT, INTEGER = {"type": "string"}, {"type": "integer"}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": [*required], "properties": properties}


def listed(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def rows_of(**properties: Any) -> dict[str, Any]:
    return fields(a=listed(fields(**properties)))


FOUR = {"minItems": 4, "maxItems": 4}
PAIR = fields(("question", "answer"), question=TEXT, answer=TEXT)
WHO = {"question": "Who?", "answer": "me"}


def task(kind: str, **settings: Any) -> CustomTask:
    return build_task(TaskConfig.model_validate({"name": "own", "kind": kind, "prompt": "Look."} | settings))


def box(*corners: Any, label: str = "x") -> dict[str, Any]:
    return {"bbox_2d": [*corners], "label": label}


BOXES = [box(0, 0, 56, 28), box(5, 5, 9, 9)]


def read(own: CustomTask, value: Any) -> list[tuple[dict[str, Any], str | None]]:
    return read_fields(own, Reply("r", 0, json.dumps(value), "stop", 0, 0), FRAME)


@pytest.mark.parametrize(
    ("own", "reply", "columns"),
    [
        (task("caption"), {"caption": " A\ncat. "}, [{"text": "A cat."}]),
        (task("text"), {"text": "EXIT\n12"}, [{"record": '"EXIT\\n12"'}]),
        (task("labels", labels=["a", "b"]), {"labels": ["b", "a", "b"]}, [{"record": '["b", "a"]'}]),
        (task("question"), {"qa": [WHO]}, [WHO | {"answer_type": None}]),
        (task("boxes"), {"boxes": BOXES}, [{"record": json.dumps(one)} for one in BOXES]),
        (task("record", output=fields(n=INTEGER)), {"n": 3}, [{"record": '{"n": 3}'}]),
        (task("record", output=fields(n=INTEGER)), {}, [{"record": '{"n": null}'}]),
        (task("labels", output=fields(("at",), at={"enum": ["day"]})), {"at": "day"}, [{"record": '"day"'}]),
        (
            task("caption", field="a", output=fields(b=TEXT, a=TEXT)),
            {"b": "A shop.", "a": "A."},
            [{"text": "A."}],
        ),
        (task("text", rows="t", output=fields(t=listed(TEXT))), {"t": ["one"]}, [{"record": '"one"'}]),
    ],
)
def test_reply_becomes_the_columns_of_its_kind(own: CustomTask, reply: Any, columns: list[Any]) -> None:
    rows = read(own, reply)
    assert rows == [(values, None) for values in columns]
    assert all(find_broken_rule(own, fields) is None for fields, _ in rows)


@pytest.mark.parametrize(
    ("own", "reply", "reasons"),
    [
        (task("labels", labels=["a"]), {"labels": ["a", "c"]}, ["labels_not_allowed"]),
        (task("labels", labels=["a"]), {"tags": ["a"]}, ["labels_missing"]),
        (task("boxes"), {"boxes": [box(0, 0, 56)]}, ["bbox_2d_too_short"]),
        (task("boxes"), {"boxes": [box(0, 0, 5000, 9), box(0, 0, 9, 9)]}, ["box_outside_image", None]),
        (task("question", output=fields(qa=listed(PAIR)), rows="qa"), {"qa": []}, [NOTHING_FOUND]),
        (task("boxes"), {"boxes": [{"bbox_2d": None, "label": "x"}]}, ["bbox_2d_list_type"]),
        (task("boxes"), {"boxes": "none"}, ["off_schema"]),
        (task("boxes"), [1], ["off_schema"]),
        (task("text"), {"text": "I'm sorry, but I cannot help with that."}, ["refusal"]),
        (task("text"), {"text": "\ud800"}, ["off_schema"]),
        (task("text"), {"text": "x" * 30_000}, ["text_string_too_long"]),
        (task("question"), {"qa": [WHO | {"extra": 1}]}, ["extra_not_asked_for"]),
    ],
)
def test_each_invalid_row_has_a_reason(own: CustomTask, reply: Any, reasons: list[str | None]) -> None:
    assert [error for _, error in read(own, reply)] == reasons


@pytest.mark.parametrize(
    ("own", "reply", "standard"),
    [
        (task("boxes"), [box(1, 2, 30, 40)], {"boxes": [box(1, 2, 30, 40)]}),
        (task("labels"), ["lamp"], {"labels": ["lamp"]}),
        (task("labels", labels=["lamp", "TV"]), {"labels": ["Lamp ", "tv"]}, {"labels": ["lamp", "TV"]}),
        (task("record", output=fields(v={"enum": ["A", "a", "B"]})), {"v": "A"}, {"v": "A"}),
        (task("record", output=fields(v={"enum": ["A", "a", "B"]})), {"v": "b "}, {"v": "B"}),
        (task("boxes"), {"boxes": [box(1.4, 2, 30.0, 39.6)]}, {"boxes": [box(1, 2, 30, 40)]}),
        (task("question"), [WHO], {"qa": [WHO]}),
    ],
)
def test_reply_in_another_json_form_from_a_server_without_schemas_is_read(
    own: CustomTask, reply: Any, standard: Any
) -> None:
    assert read(own, reply) == read(own, standard)
    assert all(error is None for _, error in read(own, reply))


@pytest.mark.parametrize("corners", ["0.1, 0.2, 0.5, 1.0", "1, 2, 30.5, Infinity", "1, 2, NaN, 40"])
def test_box_in_fractions_or_without_finite_numbers_is_invalid(corners: str) -> None:
    reply = Reply("r", 0, f'[{{"bbox_2d": [{corners}], "label": "dog"}}]', "stop", 1, 1)
    ((_, error),) = read_fields(task("boxes"), reply, None)
    assert error in ("bbox_2d_int_from_float", "bbox_2d_int_type", "bbox_2d_finite_number")


def test_question_without_question_mark_breaks_a_rule() -> None:
    ((fields, error),) = read(task("question"), {"qa": [WHO | {"question": "Who"}]})
    assert error is None and find_broken_rule(task("question"), fields) == "question_without_mark"


def test_wire_schema_has_no_lengths_and_keeps_field_names() -> None:
    own = task("text", output=fields(t=TEXT | {"maxLength": 5}))
    assert "maxLength" not in json.dumps(wire_schema(own)) and "maxLength" in json.dumps(own.whole)
    named_like_a_keyword = task("text", output=fields(("pattern",), pattern=TEXT))
    assert "pattern" in wire_schema(named_like_a_keyword)["properties"]


def test_prompt_ends_with_reply_example_and_task_name() -> None:
    own = task("labels", labels=["{{ a }}", "b"])
    assert render(own).text == 'Look.\nReply as {"labels":["{{ a }}" or "b",...]}.\nTask: own'
    assert render(own).id.startswith("own@")


def test_custom_task_is_found_by_name() -> None:
    own = TaskConfig(name="tags", kind="labels", prompt="Look.")
    tasks = Tasks(custom=[own])
    assert tasks["tags"] is build_task(own) and tasks["qa"].name == "qa"
    with pytest.raises(ConfigError, match="unknown task: tag") as error:
        Tasks(["tag"], [own])
    assert error.value.hint and error.value.hint.startswith("did you mean tags? known tasks: caption, ")


@pytest.mark.parametrize(
    ("settings", "flaw"),
    [
        ({"kind": "record"}, "a record needs `output`"),
        ({"kind": "text", "labels": ["a"]}, "`labels` is only for the kinds `labels` and `boxes`"),
        ({"kind": "labels", "labels": ["a"], "output": PAIR}, "write an enum"),
        ({"kind": "caption", "output": PAIR}, "output has several fields: name the one with the caption"),
        ({"kind": "caption", "output": PAIR, "field": "text"}, "has no field text; it has question, answer"),
        ({"kind": "question", "output": PAIR, "rows": "qa"}, "has no list named qa"),
        ({"kind": "boxes", "output": PAIR}, "each item of `rows` must have one list of four integers"),
        ({"kind": "record", "output": listed(PAIR)}, "output must be an object"),
        ({"kind": "caption", "output": fields(caption=INTEGER)}, "must be a string, not of type integer"),
        ({"kind": "labels", "field": "n", "output": fields(n=INTEGER)}, "labels must be a string"),
        ({"kind": "boxes", "show_image": False}, "boxes need an image"),
        ({"kind": "labels", "min_words": 3}, "`min_words` and `max_words` are only for captions"),
        ({"kind": "text", "name": "image"}, "image is a name of built-in columns or texts"),
        ({"kind": "labels", "name": "questions"}, "questions is a name of built-in columns or texts"),
        ({"kind": "text", "output": fields(text=TEXT | {"pattern": "(["})}, "regex parse error"),
        ({"kind": "record", "rows": "a", "output": fields(a=listed(TEXT))}, "items of a must be objects"),
        ({"kind": "question", "output": fields(question=TEXT)}, "needs the fields `question` and `answer`"),
        ({"kind": "labels", "rows": "a", "output": rows_of(labels=listed(TEXT))}, "`rows` cannot be a list"),
        ({"kind": "boxes", "rows": "a", "output": rows_of(box=FOUR | listed(TEXT))}, "must be integers"),
    ],
)
def test_custom_task_with_contradicting_settings_is_refused(settings: dict[str, Any], flaw: str) -> None:
    with pytest.raises(ConfigError, match="the task .* cannot be used: .*" + flaw):
        task(**settings)
