"""Option types and parsers that several commands share."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Context, Option

from pipeline.cli.output import last_dataset, note_previews
from pipeline.storage.object_store import parse_dataset_path, parse_local_path

if TYPE_CHECKING:
    from pipeline.dataset.version import Version

DATASET_PATH: dict[str, Any] = {"parser": parse_dataset_path, "metavar": "PATH"}
LOCAL_PATH: dict[str, Any] = {"parser": parse_local_path, "metavar": "PATH"}
LAST_MADE = "the last one made"
DataDir = Annotated[Path | None, Argument(**DATASET_PATH, help="Dataset folder, or DIR@VERSION.", show_default=LAST_MADE)]
VLLM_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": False}  # collects the arguments after --
DataName = Annotated[
    str | None, Option(help="Dataset folder, DIR@VERSION, or ORG/NAME@VERSION on the Hub.", show_default=LAST_MADE)
]
Images = Annotated[
    str | None,
    Option(help="Where the images are, for a version without pixels: a folder of files, a dataset folder, or a source."),
]
Style = Annotated[str | None, Option(help="Which style to write.", show_default="brief, else plain")]
BeamsAsTrained = Annotated[
    int | None, Option(min=1, max=64, help="Candidates of the search; 1 is greedy.", show_default="as after its training")
]
AsJson = Annotated[bool, Option("--json", help="Print JSON to stdout.")]


def vllm_flags(context: Context) -> dict[str, Any] | None:
    """Return the arguments after `--` as settings. Raises BadParameter for any other argument that is left over."""
    if not context.args:
        return None
    if "--" not in sys.argv:
        raise BadParameter(f"unexpected argument: {context.args[0]}; flags for vLLM come after --")
    return {"flags": context.args}


def read_names(text: str | None) -> list[str] | None:
    """Parse NAME,NAME into a list; None for no text."""
    return [name.strip() for name in text.split(",")] if text else None


def read_pairs(text: str, option: str) -> dict[str, str]:
    """Parse NAME=VALUE,NAME=VALUE into a dictionary; NAME=VALUE,VALUE is one value with a comma. Raises BadParameter."""
    parts = re.sub(r",(?=[^,=]+(?:,|$))", "\0", text).split(",")
    pairs = [part.replace("\0", ",").partition("=") for part in parts]
    if not all(name and equals and value for name, equals, value in pairs):
        raise BadParameter(f"{text} does not look like NAME=VALUE,NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def open_data(name: str | None, images: str | None) -> "Version":
    """Open the version that `--data` names, local or on the Hub; if it has no pixels, join them from `--images`."""
    from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
    from pipeline.sources.join import with_pixels

    if name and is_hub_name(name):
        version = pull_version(name)
    else:
        path = parse_dataset_path(name) if name else last_dataset()
        version = open_or_download(path, previews=False)
        note_previews(version, path)
    return with_pixels(version, images)
