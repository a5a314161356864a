"""Read the datasets whose images must not be in a version, and describe them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import SourceError
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source, open_source
from pipeline.sources.exclusions import exclusion_rows
from pipeline.storage.files import write_table
from pipeline.tables import EXCLUSIONS
from pipeline.types import Rejected, Source


def parse_exclusion(name: str) -> tuple[str, str | None]:
    """Return the source and the split that `SOURCE#SPLIT` names; without a split, the usual one of a benchmark, or all."""
    source, _, split = name.partition("#")
    return source, split or find_source(source).usual_split


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A source of --exclude that is open: as it was given, and under its own name."""

    given: str
    label: str
    source: Source


def open_exclusions(config: Config) -> list[Exclusion]:
    """Open the sources of --exclude; no row is read."""
    opened = []
    for given in config.exclude:
        name, split = parse_exclusion(given)
        supported = find_source(name).options
        kept = ("allow_urls", "allow_partial", "frame_seconds")
        options: dict[str, Any] = {option: getattr(config, option) for option in kept if option in supported}
        source = open_source(resolve(source=name, source_split=split, **options))
        opened.append(Exclusion(given, f"{source.name}#{split}" if split else source.name, source))
    return opened


def write_exclusions(
    dataset: DatasetDir, config: Config, exclusions: Sequence[Exclusion], progress: Progress
) -> list[dict[str, Any]]:
    """Read the sources of --exclude; return what they are: names, revisions, and numbers of images and texts.

    Raises SourceError if no image of one of them can be read.
    """
    described: list[dict[str, Any]] = []
    kind = choose_image_kind(config)

    def tables() -> Iterator[pa.Table]:
        for exclusion in exclusions:
            label, rows, unread = exclusion.label, list[dict[str, Any]](), 0
            for sample in exclusion.source.rows:
                if isinstance(sample, Rejected):
                    unread += 1
                else:
                    rows += exclusion_rows(label, [sample], kind)
                    progress(f"exclude {label}", len(rows), None)
            if not rows:
                problem = f"no image of {exclusion.given} could be read, so none would be left out"
                raise SourceError(problem, hint="check --exclude")
            if unread:
                progress.warn(f"exclude {label}: {unread} rows could not be read, and are not compared with")
            counts = {"images": len(rows), "texts": sum(len(row["texts"]) for row in rows), "unread": unread}
            described.append({"name": label, "revision": exclusion.source.revision, **counts})
            yield pa.Table.from_pylist(rows, schema=EXCLUSIONS)

    write_table(dataset.stage("source", "exclusions"), tables(), EXCLUSIONS)
    return described
