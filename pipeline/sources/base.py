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
LICENSE_UNLESS_SAID = "unknown, unless --license says it; unknown images are pushed to a private repository"  # a license
NAMED_ROWS = 3  # of those that a message counts
MAX_METADATA_BYTES = 256_000_000  # of a file about many images
# Options that only some sources support, by their config key: the error message for other sources, and its hint.
OPTIONS = {
    "source_split": ("has no splits, but --split {value} was given", "leave --split out"),
    "columns": ("knows its columns, but --columns was given", "leave --columns out, or use hub:ORG/NAME"),
    "allow_urls": ("holds its images, but --allow-urls was given", "leave --allow-urls out"),
    "allow_partial": ("is read as a whole, but --allow-partial was given", "leave --allow-partial out"),
    "follow_links": ("has no folder, but --follow-links was given", "leave --follow-links out"),
    "license": (
        "states the license of its images, but --license was given",
        "--license goes with images of your own: folder:, archive:, list:, parquet:, pdf: and video:",
    ),
    "frame_seconds": ("has no frames, but --every was given", "--every goes with --source video:PATH alone"),
    "captions": ("has its own captions, but --captions was given", "--captions goes with --source folder:PATH alone"),
    "split.group_by": (
        "has no folders of images, but --group-by was given",
        "--group-by goes with sources of files: folder:, pdf:, pdf-pages: and video:",
    ),
    "split_list": ("keeps its splits, but --split-list was given", "--split-list goes with --source flickr30k alone"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """A source by name, such as `folder:PATH`; `open` receives the part after the colon."""

    name: str
    what: str
    license: str
    needs: str
    example: str
    open: Callable[[Config, str, SourceSlice], Source]
    tasks: tuple[str, ...] = ("caption", "qa")  # default tasks
    options: frozenset[str] = frozenset()  # the supported keys of OPTIONS
    image_kind: ImageKind | None = "photos"  # for the search of near-duplicates; None: images are known to be distinct
    usual_split: str | None = None  # the split that models are scored on
    model: str = LARGE  # by default
    clip_model: str = "clip"  # by default
    is_endless: bool = False  # it has as many samples as `limit` states
    usual_grouping: Literal["folder"] | None = None  # split.group_by, unless the settings say it
    is_divisible: bool = True  # several readers may read slices
    counts_rows: bool = True  # a limit is reached by counting rows, which needs a single reader

    @property
    def kind(self) -> str:
        """The name without the part after the colon."""
        return self.name.partition(":")[0]

    def default_tasks(self, config: Config) -> tuple[str, ...]:
        """Return the default tasks: questions about decks if a column is mapped to pages."""
        return DECK_TASKS if "pages" in config.columns else self.tasks

    def describe(self) -> dict[str, str]:
        """Return the description of the source, as `synth doctor --sources` prints it."""
        tasks = ", ".join(self.tasks) + ("; deck_qa where pages are mapped" if "columns" in self.options else "")
        facts = {"name": self.name, "what": self.what, "tasks": tasks}
        return {**facts, "license": self.license, "needs": self.needs, "example": self.example}

    def check_options(self, config: Config) -> None:
        """Raise ConfigError for an option that this source does not support."""
        for name, (message, hint) in OPTIONS.items():
            if (value := attrgetter(name)(config)) and name not in self.options:
                raise ConfigError(f"source {self.kind} {message.format(value=value)}", hint=hint)


def check_samples(rows: Iterator[RawSample | Rejected], columns: Sequence[str] = ()) -> Iterator[Sample | Rejected]:
    """Yield the sample of each row, or its rejection if one of its images is unusable. Images are decoded in other processes.

    The id is that of the images as they are; the sample holds them without their metadata, which may say who took them where.
    `columns` are those of the context: one that is named like an EXIF field, and that the source itself does not fill, gets its
    value from the first image; no other field is read.
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


def refuse_roles(config: Config, what: str, hint: str) -> None:
    """Raise ConfigError if --columns gives a role, other than the context, to a source that is no table."""
    if roles := [role for role in config.columns if role != CONTEXT]:
        raise ConfigError(f"{what} has no column to be the {roles[0]}", hint=hint)


def as_text(value: Any, what: str = "a column of the context") -> str:
    """Return a value of a column as a prompt says it: lists with commas, nothing for null.

    Raise SourceError, which says `what` it is, for an object, or a list of lists: nobody would write them into a prompt.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return ", ".join(text for item in value if (text := as_text(item, what)))
    if isinstance(value, dict | list):
        raise SourceError(f"{what} holds objects or lists of lists", hint="name columns of texts or numbers")
    is_missing = value is None or value != value  # NaN
    return "" if is_missing else str(value).encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair


def first_names(names: Sequence[str]) -> str:
    """Return the names of the first few files or rows, for a message."""
    return printable(", ".join(names[:NAMED_ROWS]) + (", ..." if len(names) > NAMED_ROWS else ""))
