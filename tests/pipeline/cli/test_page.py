"""The page of all commands, and the commands in other pages."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pipeline.cli import app
from tests.check_real import further_commands
from tests.cli_page import PAGE, commands, render_page

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted({*ROOT.glob("docs/*.md")} - {PAGE})]
COMMANDS = dict(commands(typer.main.get_group(app)))
EXAMPLE = re.compile(r"^(?:\$ )?(synth (?:\\\n|[^\n`])+)$|`(synth [a-z][^`]*)`", re.MULTILINE)
END = re.compile(r"\s+(?:\.\.\.|--\s|#|&&|\||>|2>|;|\\$).*|\s&$", re.DOTALL)


def examples(page: Path) -> Iterator[list[str]]:
    """Yield the words of the `synth` commands in a page."""
    for line, inline in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        yield shlex.split(END.sub("", (line or inline).replace("\\\n", " ")))


def parse(words: list[str]) -> list[str]:
    """Parse a command without running it. Return the arguments that match no parameter."""
    name = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)
    command = COMMANDS[name]
    parser = command.make_parser(command.context_class(command, info_name=name))
    return list(parser.parse_args(words[len(name.split()) :])[1])


def test_cli_page_is_generated_from_the_commands() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_page_use_only_existing_options(page: Path) -> None:
    for words in examples(page):
        assert parse(words) == [], words


def test_commands_of_a_real_gpu_check_use_only_existing_options() -> None:
    for words in further_commands("data", "ORG/NAME"):
        assert parse(["synth", *words]) == [], words
