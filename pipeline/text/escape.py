"""Escape untrusted text for a terminal, a page, or a card in Markdown.

Model replies, file names, columns and server messages may hold anything: sequences that a terminal obeys (OSC
52 writes the clipboard), characters that change the direction of writing, markup.
"""

import html
import re

MAX_SHOWN_CHARACTERS = 2000
# Characters that move the cursor, change the direction of writing, or hide. Joiners (200c, 200d) are allowed:
# scripts and emoji need them.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
# The same for a terminal, where line breaks and tabs are allowed.
_TERMINAL_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_URL_PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s/\"]+(?=@)")
_URL_USER = re.compile(r"(://)[^\s/@:\"?#]+(?=@)")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
# Markdown renderers turn these into links.
_LINKED = {"://": "&#58;//", "www.": "www&#46;", "@": "&#64;"}


class Markdown(str):
    """Text that is safe in Markdown."""

    __slots__ = ()


def visible(text: str) -> str:
    """Return a text for a page: of bounded length, with control characters as [U+001B]."""
    shown = _CONTROLS.sub(lambda match: f"[U+{ord(match[0]):04X}]", text[:MAX_SHOWN_CHARACTERS])
    return shown if len(text) <= MAX_SHOWN_CHARACTERS else f"{shown}… ({len(text):,} characters)"


def printable(text: str) -> str:
    """Return a text for a terminal or a log: without passwords, with control characters as \\x1b."""
    return _TERMINAL_CONTROLS.sub(lambda match: ascii(match[0])[1:-1], without_passwords(text))


def without_passwords(text: str) -> str:
    """Mask passwords in URLs, and user names without a password, which may be tokens."""
    return _URL_USER.sub(r"\1***", _URL_PASSWORD.sub(r"\1***", text))


def on_one_line(text: str) -> str:
    """Return a text with spaces for line breaks and other control characters."""
    return _CONTROLS.sub(" ", text)


def markdown(value: object) -> object:
    """Return a value for a line of Markdown, without markup, links and line breaks. Numbers stay numbers."""
    if isinstance(value, Markdown | int | float):
        return value
    text = _MARKUP.sub(r"\\\1", html.escape(on_one_line(str(value)), quote=False))
    for word, entity in _LINKED.items():
        text = text.replace(word, entity)
    return Markdown(text)


def markdown_code(value: object) -> Markdown:
    """Return a value for `code` or a fenced line: on one line, with apostrophes for backticks."""
    return Markdown(on_one_line(str(value)).replace("`", "'") or "-")


def markdown_block(value: object) -> Markdown:
    """Return lines for a block that is fenced by four backticks."""
    lines = str(value).split("\n")
    return Markdown("\n".join(on_one_line(line).replace("````", "'''' ") for line in lines))
