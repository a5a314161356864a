"""Escape untrusted text for a terminal, an HTML page, or a Markdown card.

Model replies, file names, columns and server messages may contain terminal escape sequences (OSC 52 writes to
the clipboard), characters that change the text direction, or markup.
"""

import html
import re
from typing import Any

MAX_SHOWN_CHARACTERS = 2000
# Characters that move the cursor, change the text direction, or are invisible. Joiners (200c, 200d) are
# allowed, since some scripts and emoji need them.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
# The characters to escape for a terminal, where line breaks and tabs are allowed.
_TERMINAL_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_DIRECTIONS = re.compile(r"[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")
# Special tokens of chat models: <|im_start|> (DeepSeek has wide bars), <image>, </s>, <<SYS>>, [INST].
_SPECIAL_TOKEN = re.compile(
    r"<(?=[|\uff5c/]?[^\W\d][\w|\uff5c\u2581/:.-]{0,60}>)|\[(?=/?[A-Z][A-Z_]{1,20}\])"
)
_URL_PASSWORD = re.compile(r"(://[^\s/@:]*:)[^\s/\"]+(?=@)")
_URL_USER = re.compile(r"(://)[^\s/@:\"?#]+(?=@)")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
# Markdown renderers turn these into links.
_LINKED = {"://": "&#58;//", "www.": "www&#46;", "@": "&#64;"}


class Markdown(str):
    """A string that is safe to insert into Markdown."""

    __slots__ = ()


def visible(text: str) -> str:
    """Escape text for a page: limit its length, and show control characters as [U+001B]."""
    shown = _CONTROLS.sub(lambda match: f"[U+{ord(match[0]):04X}]", text[:MAX_SHOWN_CHARACTERS])
    return shown if len(text) <= MAX_SHOWN_CHARACTERS else f"{shown}… ({len(text):,} characters)"


def printable(text: str) -> str:
    """Escape text for a terminal or a log: mask passwords, and show control characters as \\x1b."""
    return _TERMINAL_CONTROLS.sub(lambda match: ascii(match[0])[1:-1], without_passwords(text))


def plain_value(value: Any) -> Any:
    """Break special tokens in the strings of a value for a prompt, and remove text direction marks.

    A tokenizer would read `<|im_start|>` in a caption as the end of the quoted text and a new role.
    """
    if isinstance(value, str):
        return _SPECIAL_TOKEN.sub(r"\g<0> ", _DIRECTIONS.sub("", value))
    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    return type(value)(map(plain_value, value)) if type(value) in (list, tuple) else value


def without_passwords(text: str) -> str:
    """Mask passwords in URLs. Also masks user names without a password, since they may be tokens."""
    return _URL_USER.sub(r"\1***", _URL_PASSWORD.sub(r"\1***", text))


def encodable(text: str) -> str:
    """Replace lone surrogates, which JSON may hold but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def on_one_line(text: str) -> str:
    """Replace line breaks and other control characters with spaces."""
    return _CONTROLS.sub(" ", text)


def markdown(value: object) -> object:
    """Escape a value for a line of Markdown, so that it has no markup or links. Numbers stay unchanged."""
    if isinstance(value, Markdown | int | float):
        return value
    text = _MARKUP.sub(r"\\\1", html.escape(on_one_line(str(value)), quote=False))
    for word, entity in _LINKED.items():
        text = text.replace(word, entity)
    return Markdown(text)


def markdown_code(value: object) -> Markdown:
    """Escape a value for inline code or a fenced line: remove line breaks, and replace backticks."""
    return Markdown(on_one_line(str(value)).replace("`", "'") or "-")


def markdown_block(value: object) -> Markdown:
    """Escape lines for a code block that is fenced by four backticks."""
    lines = str(value).split("\n")
    return Markdown("\n".join(on_one_line(line).replace("````", "'''' ") for line in lines))
