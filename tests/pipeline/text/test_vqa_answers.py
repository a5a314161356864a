"""VQA answers: normalized by the rules of the official evaluation, quirks included."""

import pytest

from pipeline.inference.verification import is_confirmed
from pipeline.tasks.qa import tidy_pair
from pipeline.text.language_codes import YES_OR_NO
from pipeline.text.vqa_answers import kind_of_answer, normalize_answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Two", "2"),
        ("None", "0"),
        ("The red car", "red car"),
        ("T-shirt", "t shirt"),
        ("5 p.m.", "5 pm"),
        ("1,000", "1000"),
        ("1,000-1,200", "10001200"),
        ("50%", "50%"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("yes.", "yes"),
        (" a\tb\n", "b"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
    ],
)
def test_answer_is_normalized_as_in_the_official_code(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


@pytest.mark.parametrize("answer", ["yes", "Yes.", "はい。", "是。", "हाँ।", "Oui\u202f!", "нет.", "نعم۔"])  # noqa: RUF001
def test_yes_and_no_are_recognised_in_all_languages_with_their_marks(answer: str) -> None:
    assert kind_of_answer(answer) == "yes/no"
    pair = tidy_pair({"question": "?", "answer": answer, "answer_type": "yes/no"})
    assert pair["answer"].casefold() in YES_OR_NO


def test_final_punctuation_of_other_scripts_does_not_change_an_answer() -> None:
    assert is_confirmed({"answer": "公園。", "expected": "公園"})
    assert is_confirmed({"answer": "はい。", "expected": "yes"})
    assert not is_confirmed({"answer": "公園。", "expected": "駅"})


@pytest.mark.parametrize(
    ("expected", "answer", "is_right"),
    [
        ("5%", "-5%", False),
        ("-5%", "5%", False),
        ("-5%", "\u22125%", True),
        ("-5", "-5.", True),
        ("-$5", "$5", False),
        ("10-20", "10 - 20", True),
        ("t-shirt", "t-shirt", True),
        ("-", "-", True),
    ],
)
def test_negative_number_differs_from_the_positive_one(expected: str, answer: str, *, is_right: bool) -> None:
    assert is_confirmed({"answer": answer, "expected": expected}) == is_right
