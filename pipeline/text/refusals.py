"""Detect refusals, in which a model or a paid annotator declines to describe the image."""

import re
from collections.abc import Collection

from pipeline.text import WORDS, pattern
from pipeline.text.normalize import sentences_with

_DECLINED = pattern("declined", re.IGNORECASE)
_BEGINS = pattern("refusal_start", before=r"\s*(?:unfortunately,? )?")
_SAYS = pattern("refusal", before=r"\b")
# Nearly every match of the last two patterns has one of these words. Few captions have them, so testing for
# them first makes the search 9 times faster.
_HINT_WORDS = frozenset(WORDS["refusing"].split())
# Text on signs and screens, such as "Sorry, we are closed" or "Image not available", has none of these words.
_SPEAKING = frozenset(("i", "i'm", "i\u2019m", "ai", "assistant", "unable", "cannot", "can't", "can\u2019t"))


def is_declined(reply_text: str) -> bool:
    """Return whether a reply declines the request, which is then sent again."""
    return bool(_DECLINED.match(reply_text))


def is_refusal(text: str, words: Collection[str], *, may_quote_sign: bool = False) -> bool:
    """Return whether a text is a refusal, or states that there is no image. `words` has the text's words.

    With `may_quote_sign`, "Sorry, we are closed" is not a refusal.
    """
    if _HINT_WORDS.isdisjoint(words) or (may_quote_sign and _SPEAKING.isdisjoint(words)):
        return False
    text = text.lower()
    return bool(_BEGINS.match(text)) or any(map(_SAYS.search, sentences_with(_HINT_WORDS, text)))
