"""Tokenized texts are joined, and other texts are not changed."""

import pytest

from pipeline.text.tokenized import join_tokens

JOINED = {
    "A child in a pink dress , climbing .": "A child in a pink dress, climbing.",
    "a man 's dog runs": "A man's dog runs",
    "A sign that says `` active '' .": 'A sign that says "active".',
    'A boy making an " OK " sign .': 'A boy making an "OK" sign.',
    "-LRB- left -RRB- two dogs .": "(left) two dogs.",
    "The dog is n't wet .": "The dog isn't wet.",
    "they 're here and i 'm there": "They're here and I'm there",
    "TWO DOGS PLAY IN THE SNOW .": "Two dogs play in the snow.",
    "What is this , a dog ?": "What is this, a dog?",
}
UNCHANGED = [
    "A man's dog, sitting.",
    "a dog on a beach",
    "STOP",
    'A "5 mph" sign.',
    "Quelle heure est-il ?",
    "Un chien : noir !",
    "A .5 mm pen and a .22 rifle",
    "rock 'n' roll",
    "A 5' 10\" tall man",
    "...",
    "",
]


@pytest.mark.parametrize(("text", "joined"), JOINED.items())
def test_tokenized_text_is_joined(text: str, joined: str) -> None:
    assert join_tokens(text) == joined
    assert join_tokens(joined) == joined


@pytest.mark.parametrize("text", UNCHANGED)
def test_text_that_is_not_tokenized_is_unchanged(text: str) -> None:
    assert join_tokens(text) == text
