"""Redact personal data in text. Each match is replaced by the name of its kind, such as [email]."""

import re
from collections.abc import Callable


def _luhn(number: str) -> bool:
    """Return whether the last digit is the valid check digit of a card number (H. P. Luhn, 1960)."""
    digits = [int(letter) for letter in reversed(number) if letter.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _iban(text: str) -> bool:
    """Return whether the two check digits of an IBAN are valid (ISO 13616)."""
    letters = text.replace(" ", "").upper()
    moved = letters[4:] + letters[:4]
    return 15 <= len(letters) <= 34 and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


# Kinds are redacted in this order. A match is redacted only if the function accepts it (`bool` always does).
_KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"), bool),
    "url": (re.compile(r"\b(?:https?://|www\.)[^\s<>\"']+[^\s<>\"'.,;:!?)]", re.IGNORECASE), bool),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    # A phone number starts with a country code, an area code in brackets or a zero, or consists of groups of
    # 3, 3 and 4 digits.
    "phone": (
        re.compile(
            r"(?<![\w.,])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?)?(?:[ .-]?\d{2,10}){1,5}"
            r"|\(\d{2,5}\)[ .-]?\d{2,8}(?:[ .-]\d{2,4}){0,3}"
            r"|0\d{1,4}[ /-]\d{3,10}(?:[ -]\d{2,6}){0,3}|(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w.]*\d)"
        ),
        lambda text: 9 <= sum(map(str.isdigit, text)) <= 15,
    ),
    "card": (re.compile(r"(?<![\d+])\d(?:[ -]?\d){12,18}\b"), _luhn),
}
# Every number has two digits with at most one space or hyphen between them. The first character class has the
# ASCII digits and all characters that are not ASCII, such as other digits. This class is faster than \d.
_TWO_DIGITS = re.compile(r"[^\x00-/:-\x7f][ -]?\d")


def redact(text: str) -> tuple[str, int]:
    """Replace personal data with `[email]` and so on. Return the text and the number of replacements."""
    may_match = "@" in text or "://" in text or "www." in text.lower() or _TWO_DIGITS.search(text)
    if not may_match:
        return text, 0
    count = 0
    for name, (pattern, is_valid) in _KINDS.items():
        # Replace the last match first, since a replacement moves all later matches.
        for match in reversed([match for match in pattern.finditer(text) if is_valid(match[0])]):
            text = f"{text[: match.start()]}[{name}]{text[match.end() :]}"
            count += 1
    return text, count
