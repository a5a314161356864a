"""The `synth` command. Parse, call one function, print; nothing is decided here.

Heavy imports wait until a command needs them: `synth --help` must not load torch, transformers or datasets.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import ConfigError, SynthError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

DataDir = Annotated[Path | None, typer.Argument(help="Dataset folder, or one of its versions.", show_default="the last one made")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


@app.callback()
def synth() -> None:
    """Make a vision-language dataset, publish it, train on it."""


@app.command()
def generate(
    source: Annotated[str | None, typer.Option(help="Where the images come from; `synth sources` lists the names.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the source to read, where it has some.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many images.", show_default="all; scenes: 1000")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws scenes, samples replies and splits.", show_default="0")] = None,
    tasks: Annotated[str | None, typer.Option(help="What to ask, with commas.", show_default="caption,qa")] = None,
    out: Annotated[Path | None, typer.Option(help="Dataset folder; run again to continue it.", show_default="data/SOURCE")] = None,
    from_stage: Annotated[str | None, typer.Option(help="Start at this stage, from what the one before it left.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto or embedded: a model in this process.", show_default="auto")] = None,
    model: Annotated[str | None, typer.Option(help="tiny, a folder, or a Hub id of a Qwen2.5-VL.", show_default="tiny")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same settings and more; flags win over it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn images into a checked, deduplicated and versioned dataset."""
    from pipeline.config import resolve
    from pipeline.progress import progress
    from pipeline.run import generate_version

    resolved = resolve(
        config,
        source=source,
        source_split=split,
        limit=limit,
        seed=seed,
        tasks=tasks.split(",") if tasks else None,
        engine=engine,
        model=model,
    )
    with progress() as talk:
        result = generate_version(resolved, out, from_stage, talk)
    for step in result.funnel:
        lost = ", ".join(f"{count} {reason}" for reason, count in step.rejected.items())
        say(f"{step.stage}: {step.kept} of {step.input} {step.unit} kept{f' (rejected: {lost})' if lost else ''}")
    say(f"asked the model {result.counts.asked} of {result.counts.total} requests; the rest was in the journal")
    name = result.version.name
    say(f"made {name}" if result.is_new else f"nothing new: {name} already holds exactly these rows")
    show({"version": name, "path": str(result.version.path), "digest": result.version.manifest["digest"]}, as_json, "path")


@app.command()
def sources(as_json: AsJson = False) -> None:
    """List the sources that `synth generate` can read."""
    from pipeline.source import SOURCES

    if as_json:
        typer.echo(json.dumps(SOURCES))
    else:
        for name, what in SOURCES.items():
            typer.echo(f"{name:<14} {what}")


@app.command()
def versions(data: DataDir = None, as_json: AsJson = False) -> None:
    """List the versions of a dataset, oldest first."""
    from pipeline.store import Folder, last_made

    found = Folder(data or last_made()).versions()
    rows = [{name: v.manifest[name] for name in ("version", "parent", "digest", "rows")} for v in found]
    if as_json:
        typer.echo(json.dumps(rows))
    for row in rows if not as_json else []:
        counts = ", ".join(f"{count} {split}" for split, count in row["rows"].items())
        typer.echo(f"{row['version']:<10} {row['digest'][:12]}  {counts}  (from {row['parent'] or 'nothing'})")


def say(text: str) -> None:
    """Talk to the person: stderr."""
    print(text, file=sys.stderr)


def show(values: dict[str, Any], as_json: bool, key: str) -> None:
    """Print data to stdout: all of it as JSON, or the one value that a script would want."""
    typer.echo(json.dumps(values) if as_json else str(values[key]))


def main() -> None:
    """Run the command; a known error is one line and a hint, an unknown one is a traceback."""
    try:
        app()
    except SynthError as error:
        say(f"synth: {error}")
        if error.hint:
            say(f"  hint: {error.hint}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
