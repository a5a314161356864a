"""Join the words and punctuation of tokenized texts, such as the captions of Flickr8k and Flickr30k.

A captioner that learns "a dog 's ball ." writes such texts itself.
"""

import re
from functools import cache
from typing import Any

# Forms that only tokenizers write. French has a space before ! ? ; and :
_TOKENIZED = re.compile(
    r"(?<=\S) [.,](?= |$)|(?<=\w) (?:'(?:s|m|d|re|ve|ll)|n't)\b|``|''|-[lr][rs]b-|(?<= )\" ", re.IGNORECASE
)
_BRACKETS = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "``": '"', "''": '"'}
_NEGATION = re.compile(r"(?<=\w) (n't)\b", re.IGNORECASE)
_I = re.compile(r"\bi\b")


def join_tokens(text: str) -> str:
    """Return a tokenized text as a person writes it. Other texts are returned unchanged.

    A tokenized text in lower or upper case gets a capital letter at its start only.
    """
    if not _TOKENIZED.search(text):
        return text
    tokens = [_BRACKETS.get(token.lower(), token) for token in _NEGATION.sub(r"\1", text).split()]
    joined: str = _detokenizer().detokenize(tokens)
    if text.islower() or text.isupper():
        joined = _I.sub("I", joined.lower())
        return joined[:1].upper() + joined[1:]
    return joined


@cache
def _detokenizer() -> Any:
    from sacremoses import MosesDetokenizer  # takes .3 s to import, and most texts are not tokenized

    return MosesDetokenizer(lang="en")
