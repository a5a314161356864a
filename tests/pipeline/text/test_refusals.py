"""Refusals: texts that decline to describe the image."""

import pytest

from pipeline.text.normalize import words_of
from pipeline.text.refusals import is_declined, is_refusal


@pytest.mark.parametrize(
    ("text", "declined", "refusal"),
    [
        ("I am sorry, but I cannot see it.", True, True), ("Sorry, there is no image.", False, True),
        ("I cannot help with that.", True, True), ("As an AI, I have no eyes.", True, True),
        ("I won't stop.", True, False), ("It is not possible to tell.", False, True),
        ("Unable to fly, the penguin walks.", False, True), ("No image provided.", False, True),
        ("I am afraid of dogs.", False, True), ("More context is needed.", False, True),
        ("Further details are required.", False, True),
        ("Additional information would be necessary.", False, True),
        ("I am unwilling to describe it.", False, True),
        ("This photo is unreadable.", False, True), ("A sorry sight: a dog in the rain.", False, False),
    ],
)  # fmt: skip
def test_refusals_and_declined_requests_are_detected(text: str, *, declined: bool, refusal: bool) -> None:
    assert (is_declined(text), is_refusal(text, words_of(text))) == (declined, refusal)


def test_answer_that_quotes_an_apology_is_not_a_refusal() -> None:
    assert is_refusal("Sorry, we are closed", ["sorry"])
    assert not is_refusal(" Sorry, we are closed", ["sorry"], may_quote_sign=True)
    assert not is_refusal("Image not available", ["not"], may_quote_sign=True)
    assert is_refusal("I cannot see it", ["cannot"], may_quote_sign=True)
