"""Options and arguments that several commands share, and their parsers."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Context, Option

from pipeline.cli.output import note_previews, say
from pipeline.storage.object_store import parse_dataset_path, parse_local_path

if TYPE_CHECKING:
    from pipeline.dataset.version import Version

DATASET_PATH: dict[str, Any] = {"parser": parse_dataset_path, "metavar": "PATH"}
LOCAL_PATH: dict[str, Any] = {"parser": parse_local_path, "metavar": "PATH"}
VLLM_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": False}
# Commands that remove or publish data do not choose between several datasets.
LAST_MADE, ONLY_MADE = "the newest dataset", "the only dataset in data/"
BY_STYLE = "brief, else plain"


def option(text: str, default: str | bool = True, **more: Any) -> Any:
    """Return a Typer option with help. `default` describes the default, or is True to show its value."""
    return Option(help=text, show_default=default, **more)


def path_option(text: str, default: str | bool = True) -> Any:
    """Return an option for a path on this machine."""
    return option(text, default, **LOCAL_PATH)


def dataset_argument(text: str = "DIR, DIR@VERSION", default: str = LAST_MADE) -> Any:
    """Return the argument that names a dataset or a version. See dataset_path."""
    text = f"Dataset: {text}, or VERSION of {default}."
    return Argument(metavar="DATASET", help=text, show_default=default)


Dataset = Annotated[str | None, dataset_argument()]
AnyDataset = Annotated[str | None, dataset_argument("DIR, DIR@VERSION, ORG/NAME@VERSION (Hub)")]
Images = Annotated[str | None, option("Folder or source with the images, if the version has no images.")]
CaptionerName = Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME on the Hub.")]
NumBeams = Annotated[
    int | None,
    option("Number of beams, or 1 for greedy decoding.", "num_beams of the training", min=1, max=64),
]
BatchSize = Annotated[int, option("Images per batch.", min=1)]
Split = Literal["train", "validation", "test"]
AsJson = Annotated[bool, Option("--json", help="Print JSON to stdout.")]


def vllm_flags(context: Context, option: str) -> list[str]:
    """Return the arguments after `--`. Raises BadParameter for other arguments, and suggests `option`."""
    flags = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    if len(context.args) > len(flags):
        name = context.args[0]
        value = f"folder:{name}" if option == "--source" and Path(name).is_dir() else name
        raise BadParameter(f"unexpected argument: {name} ({option} {value}?); flags for vLLM come after --")
    return flags


def read_names(text: str | None) -> list[str] | None:
    """Parse NAME,NAME into a list. Return None if the text is empty."""
    return [name.strip() for name in text.split(",")] if text else None


def read_pairs(text: str, option: str) -> dict[str, str]:
    """Parse NAME=VALUE,NAME=VALUE into a dictionary. A value may contain commas, as in NAME=VALUE,VALUE."""
    parts = re.sub(r",(?=[^,=]+(?:,|$))", "\0", text).split(",")
    pairs = [part.replace("\0", ",").partition("=") for part in parts]
    if not all(name and equals and value for name, equals, value in pairs):
        raise BadParameter(f"{text} does not look like NAME=VALUE,NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def dataset_path(name: str | None, *, is_only: bool = False) -> Path:
    """Return the path of a dataset or a version.

    Without a name, return the path of the dataset with the newest version. A name such as v1.0.0 is a version
    of this dataset. With `is_only`, raises StoreError if there are several datasets in `data/`.
    """
    from pipeline.dataset.directory import newest_dataset
    from pipeline.dataset.version import VERSION_NAME

    if name and (not VERSION_NAME.fullmatch(name) or Path(name).exists()):
        return parse_dataset_path(name)
    folder = newest_dataset(is_only=is_only)
    say(f"dataset: {folder}", "dim")
    return folder.with_name(f"{folder.name}@{name}") if name else folder


def open_data(name: str | None, images: str | None) -> "Version":
    """Open a local version or a version on the Hub. If it has no images, read them from `images`.

    If `name` is a dataset, open its newest complete version.
    """
    from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
    from pipeline.sources.join import with_pixels

    if name and is_hub_name(name):
        return with_pixels(pull_version(name), images)
    path = dataset_path(name)
    version = open_or_download(path, previews=False)
    note_previews(version, path)
    return with_pixels(version, images)
