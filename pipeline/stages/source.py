"""Stage: source. Write the samples of a source; reject unreadable rows, copies of an image, and excluded images."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir
from pipeline.dataset.samples import IS_COPY, PARTS_FOLDER, REST_FILE, read_samples
from pipeline.digests import canonical, file_digest
from pipeline.errors import SourceError
from pipeline.images.metadata import REMOVED
from pipeline.images.similarity import MAX_NEAR_BITS, ImageKind
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source, open_source
from pipeline.sources.base import NAMED_ROWS, first_names
from pipeline.sources.exclusions import ExclusionIndex, exclusion_rows
from pipeline.stages.source_parts import (
    PART,
    PART_SECONDS,
    PASSING_REASONS,
    POSITION,
    ReadBatch,
    RejectedRow,
    binary_lists,
    without_copies,
)
from pipeline.storage.files import read_table, remove, write_table
from pipeline.tables import EXCLUSIONS, NUM_PAGES, SAMPLE, SOURCE_REJECTED, SPLIT_RANK
from pipeline.types import Rejected, Sample, Source

READING_FILE = "read.json"  # beside the files of the stage
BATCH_SAMPLES = 64  # written at once; fewer, where their images come to BATCH_BYTES
BATCH_BYTES = 16_000_000
BATCH_ROWS = 1_024  # of the source, where most of them are rejected, or copies
ADVICE = {  # by reason: what to change if it rejects too many rows
    "image_not_embedded": "the images are named by their address: --allow-urls fetches them",
    "image_is_a_path": "list:FILE reads the images that a CSV or JSON file names; a table holds their bytes",
    "unsupported_format": "convert the files to JPEG; HEIC is read with the package pillow-heif (extra `heic`)",
    "several_images": "--columns pages=COLUMN reads them as a deck",
    "too_many_pages": "split the decks",
    "unpaired_answers": "a list of questions needs a list of as many answers",
    "unknown_split": "of a table, --columns split=none leaves that column alone, and split=COLUMN names another",
    "near_duplicate_image": "for slides or charts, dedupe.images: graphics; none keeps all images that look alike",
    "near_held_out_image": "dedupe.images: none keeps images that look alike",
    "banned_image": "they are in a dataset of --exclude",
    "url_unreachable": "check the network, and run the same command again: it reads all images anew, once",
    "url_not_found": "the hosts no longer have these images, or give them to nobody; a folder of its own (--out) asks again",
    "unreadable_folder": "change the permissions of the folders",
}
# The detail of these is the id or the name of the other image.
REPEATED = "duplicate_image"  # of a row about the image of another one, which gets its texts
_REJECTED_FOR_ANOTHER_IMAGE = ("near_duplicate_image", "near_held_out_image", "banned_image")


RowTexts = tuple[str, Sequence[str], Sequence[dict[str, Any]] | None]  # the row of a source, its references and questions


@dataclass(slots=True)
class DuplicateImages:
    """The samples that were kept so far; of copies of one image, the same one stays in whatever order they come.

    The image has the captions and questions of all copies, in the order of their rows: tables of captions or questions often
    have a row for each.
    """

    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # by sample id: row of the source, split
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by sample id: new values of columns
    texts: dict[str, list[RowTexts]] = field(default_factory=dict)  # by sample id: of all copies but the first that came

    def add(self, row: dict[str, Any]) -> Rejected | None:
        """Take a sample as a row of tables.SAMPLE; return the rejection of one of two copies, or None for a new image.

        The references and the name of the copy stay whose row in the source comes first by its name.
        """
        sample_id, source_row, split = row["sample_id"], row["source_row"], row["split"]
        if sample_id not in self.kept:
            self.kept[sample_id] = (source_row, split)
            return None
        kept_row, kept_split = self.kept[sample_id]
        changes: dict[str, Any] = {}
        self.texts.setdefault(sample_id, []).append((source_row, row["references"], row["reference_qa"]))
        if source_row < kept_row:
            changes = {name: row[name] for name in SAMPLE.names if name not in ("sample_id", "images", "split")}
        if SPLIT_RANK[split] > SPLIT_RANK[kept_split]:  # a copy in a held-out split holds out all of them
            kept_split = changes["split"] = split
        if changes:
            self.changes.setdefault(sample_id, {}).update(changes)
        self.kept[sample_id] = (min(kept_row, source_row), kept_split)
        return Rejected(source_row=max(kept_row, source_row), reason=REPEATED, detail=sample_id)

    @property
    def has_texts(self) -> bool:
        """Whether copies have captions or questions, which their images are to have."""
        return any(references or questions for copies in self.texts.values() for _, references, questions in copies)

    def apply(self, samples: pa.Table) -> pa.Table:
        """Return samples (tables.SAMPLE, with or without images) with the changes that their copies have led to."""
        if not any(name in self.changes or name in self.texts for name in samples["sample_id"].to_pylist()):
            return samples
        rows = [row | self.changes.get(row["sample_id"], {}) | self._merged(row) for row in samples.to_pylist()]
        return pa.Table.from_pylist(rows, schema=samples.schema)

    def _merged(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the captions and questions of all copies of an image; nothing if it has none."""
        if row["sample_id"] not in self.texts:
            return {}
        own = (row["source_row"], row["references"], row["reference_qa"])
        copies = sorted([own, *self.texts[row["sample_id"]]], key=lambda copy: copy[0])
        references = dict.fromkeys(
            text for _, texts, _ in copies for text in texts
        )  # a table may repeat them with each question
        asked = {canonical(question): question for _, _, questions in copies for question in questions or ()}
        has_questions = any(questions is not None for _, _, questions in copies)
        return {"references": list(references), "reference_qa": list(asked.values()) if has_questions else None}


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


