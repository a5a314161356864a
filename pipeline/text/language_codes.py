"""Recognized languages by ISO 639 code, with their English names and their words for yes and no."""

from pipeline.text import WORDS

RECOGNISED = frozenset(WORDS["recognised"].split())
# The English name, and the words for yes and no.
LANGUAGES = {code: tuple(names) for code, *names in map(str.split, WORDS["languages"].strip().splitlines())}
# Characters that may follow an answer in any of these languages.
SENTENCE_ENDS = " .!…。！．।॥۔\u00a0\u202f"  # noqa: RUF001
# Maps the words for yes and no in each language to English.
YES_OR_NO: dict[str, str] = {}
for _, yes, no in reversed(LANGUAGES.values()):
    YES_OR_NO |= {yes: "yes", no: "no"}


def language_name(code: str | None) -> str:
    """Return the English name of a language, or its code if unknown, or "" for English and None."""
    if code in (None, "en"):
        return ""
    return LANGUAGES[code][0] if code in LANGUAGES else str(code)
