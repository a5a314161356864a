"""Render docs/cli.md, the reference of all commands, for `make docs`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.core import TyperGroup, TyperOption

from pipeline.cli import app

PAGE = Path(__file__).parents[1] / "docs/cli.md"
HEADER = """<!-- `make docs` writes this page. settings.md explains the settings. -->

"""


def commands(group: TyperGroup, prefix: str = "synth") -> Iterator[tuple[str, Any]]:
    """Yield name and command of all commands, in the order of the help."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{prefix} {name}")
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            yield f"{prefix} {name}", command


def render_page() -> str:
    """Return the text of docs/cli.md, with the options that `synth generate --help-all` shows."""
    group = typer.main.get_group(app)
    for option in group.commands["generate"].params:
        if isinstance(option, TyperOption):
            option.hidden = False
    page = get_docs_for_click(obj=group, ctx=typer.Context(group), name="synth", title="Commands")
    # Typer separates a default from the range of a number by a semicolon.
    return HEADER + re.sub(r"; (?=x[<>]|\d+<)", ", ", page)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
