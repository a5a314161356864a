"""Human texts become annotations like those of a model, with the most frequent answer and a fitting type."""

from typing import Any

import pytest

from pipeline.tables import ANNOTATION
from pipeline.tasks import TASKS, find_broken_rule
from pipeline.tasks.human import human_annotations


def asked(question: str, *answers: str, kind: str | None = None, **more: Any) -> dict[str, Any]:
    empty = {"evidence_pages": None, "expression": None}
    return {"question": question, "answers": list(answers), "answer_type": kind, **empty, **more}


def test_human_texts_become_annotations_of_caption_and_qa() -> None:
    rows = human_annotations(
        "s", ["A dog\n runs. ", " ", "A dog runs."], [asked("is it a dog", "yes", "no", "yes", kind="yes/no")]
    )
    assert [(row["task"], row["style"], row["position"], row.get("text")) for row in rows] == [
        ("caption", "human", 0, "A dog runs."),
        ("caption", "human", 1, "A dog runs."),
        ("qa", "", 0, None),
    ]
    question = [rows[2][name] for name in ("question", "answer", "answer_type")]
    assert question == ["is it a dog?", "yes", "yes/no"]
    assert {row["prompt_id"] for row in rows} == {"human"}
    assert len({row["annotation_id"] for row in rows}) == len(rows)
    assert set().union(*rows) <= {*ANNOTATION.names}


@pytest.mark.parametrize(
    ("pair", "answer", "kind"),
    [
        (asked("How many?", "2", "3", "3"), "3", "number"),
        (asked("What time is it?", "5,30 %"), "5,30 %", "number"),
        (asked("Is it?", "Yes."), "yes", "yes/no"),
        (asked("Is it?", "white", kind="yes/no"), "white", "other"),
        (asked("What is it?", "no", kind="other"), "no", "yes/no"),
        (asked("What is it?", "a", "b", kind="unknown"), "a", "other"),
    ],
)
def test_answer_type_fits_the_answer(pair: dict[str, Any], answer: str, kind: str) -> None:
    (row,) = human_annotations("s", [], [pair])
    assert (row["answer"], row["answer_type"]) == (answer, kind)
    assert find_broken_rule(TASKS["qa"], row) is None


def test_question_without_answer_is_left_out() -> None:
    assert not human_annotations("s", [], [asked("Is it?"), asked("Is it?", " ")])


@pytest.mark.parametrize(
    ("evidence", "expression", "answer", "kind"),
    [([2], "1 + 2", "3", "arithmetic"), ([2], None, "3", "number"), (None, "", "Ohm", "span")],
)
def test_questions_about_a_deck_belong_to_deck_qa(
    evidence: list[int] | None, expression: str | None, answer: str, kind: str
) -> None:
    pair = asked("What?", answer, evidence_pages=evidence, expression=expression)
    (row,) = human_annotations("s", [], [pair], 3)
    assert (row["task"], row["answer_type"], row["expression"]) == ("deck_qa", kind, expression or "")
    assert row["evidence_pages"] == (evidence or [1, 2, 3])
    assert find_broken_rule(TASKS["deck_qa"], row, 3) is None


def test_missing_question_mark_is_added() -> None:
    questions = ("is it", 'what is "it"', "Name it.", "Was?")
    rows = human_annotations("s", [], [asked(question, "a") for question in questions])
    assert [row["question"] for row in rows] == ["is it?", 'what is "it"?', "Name it.", "Was?"]