def describe_source(
    source: Source,
    excluded: list[dict[str, Any]],
    kind: ImageKind | None,
    captions: Sequence[Path] = (),
    *,
    preview: bool = False,
) -> dict[str, Any]:
    """Return the provenance of a source with its files of captions, whose images were compared as `kind` with the excluded.

    `preview`: the run was to read a part of the images only.
    """
    return {
        "name": source.name,
        "revision": source.revision,
        "decks": source.decks,
        **({"partial": True} if source.is_partial else {}),
        **({"preview": True} if preview else {}),
        "never": excluded,
        "compared_as": kind,
        "near_bits": MAX_NEAR_BITS.get(kind or ""),
        "image_metadata": REMOVED,
        **({"captions": [file_digest(path) for path in captions]} if captions else {}),
    }


@dataclass(slots=True)
class SampleDeduplicator:
    """Takes the rows of a source; of several copies of an image one is kept, of an excluded one none."""

    excluded: ExclusionIndex
    images: DuplicateImages
    num_rows: int = 0  # of the source that were taken
    copies: list[dict[str, str]] = field(default_factory=list)  # rejected

    def batches(self, rows: Iterator[Sample | Rejected], limit: int | None = None) -> Iterator[ReadBatch]:
        """Yield rows in batches, until `limit` images are kept; the row after the last one is not taken."""
        batch = _Batch()
        while limit is None or len(self.images.kept) < limit:
            if (row := next(rows, None)) is None:
                break
            if isinstance(row, Sample) and (name := self.excluded.find(row)):
                row = Rejected(source_row=row.source_row, reason="banned_image", detail=name)
            if isinstance(row, Rejected):
                batch.rejected.append((self.num_rows, asdict(row)))
            else:
                batch.add(self.add(row.to_row() | {POSITION: self.num_rows}))
            self.num_rows += 1
            batch.num_rows, batch.last_row = batch.num_rows + 1, row.source_row
            if batch.is_full:
                yield batch.read()
                batch = _Batch()
        if batch.num_rows:
            yield batch.read()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Take a sample as a row of tables.SAMPLE with its position; return it as one of source_parts.PART."""
        if copy := self.images.add(row):
            self.copies.append(asdict(copy))
        return row | {NUM_PAGES: len(row["images"]), **({"images": [], IS_COPY: True} if copy else {IS_COPY: False})}


@dataclass(slots=True)
class _Batch:
    """Rows of a source that are being read."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    num_rows: int = 0
    last_row: str = ""
    num_images: int = 0
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of source_parts.PART."""
        self.samples.append(row)
        self.num_images += not row[IS_COPY]
        self.num_bytes += sum(map(len, row["images"]))

    @property
    def is_full(self) -> bool:
        """Whether it is written now: by its size, or since the source is slow."""
        is_large = self.num_images == BATCH_SAMPLES or self.num_bytes >= BATCH_BYTES or self.num_rows == BATCH_ROWS
        return is_large or time.monotonic() - self.started >= PART_SECONDS

    def read(self) -> ReadBatch:
        """Return what was read."""
        texts = pa.Table.from_pylist([row | {"images": []} for row in self.samples], schema=PART)
        images = binary_lists([row["images"] for row in self.samples])
        samples = texts.set_column(PART.get_field_index("images"), PART.field("images"), images)
        return ReadBatch(samples, self.rejected, self.num_rows, self.last_row)


def write_source(
    shard: DatasetDir,
    rows: Iterator[Sample | Rejected],
    excluded: ExclusionIndex,
    limit: int | None,
    progress: Progress,
) -> None:
    """Write rows of a source, kept and rejected."""
    deduplicator = SampleDeduplicator(excluded, DuplicateImages())
    rejected: list[dict[str, str]] = []

    def tables() -> Iterator[pa.Table]:
        for batch in deduplicator.batches(rows, limit):
            rejected.extend(row for _, row in batch.rejected)
            progress("source", len(deduplicator.images.kept), limit)
            yield without_copies(batch.samples).drop_columns([NUM_PAGES])

    write_table(shard.stage("source"), tables(), SAMPLE)
    if deduplicator.images.changes or deduplicator.images.has_texts:
        batches = map(pa.Table.from_batches, ([batch] for batch in read_samples(shard)))
        write_table(shard.stage("source"), map(deduplicator.images.apply, batches), SAMPLE)
    write_rejected(shard, [*rejected, *deduplicator.copies])


def write_rejected(shard: DatasetDir, rows: list[dict[str, str]]) -> None:
    """Write which rows of a source were rejected."""
    ordered = pa.Table.from_pylist(sorted(rows, key=lambda row: row["source_row"]), schema=SOURCE_REJECTED)
    write_table(shard.stage("source", "rejected"), [ordered], SOURCE_REJECTED)


def forget_near_duplicates(dataset: DatasetDir) -> None:
    """Remove what a run in one process wrote about images that look alike."""
    for name in (IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE):
        dataset.stage("source", name).unlink(missing_ok=True)


def forget_reading(dataset: DatasetDir) -> None:
    """Remove what a run in one process has written down of its source, and the parts of one that was stopped."""
    dataset.stage("source").with_name(READING_FILE).unlink(missing_ok=True)
    remove(dataset.stage("source").with_name(PARTS_FOLDER))
    remove((dataset.stage("source").parent / REST_FILE).parent)


def count_passing(shard: DatasetDir) -> int:
    """Return how many rows of the source were rejected for reasons that may pass."""
    reasons = read_table(shard.stage("source", "rejected"), ["reason"])["reason"]
    return sum(reason in PASSING_REASONS for reason in reasons.to_pylist())


def is_worth_another_try(may_pass: int, before: int | None) -> bool:
    """Return whether rows that failed so are tried again: once, and then as long as that gives more rows than `before`."""
    return may_pass > 0 and (before is None or may_pass < before)


def describe_rejected(shard: DatasetDir) -> Iterator[str]:
    """Yield how many rows of the source were rejected for each reason, with the names of the first and their details."""
    table = read_table(shard.stage("source", "rejected"))
    for row in sorted(table["reason"].value_counts().to_pylist(), key=lambda row: (-row["counts"], row["values"])):
        of_reason = table.filter(pc.equal(table["reason"], row["values"])).slice(0, NAMED_ROWS + 1).to_pylist()
        if row["values"] == REPEATED:
            shown = first_names([one["source_row"] for one in of_reason])
            yield f"source: {row['counts']:,} rows are about images of other rows, and their texts are added there ({shown})"
            continue
        is_id = row["values"] in _REJECTED_FOR_ANOTHER_IMAGE
        names = [one["source_row"] if is_id else f"{one['source_row']}: {one['detail']}" for one in of_reason]
        # Slides of one design look alike, and nobody would look for that in a setting.
        advice = f": {ADVICE[row['values']]}" if row["values"] == "near_duplicate_image" else ""
        yield f"source: {row['counts']:,} {row['values'].replace('_', ' ')} ({first_names(names)}){advice}"
