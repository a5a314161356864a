"""Specification of a source: name, description, supported options, and the function that opens it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from pipeline.config import CONTEXT, LARGE, Config
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.images.decode import deck_id, image_id
from pipeline.images.isolation import check_all
from pipeline.text.escape import encodable, printable
from pipeline.types import ImageKind, RawSample, Rejected, Sample, Source

DECK_TASKS = ("deck_qa",)
LICENSE_FROM_OPTION = "unknown without --license; images with unknown license are pushed as private"
NAMED_ROWS = 3
# Settings that only some sources support, with their options.
OPTIONS = {
    "source_split": "--split",
    "columns": "--columns",
    "follow_links": "--follow-links",
    "license": "--license",
    "frame_seconds": "--every",
    "captions": "--captions",
    "split.group_by": "--group-by",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """Describes a source, such as `folder:PATH`. `open` receives the part after the colon."""

    name: str
    what: str
    example: str
    license: str = LICENSE_FROM_OPTION
    needs: str = "a vision-language model"
    open: Callable[[Config, str], Source]
    tasks: tuple[str, ...] = ("caption", "qa")  # default tasks
    # These are keys of OPTIONS.
    options: frozenset[str] = frozenset()
    # How the search for near-duplicates compares images, or None if all images are known to be distinct.
    image_kind: ImageKind | None = "photos"
    scored_split: str | None = None
    model: str = LARGE  # default model
    clip_model: str = "clip"  # default CLIP
    is_endless: bool = False
    default_grouping: Literal["folder"] | None = None  # default of split.group_by

    @property
    def kind(self) -> str:
        """The part of the name before the colon."""
        return self.name.partition(":")[0]

    def default_tasks(self, config: Config) -> tuple[str, ...]:
        """Return the default tasks, which are questions about decks if columns are mapped to pages."""
        return DECK_TASKS if "pages" in config.columns else self.tasks

    def describe(self) -> dict[str, str]:
        """Return the facts that `synth doctor --sources` prints about the source."""
        tasks = ", ".join(self.tasks) + ("; deck_qa if pages are mapped" if "columns" in self.options else "")
        facts = {"name": self.name, "what": self.what, "tasks": tasks}
        return {**facts, "license": self.license, "needs": self.needs, "example": self.example}

    def check_options(self, config: Config) -> None:
        """Check the options that are set. Raises ConfigError if this source does not support one of them."""
        for name, option in OPTIONS.items():
            if attrgetter(name)(config) and name not in self.options:
                supported = ", ".join(option for name, option in OPTIONS.items() if name in self.options)
                hint = f"leave it out; {self.kind} supports {supported or 'no option of this kind'}"
                raise ConfigError(f"source {self.kind} does not support {option}", hint=hint)


def check_samples(rows: Iterator[RawSample | Rejected]) -> Iterator[Sample | Rejected]:
    """Yield a sample for each row, or a rejection if one of its images is unusable.

    The sample id is a digest of the original images, but the sample holds them without metadata.
    """
    jobs = ((row, row.images if isinstance(row, RawSample) else ()) for row in rows)
    for row, checked in check_all(jobs):
        if isinstance(row, Rejected):
            yield row
        elif isinstance(checked, ImageError):
            yield Rejected(source_row=row.source_row, reason=checked.reason, detail=str(checked))
        else:
            yield Sample(
                id=deck_id(tuple(map(image_id, row.images))),
                source_row=row.source_row,
                images=tuple(page.data for page in checked),
                pdq_hashes=tuple(page.info.pdq_hash for page in checked),
                width_px=checked[0].info.width_px,
                height_px=checked[0].info.height_px,
                license=row.license,
                contrast=max(page.info.contrast for page in checked),
                **row.fields,
            )


def refuse_roles(config: Config, source: str, hint: str) -> None:
    """Raise ConfigError if --columns maps any role except the context. The message begins with `source`."""
    if roles := [role for role in config.columns if role != CONTEXT]:
        problem = f"{source} supports only the role {CONTEXT} in --columns, not {roles[0]}"
        raise ConfigError(problem, hint=hint)


def require_columns(columns: Iterable[str], known: Iterable[str], place: str = "columns") -> None:
    """Raise SourceError if a column is not `known`. The hint lists the known columns after `place`."""
    known = list(known)
    if unknown := [column for column in columns if column not in known]:
        hint = f"{place}: {', '.join(known)}"
        raise SourceError(f"no column is named {unknown[0]}", unknown=unknown[0], known=known, hint=hint)


def as_text(value: Any, name: str = "a context column") -> str:
    """Return a value as text for a prompt. List items are joined with commas, and null becomes "".

    Raises SourceError if the value is an object, a list of lists, or bytes. The message mentions `name`.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return ", ".join(text for item in value if (text := as_text(item, name)))
    if isinstance(value, dict | list | bytes):
        problem = f"{name} contains objects, nested lists or bytes"
        raise SourceError(problem, hint="use columns of strings or numbers")
    is_missing = value is None or value != value  # NaN
    return "" if is_missing else encodable(str(value))


def first_names(names: Sequence[str]) -> str:
    """Return the first few names, for a message."""
    return printable(", ".join(names[:NAMED_ROWS]) + (", ..." if len(names) > NAMED_ROWS else ""))
