"""The page of all commands."""

from tests.cli_page import PAGE, render_page


def test_cli_page_is_generated_from_the_commands() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run `make docs`"
