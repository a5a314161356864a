"""VQA answers: normalized by the rules of the official evaluation, quirks included."""

import pytest

from pipeline.tasks.qa import tidy_pair
from pipeline.text.language_codes import YES_OR_NO
from pipeline.text.vqa_answers import is_same_answer, kind_of_answer, normalize_answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Two", "2"), ("None", "0"), ("The red car", "red car"), ("T-shirt", "t shirt"), ("5 p.m.", "5 pm"),
        ("1,000", "1000"), ("1,000-1,200", "10001200"), ("50%", "50%"), ("3.5", "3.5"), ("dont", "don't"),
        ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"), ("yes.", "yes"), (" a\tb\n", "b"),
        ("red/blue", "red blue"), ("red / blue", "red blue"),
    ],
)  # fmt: skip
def test_answer_is_normalized_as_in_the_official_code(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


@pytest.mark.parametrize("answer", ["yes", "Yes.", "はい。", "是。", "हाँ।", "Oui\u202f!", "нет.", "نعم۔"])  # noqa: RUF001
def test_yes_and_no_are_recognised_in_all_languages_with_their_marks(answer: str) -> None:
    assert kind_of_answer(answer) == "yes/no"
    pair = tidy_pair({"question": "?", "answer": answer, "answer_type": "yes/no"})
    assert pair["answer"].casefold() in YES_OR_NO


@pytest.mark.parametrize(
    ("expected", "answer", "is_same"),
    [
        ("公園", "公園。", True), ("yes", "はい。", True), ("駅", "公園。", False), ("no", "yes", False),
        ("5%", "-5%", False), ("-5%", "\u22125%", True), ("-5", "-5.", True), ("-$5", "$5", False),
        ("10-20", "10 - 20", True), ("t-shirt", "t-shirt", True), ("-", "-", True), ("gray", "grey", True),
        ("couch", "a sofa", True), ("kitchen", "in the kitchen", True), ("tree", "Trees", True),
        ("playing tennis", "tennis", True), ("police car", "automobile", True), ("two", "2 dogs", True),
        ("2 dogs", "3 dogs", False), ("2 dogs", "dogs", False), ("red and white", "white and red", True),
        ("red and white", "red", False), ("green/white", "green", False), ("red", "not red", False),
        ("left", "right", False), ("bike", "bicycle", True), ("taxi", "cab", True), ("cat", "guy", False),
        ("man", "world", False), ("black", "dark", False), ("red", "unknown", False),
    ],
)  # fmt: skip
def test_answers_are_compared_by_meaning(expected: str, answer: str, *, is_same: bool) -> None:
    assert is_same_answer(answer, expected) == is_same_answer(expected, answer) == is_same
