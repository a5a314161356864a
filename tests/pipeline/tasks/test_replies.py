"""Replies: a reply becomes annotation rows, and an unreadable reply one row with its error."""

import json
from dataclasses import replace

import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import TaskConfig
from pipeline.inference.requests import build_requests
from pipeline.tasks import TASKS
from pipeline.tasks.custom import build_task
from pipeline.tasks.replies import find_flaw, parse_reply, read_fields
from pipeline.types import Reply, Request
from tests.plans import request_plan

BRIEF, _, QA = build_requests("a" * 64, request_plan(resolve(source="scenes")))


def reply(text: str) -> Reply:
    return Reply("r", 0, text, "stop", 1, 1)


@pytest.mark.parametrize(
    ("style", "text", "caption"),
    [
        ("plain", " A red ring.\n\nIt is big. ", "A red ring. It is big."),
        ("plain", "A red ring.\nQuestion 1: What is red?", "A red ring."),
        ("plain", '"A red ring."', "A red ring."),
        ("plain", "\u201cA red ring.\u201d", "A red ring."),
        ("plain", 'A sign that says "STOP"', 'A sign that says "STOP"'),
        ("plain", '"STOP" and "GO" on signs: "STOP"', '"STOP" and "GO" on signs: "STOP"'),
        ("plain", "```\nA red ring.\n```", "A red ring."),
        ("plain", "I see a ring.</think>\nA red ring.", "A red ring."),
        ("plain", 'Sure! Here is a caption:\n\n"A red ring."', "A red ring."),
        ("ocr", "Ingredients:\nmilk", "Ingredients: / milk"),
        ("ocr", "STOP\nMain St", "STOP / Main St"),
        ("ocr", "function f() {}", "function f() {}"),
        ("ocr", "Line one\n\n Line two", "Line one / Line two"),
        ("detailed", 'A screen shows "if (x) {}" in green.', 'A screen shows "if (x) {}" in green.'),
    ],
)
def test_plain_reply_is_the_caption(style: str, text: str, caption: str) -> None:
    (row,) = parse_reply(replace(BRIEF, style=style), reply(text))
    assert (row["text"], row["reply_error"]) == (caption, None)


@pytest.mark.parametrize("text", ["def f(): return {}", '{"a": 1}'])
def test_code_is_a_valid_reply_to_a_custom_text_task(text: str) -> None:
    task = build_task(TaskConfig(name="code", kind="text", prompt="Copy the code."))
    ((fields, error),) = read_fields(task, BRIEF.reply(text, "stop"))
    assert (json.loads(fields["record"]), error) == (text, None)


@pytest.mark.parametrize(
    ("kind", "value", "answer"),
    [
        ("yes/no", '"Yes."', "yes"), ("yes/no", '" YES!"', "yes"), ("what", "true", "yes"),
        ("what", "false", "no"), ("what", "3", "3"), ("what", "2.5", "2.5"),
    ],
)  # fmt: skip
def test_answer_of_any_json_type_becomes_normalized_text(kind: str, value: str, answer: str) -> None:
    pair = f'{{"answer_type":"{kind}","question":"Is it? ","answer":{value}}}'
    (row,) = parse_reply(QA, reply(f'{{"qa":[{pair}]}}'))
    assert (row["question"], row["answer"], row["reply_error"]) == ("Is it?", answer, None)


def test_each_question_is_a_row_and_an_invalid_one_does_not_reject_the_others() -> None:
    pair = '{"answer_type":"number","question":"How many?","answer":"%d"}'
    rows = parse_reply(QA, reply(f'{{"qa":[{pair % 1},{{"question":[3]}},{pair % 2}]}}'))
    assert [(row["position"], row["answer"], row["reply_error"]) for row in rows] == [
        (0, "1", None), (1, None, "off_schema"), (2, "2", None),
    ]  # fmt: skip
    assert len({row["annotation_id"] for row in rows}) == 3


@pytest.mark.parametrize(
    ("request_", "text", "error"),
    [
        (BRIEF, '{"caption":"A red', "not_plain_text"), (BRIEF, "", "not_plain_text"),
        (BRIEF, "[1]", "not_plain_text"), (BRIEF, "```json\n[1]\n```", "not_plain_text"),
        (BRIEF, "Sure! A red ring.", "not_plain_text"), (BRIEF, "Here is a caption:", "not_plain_text"),
        (BRIEF, '{"text":"A red ring."}', "not_plain_text"), (BRIEF, "half a pair: \ud83d", "off_schema"),
        (BRIEF, '{"caption":[3]}', "off_schema"),
        (BRIEF, '{"caption":"half a pair: \\ud83d"}', "off_schema"), (QA, "[" * 100_000, "not_json"),
        (QA, "no object at all", "not_json"), (QA, '{"qa":[]}', "off_schema"),
        (QA, '{"qa":["x"]}', "off_schema"), (QA, '["x"]', "off_schema"), (QA, "[]", "off_schema"),
        (QA, '{"caption":"x"}', "off_schema"), (QA, "null", "not_json"),
    ],
)  # fmt: skip
def test_unreadable_reply_is_one_row_with_its_reason(request_: Request, text: str, error: str) -> None:
    assert [(row["reply_error"], row["reply_text"]) for row in parse_reply(request_, reply(text))] == [
        (error, text)
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("I'm sorry, but I cannot describe this.", "refusal"), ("A sign says I'm sorry, in red.", None),
        ("I canter on a horse.", None), ("A cat and a cat and a cat and a cat and", "repeats_itself"),
        ("red red red red", "repeats_itself"), ("A big red ring, a big red disk, a big red star.", None),
        ("Yes yes yes.", None),
    ],
)  # fmt: skip
def test_refusal_or_loop_sets_reply_error(text: str, error: str | None) -> None:
    (row,) = parse_reply(BRIEF, reply(f'{{"caption":"{text}"}}'))
    assert row["reply_error"] == error


def test_reply_with_one_valid_question_has_no_flaw() -> None:
    good = '{"answer_type":"number","question":"How many?","answer":"1"}'
    bad = '{"answer_type":"yes/no","question":"Is it?","answer":"perhaps"}'
    assert find_flaw(QA, reply(f'{{"qa":[{bad},{good}]}}')) is None
    assert find_flaw(QA, reply(f'{{"qa":[{bad},{bad}]}}')) == "answer_not_yes_or_no"
    assert find_flaw(QA, reply(f'{{"qa":[{good.replace("1", "no")}]}}')) == "answer_not_a_number"
    assert find_flaw(BRIEF, reply('{"caption":""}')) == "caption_string_too_short"
    assert find_flaw(BRIEF, reply("```")) == "not_plain_text"


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('```json\n{"caption": "A cat."}\n```', "A cat."),
        ('<think>{"caption": "A dog."} or {}?</think>\nHere: {"caption": "A cat."} Anything else?', "A cat."),
        ('I see {} first.</think>\n{"caption":"A cat."}', "A cat."),
        ('a } and { b {"caption": "A cat."}', "A cat."),
        ("{" * 200_000, None),
        (" " * 200_000 + "<think>" * 20_000, None),
        ('["caption"]', None),
    ],
)
def test_first_object_is_found_in_surrounding_text(text: str, caption: str | None) -> None:
    ((fields, error),) = read_fields(TASKS["caption"], BRIEF.reply(text, "stop"))
    assert (fields.get("text"), error is None) == (caption, caption is not None)
