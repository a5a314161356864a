"""Questions: one question, with an answer that says something and that the question does not contain."""

import pytest

from pipeline.text.questions import gives_answer_away, is_one_question, says_nothing


@pytest.mark.parametrize(
    "answer",
    [
        "...",
        "I don't know",
        "not sure",
        "Unsure",
        "unclear from here",
        "Not visible in the image",
        "cannot be determined",
        "N/A",
        "There is no clock",
        "too blurry to tell",
        "The text is illegible",
        "It's hard to say",
        "Unreadable.",
        "null",
        "no idea",
        "none of the above",
        "Can't tell",
    ],
)
def test_an_answer_may_say_nothing(answer: str) -> None:
    assert says_nothing(answer)


@pytest.mark.parametrize(
    "answer",
    ["no", "nothing", "none", "2", "no one", "not a dog", "cannon", "clear", "Not yet begun", "null island"],
)
def test_a_short_answer_says_something(answer: str) -> None:
    assert not says_nothing(answer)


@pytest.mark.parametrize(
    ("question", "is_one"),
    [
        ("What color is the dog?", True),
        ("What does the sign 'Who?' say?", True),
        ("Is it big? or small?", True),
        ("What color is the dog? What is it doing?", False),
        ("What color is it? (A) brown (B) black", False),
    ],
)
def test_a_question_is_one(question: str, *, is_one: bool) -> None:
    assert is_one_question(question) == is_one


@pytest.mark.parametrize(
    ("question", "answer", "gives_away"),
    [
        ("What animal is the cat?", "cat", True),
        ("What animal is the cat?", "a cat", True),
        ("What is on the table with the pizzas?", "pizza", True),
        ("What is the wooden table made of?", "wood", True),
        ("What does the woman in the red dress wear?", "a red dress", True),
        ("What does the woman in the red dress wear?", "dress that is red", False),
        ("Is it red or blue?", "red", False),
        ("How many of the 3 dogs sleep?", "3", False),
        ("How many sheep?", "many", False),
        ("Is the dog big?", "yes", False),
        ("What is in the glass?", "gas", False),
        ("What is it?", "", False),
    ],
)
def test_a_question_gives_its_answer_away(question: str, answer: str, *, gives_away: bool) -> None:
    assert gives_answer_away(question, answer) == gives_away
