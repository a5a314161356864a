"""Specification of a source: its name, its description, and the function that opens it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from pipeline.config import CONTEXT, LARGE, Config
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.decode import deck_id, image_id
from pipeline.images.isolation import check_all
from pipeline.images.metadata import is_exif_name
from pipeline.images.near_duplicates import ImageKind
from pipeline.text.escape import printable
from pipeline.types import RawSample, Rejected, Sample, Source, SourceSlice

DECK_TASKS = ("deck_qa",)
LICENSE_FROM_OPTION = "unknown, unless --license states it; if unknown, the repository is private"
NAMED_ROWS = 3  # names per message
MAX_METADATA_BYTES = 256_000_000  # size of a file with texts of many images
# Options that only some sources support, by config key: the error message for other sources, and its hint.
OPTIONS = {
    "source_split": ("has no splits, but --split {value} was given", "leave out --split"),
    "columns": ("has fixed columns, but --columns was given", "leave out --columns, or use hub:ORG/NAME"),
    "allow_urls": ("contains its images, but --allow-urls was given", "leave out --allow-urls"),
    "allow_partial": ("is read as a whole, but --allow-partial was given", "leave out --allow-partial"),
    "follow_links": ("has no folder, but --follow-links was given", "leave out --follow-links"),
    "license": (
        "states the license of its images, but --license was given",
        "use --license only with your own images: folder:, archive:, list:, parquet:, pdf: and video:",
    ),
    "frame_seconds": ("has no frames, but --every was given", "use --every only with --source video:PATH"),
    "captions": (
        "has its own captions, but --captions was given",
        "use --captions only with --source folder:",
    ),
    "split.group_by": (
        "has no folders of images, but --group-by was given",
        "use --group-by only with folder:, pdf:, pdf-pages: and video:",
    ),
    "split_list": ("has its own splits, but --split-list was given", "use --split-list only with flickr30k"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """A source by name, such as `folder:PATH`. `open` receives the part after the colon."""

    name: str
    what: str
    example: str
    license: str = LICENSE_FROM_OPTION
    needs: str = "a vision-language model"
    open: Callable[[Config, str, SourceSlice], Source]
    tasks: tuple[str, ...] = ("caption", "qa")  # default tasks
    options: frozenset[str] = frozenset()  # supported keys of OPTIONS
    # How near-duplicates are searched; None: images are known to be distinct.
    image_kind: ImageKind | None = "photos"
    scored_split: str | None = None  # the split on which models are scored
    model: str = LARGE  # default model
    clip_model: str = "clip"  # default CLIP
    is_endless: bool = False  # the number of samples is `limit`; other sources count rows up to it
    default_grouping: Literal["folder"] | None = None  # default of split.group_by
    is_divisible: bool = True  # several readers may read slices

    @property
    def kind(self) -> str:
        """The name without the part after the colon."""
        return self.name.partition(":")[0]

    def default_tasks(self, config: Config) -> tuple[str, ...]:
        """Return the default tasks: questions about decks if a column is mapped to pages."""
        return DECK_TASKS if "pages" in config.columns else self.tasks

    def describe(self) -> dict[str, str]:
        """Return the description of the source, as `synth doctor --sources` prints it."""
        tasks = ", ".join(self.tasks) + ("; deck_qa if pages are mapped" if "columns" in self.options else "")
        facts = {"name": self.name, "what": self.what, "tasks": tasks}
        return {**facts, "license": self.license, "needs": self.needs, "example": self.example}

    def check_options(self, config: Config) -> None:
        """Raise ConfigError for an option that this source does not support."""
        for name, (message, hint) in OPTIONS.items():
            if (value := attrgetter(name)(config)) and name not in self.options:
                raise ConfigError(f"source {self.kind} {message.format(value=value)}", hint=hint)


def check_samples(
    rows: Iterator[RawSample | Rejected], columns: Sequence[str] = ()
) -> Iterator[Sample | Rejected]:
    """Yield the sample of each row, or its rejection if an image is unusable.

    Other processes decode the images. A sample has the id of the original images, but holds them without
    metadata. `columns` of the context that are named like EXIF fields, and that the row lacks, are read from
    the first image.
    """
    exif = [name for name in columns if is_exif_name(name)]
    jobs = ((row, row.images if isinstance(row, RawSample) else ()) for row in rows)
    for row, checked in check_all(jobs, exif):
        if isinstance(row, Rejected):
            yield row
        elif isinstance(checked, ImageError):
            yield Rejected(source_row=row.source_row, reason=checked.reason, detail=str(checked))
        else:
            context = dict(row.fields.get("context", ()))
            context |= {name: context.get(name) or checked[0].exif.get(name, "") for name in exif}
            yield Sample(
                id=deck_id(tuple(map(image_id, row.images))),
                source_row=row.source_row,
                images=tuple(page.data for page in checked),
                pdq_hashes=tuple(page.info.pdq_hash for page in checked),
                width_px=checked[0].info.width_px,
                height_px=checked[0].info.height_px,
                license=row.license,
                **row.fields | {"context": tuple(context.items())},
            )


def refuse_roles(config: Config, source: str, hint: str) -> None:
    """Raise ConfigError if --columns maps a role other than the context, for a source that is not a table."""
    if roles := [role for role in config.columns if role != CONTEXT]:
        problem = f"{source} has no columns for roles, but --columns has the role {roles[0]}"
        raise ConfigError(problem, hint=hint)


def as_text(value: Any, name: str = "a context column") -> str:
    """Return a value for a prompt: lists are joined with commas, null is empty.

    Raise SourceError, which mentions `name`, for objects and lists of lists.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return ", ".join(text for item in value if (text := as_text(item, name)))
    if isinstance(value, dict | list):
        raise SourceError(
            f"{name} contains objects or nested lists", hint="use columns of strings or numbers"
        )
    is_missing = value is None or value != value  # NaN
    # JSON may hold lone surrogates.
    return "" if is_missing else str(value).encode("utf-8", "replace").decode()


def first_names(names: Sequence[str]) -> str:
    """Return the names of the first few files or rows, for a message."""
    return printable(", ".join(names[:NAMED_ROWS]) + (", ..." if len(names) > NAMED_ROWS else ""))
