"""Escape text of strangers for where it is shown: a terminal, a page, a card in Markdown.

Model replies, file names, columns, server messages and settings of other people's datasets may hold anything: sequences that a
terminal obeys (OSC 52 writes the clipboard), characters that turn the direction of writing, markup.
"""

import html
import re

MAX_SHOWN_CHARACTERS = 2000
# Characters that move the cursor, turn the direction of writing or hide; joiners (200c, 200d) are part of scripts and emoji.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
# Lines and tabs may stand on a terminal.
_OF_A_TERMINAL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s/\"]+(?=@)")  # of an address
_NAME_ALONE = re.compile(r"(://)[^\s/@:\"?#]+(?=@)")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
_LINKED = {"://": "&#58;//", "www.": "www&#46;", "@": "&#64;"}  # what renderers of Markdown turn into links by themselves


class Markdown(str):
    """Text that may stand in Markdown as it is."""

    __slots__ = ()


def visible(text: str) -> str:
    """Return a text for a page: of bounded length, with control characters written out as [U+001B]."""
    shown = _CONTROLS.sub(lambda match: f"[U+{ord(match[0]):04X}]", text[:MAX_SHOWN_CHARACTERS])
    return shown if len(text) <= MAX_SHOWN_CHARACTERS else f"{shown}… ({len(text):,} characters)"


def printable(text: str) -> str:
    """Return a text for a terminal or a log: no password of an address, no character that a terminal obeys.

    Such characters become escapes, such as \\x1b; lines and tabs stay.
    """
    return _OF_A_TERMINAL.sub(lambda match: ascii(match[0])[1:-1], without_passwords(text))


def without_passwords(text: str) -> str:
    """Return a text in which passwords of addresses are asterisks, and so are names alone, which may be tokens.

    http://user:***@host, https://***@host.
    """
    return _NAME_ALONE.sub(r"\1***", _PASSWORD.sub(r"\1***", text))


def on_one_line(text: str) -> str:
    """Return a text without line breaks and other control characters."""
    return _CONTROLS.sub(" ", text)


def markdown(value: object) -> object:
    """Return a value for the middle of a line of Markdown: no markup, no link, no line break. Numbers stay numbers."""
    if isinstance(value, Markdown | int | float):
        return value
    text = _MARKUP.sub(r"\\\1", html.escape(on_one_line(str(value)), quote=False))
    for word, entity in _LINKED.items():
        text = text.replace(word, entity)
    return Markdown(text)


def markdown_code(value: object) -> Markdown:
    """Return a value for the inside of `code` or a fenced line: on one line, with apostrophes for backticks."""
    return Markdown(on_one_line(str(value)).replace("`", "'") or "-")


def markdown_block(value: object) -> Markdown:
    """Return lines for the inside of a block that is fenced by four backticks, and cannot end it."""
    lines = str(value).split("\n")
    return Markdown("\n".join(_CONTROLS.sub(" ", line).replace("````", "'''' ") for line in lines))
