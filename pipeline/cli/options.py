"""Option types and parsers that several commands share."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.storage.object_store import parse_dataset_path, parse_local_path

DataDir = Annotated[
    Path | None,
    typer.Argument(
        parser=parse_dataset_path,
        metavar="PATH",
        help="Dataset folder, or one of its versions.",
        show_default="the last one made",
    ),
]
Checkpoint = Annotated[Path, typer.Argument(parser=parse_local_path, metavar="PATH", help="Checkpoint folder.")]
# Earlier names of options, which go on working.
OLD_OPTIONS = {
    "map": "columns",
    "never": "exclude",
    "layer": "encoder-layer",
    "texts": "text-source",
    "beams": "num-beams",
}
VLLM_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": False}  # collects the arguments after --
DataName = Annotated[
    str | None, typer.Option(help="Dataset folder, version, or ORG/NAME@VERSION on the Hub.", show_default="the last one made")
]
Images = Annotated[
    str | None,
    typer.Option(help="Where the images are, for a version without pixels: a folder of files, a dataset folder, or a source."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


def vllm_flags(context: typer.Context) -> dict[str, Any] | None:
    """Return the arguments after `--` as settings. Raises BadParameter for any other argument that is left over."""
    if not context.args:
        return None
    if "--" not in sys.argv:
        raise typer.BadParameter(f"unexpected argument: {context.args[0]}; flags for vLLM come after --")
    return {"flags": context.args}


def read_pairs(text: str, option: str) -> dict[str, str]:
    """Parse NAME=VALUE,NAME=VALUE into a dictionary. Raises BadParameter."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name and equals and value for name, equals, value in pairs):
        raise typer.BadParameter(f"{text} does not look like NAME=VALUE,NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}
