"""What a source is: its name, what people should know of it, and how it is opened."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.images.similarity import ImageKind
from pipeline.types import Source, SourceSlice

DECK_TASKS = ("deck_qa",)
# Options that some sources take, by their setting: what to say of a source that does not, and what to do.
OPTIONS = {
    "source_split": ("has no splits, but --split {value} was given", "leave --split out"),
    "columns": ("knows its columns, but --map was given", "leave --map out, or use hub:ORG/NAME"),
    "allow_urls": ("holds its images, but --allow-urls was given", "leave --allow-urls out"),
    "split_list": ("keeps its splits, but --split-list was given", "--split-list goes with --source flickr30k alone"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """A source by name, such as `folder:PATH`; what follows the colon goes to `open`."""

    name: str
    what: str
    splits: str
    size: str
    license: str
    needs: str
    example: str
    open: Callable[[Config, str, SourceSlice], Source]
    tasks: tuple[str, ...] = ("caption", "qa")  # what is asked unless told
    options: frozenset[str] = frozenset()  # of OPTIONS, those that it takes
    image_kind: ImageKind | None = "photos"  # how images are compared; None: they are known to be distinct
    usual_split: str | None = None  # the split that others are scored on
    is_drawn: bool = False  # the tiny teachers know it, and its facts are known
    is_divisible: bool = True  # whether several readers may each read a part
    counts_rows: bool = True  # whether a limit needs one reader, who counts

    @property
    def kind(self) -> str:
        """The name without what follows the colon."""
        return self.name.partition(":")[0]

    def default_tasks(self, config: Config) -> tuple[str, ...]:
        """Return what is asked unless told: questions about the deck, where pages are mapped."""
        return DECK_TASKS if "pages" in config.columns else self.tasks

    def describe(self) -> dict[str, str]:
        """Return what a person wants to know before using the source."""
        tasks = ", ".join(self.tasks) + ("; deck_qa where pages are mapped" if "columns" in self.options else "")
        names = ("splits", "size", "license", "needs", "example")
        return {"name": self.name, "what": self.what, "tasks": tasks} | {name: str(getattr(self, name)) for name in names}

    def refuse_options(self, config: Config) -> None:
        """Raise ConfigError where a setting is given that this source does not take."""
        for name, (what, hint) in OPTIONS.items():
            if (value := getattr(config, name)) and name not in self.options:
                raise ConfigError(f"source {self.kind} {what.format(value=value)}", hint=hint)
