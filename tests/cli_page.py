"""Render docs/cli.md from the commands: `make docs` writes it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup

from pipeline.cli import app
from pipeline.cli.run_options import OPTIONS

PAGE = Path(__file__).parents[1] / "docs/cli.md"
HEADER = """# Commands

All commands of `synth` with their options. `synth COMMAND --help` prints the same; `--help-all` shows all
options of `generate` and `preview`. [settings.md](settings.md) explains the settings. `synth -v COMMAND` also
prints the log.

`make docs` writes this page.
"""
RUN_OPTIONS = {option.name for option in OPTIONS} | {"config"}


def commands(group: TyperGroup, prefix: str = "synth") -> Iterator[tuple[str, Any]]:
    """Yield (name, command) of all commands in the order of the help, such as `synth versions list`."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def argument_name(argument: Any) -> str:
    name = argument.metavar or f"{argument.name.upper()}{'...' if argument.nargs == -1 else ''}"
    return name if argument.required or name.startswith("[") else f"[{name}]"


def option_name(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    names[-1] += f" {option.metavar}" if option.metavar else ""
    return ", ".join(f"`{name}`" for name in names)


def default_of(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    is_unset = parameter.default in (None, False) or callable(parameter.default)
    return "" if is_unset else f"`{parameter.default}`"


def render_command(name: str, command: Any) -> str:
    """Return the section of a command: its purpose, its usage and the table of its options."""
    arguments = [parameter for parameter in command.params if isinstance(parameter, TyperArgument)]
    options = [parameter for parameter in command.params if not isinstance(parameter, TyperArgument)]
    options = [option for option in options if option.name not in ("help", "help_all")]
    usage = " ".join([name, *map(argument_name, arguments), *(["[OPTIONS]"] if options else [])])
    if name == "synth preview":
        options = [option for option in options if option.name not in RUN_OPTIONS]
    purpose = " ".join(command.help.split("\n\n")[0].split())
    lines = [f"## `{name}`", "", purpose, "", "```", usage, "```", ""]
    if name == "synth preview":
        lines += [
            "`preview` also accepts the options of `generate` that set the images, tasks, model and budget.",
            "",
        ]
    rows = [(f"`{argument_name(argument)}`", argument) for argument in arguments]
    rows += [(option_name(option), option) for option in options]
    if rows:
        lines += ["| argument or option | meaning | default |", "|---|---|---|"]
    for label, parameter in rows:
        cells = (label, parameter.help or "", default_of(parameter))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def render_page() -> str:
    """Return the text of docs/cli.md."""
    group = typer.main.get_group(app)
    return "\n".join([HEADER, *(render_command(name, command) for name, command in commands(group))])


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
