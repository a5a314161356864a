"""Stage: source. Where the images come from, by name; a source yields samples, or rows that it had to reject."""

from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.source.folder import open_folder
from pipeline.source.scenes import open_scenes
from pipeline.types import Source

SOURCES = {
    "scenes": "drawn scenes with known facts, endless; --seed and --limit choose them",
    "folder:PATH": "every image under a folder of yours, subfolders too",
}


def open_source(name: str, *, split: str | None, seed: int, limit: int | None) -> Source:
    """Open a source by its name.

    Raises:
        ConfigError: the name is unknown, or the source has no such split.
        SourceError: the source cannot be read.
    """
    kind, _, argument = name.partition(":")
    if split is not None and kind in ("scenes", "folder"):
        raise ConfigError(f"source {kind} has no splits, but --split {split} was given", hint="leave --split out")
    if name == "scenes":
        return open_scenes(seed, limit)
    if kind == "folder" and argument:
        return open_folder(Path(argument).expanduser())
    raise ConfigError(f"unknown source: {name}", hint=f"known sources: {', '.join(SOURCES)}")
