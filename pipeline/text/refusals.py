"""Detect refusals: texts in which a model declines to answer."""

import re

# A whole reply that begins like this is asked again, so the pattern is narrow; changing it would ask known replies again.
_DECLINED = re.compile(
    r"\s*(?:i(?:'m| am) (?:sorry|unable|not able)|sorry,|i apologi[sz]e|as an ai|i (?:can(?:no|')t|won't))\b", re.IGNORECASE
)
_REFUSAL = re.compile(
    r"\s*(?:(?:i(?:'m| am) |we are )?(?:sorry|afraid|unable|not able)\b|i apologi[sz]e|as an? (?:ai|language model)\b"
    r"|(?:i|we) (?:can(?:no|')?t|cannot|won't|do not|don't) (?:see|view|provide|determine|help|assist|describe|identify|answer)"
    r"|no image (?:was |is |has been )?(?:provided|attached|given|visible)|please (?:provide|upload|attach|share)\b"
    r"|(?:it is|it's) (?:not possible|impossible) to\b)",
    re.IGNORECASE,
)
_ON_A_SIGN = ("afraid", "sorry", "please")


def is_declined(reply_text: str) -> bool:
    """Return True if a text of a reply declines the request, so that the model is asked again."""
    return bool(_DECLINED.match(reply_text))


def is_refusal(text: str, *, is_answer: bool = False) -> bool:
    """Return True if a text begins like a refusal. An answer may quote a sign: "Sorry, we are closed"."""
    return bool(_REFUSAL.match(text)) and not (is_answer and text.lstrip().lower().startswith(_ON_A_SIGN))
