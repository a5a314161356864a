"""Escaping: untrusted text has no effect on a terminal, in Markdown or in a message."""

import pytest

from pipeline.text.escape import (
    MAX_SHOWN_CHARACTERS,
    Markdown,
    markdown,
    markdown_block,
    markdown_code,
    on_one_line,
    printable,
    visible,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("A cat.", "A cat."), ("\x1b[31mred", "[U+001B][31mred"), ("abc\u202edcba", "abc[U+202E]dcba"),
        ("line\nline", "line[U+000A]line"), ("lone \ud800 half", "lone [U+D800] half"),
        ("👩\u200d🚀", "👩\u200d🚀"),
    ],
)  # fmt: skip
def test_control_characters_are_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_long_text_is_cut_and_shows_its_length() -> None:
    shown = visible("x" * 10_000_000)
    assert shown == "x" * MAX_SHOWN_CHARACTERS + "… (10,000,000 characters)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Überschrift 漢字 👩‍🚀", "Überschrift 漢字 👩‍🚀"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]52;c;cGF3bmVk\x07", r"\x1b]52;c;cGF3bmVk\x07"), ("\x9b31m", r"\x9b31m"),
        ("back\rspace\x08", r"back\rspace\x08"), ("turned \u202e round", r"turned \u202e round"),
        ("half \ud800", r"half \ud800"),
        ("at http://bob:s3:cr@t@host:8000/v1, said x@y", "at http://bob:***@host:8000/v1, said x@y"),
        ("http://bob:s3,c'r!t@host, and x@y", "http://bob:***@host, and x@y"),
        ("judge@https://:s3cret@[::1]/v1", "judge@https://:***@[::1]/v1"),
        ("""["http://a:80", "http://b:s3cret@c", "d@e"]""", """["http://a:80", "http://b:***@c", "d@e"]"""),
        # A user name alone may be a token.
        ("http://host:8000/a@b and http://bob@host", "http://host:8000/a@b and http://***@host"),
    ],
)  # fmt: skip
def test_terminal_controls_are_escaped_and_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_markup_links_and_line_breaks_are_escaped() -> None:
    assert markdown("a\n# b") == r"a \# b"
    assert markdown("<b>`x`</b>") == r"&lt;b&gt;\`x\`&lt;/b&gt;"
    assert markdown("see https://a.example, www.a.example") == "see https&#58;//a.example, www&#46;a.example"
    assert markdown(Markdown("*as it is*")) == "*as it is*"
    assert markdown(7) == 7


def test_text_cannot_close_the_markdown_code_block_around_it() -> None:
    assert markdown_code("x`<script>\n") == "x'<script> "
    assert markdown_code("") == "-"
    assert "````" not in markdown_block("a\n````\n<script>\n`````")
    assert markdown_block("a\nb") == "a\nb"
    assert on_one_line("a\r\nb\x85c") == "a  b c"
