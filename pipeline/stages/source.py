"""Stage: source. Write the samples of a source; reject unreadable rows, copies of an image, and excluded images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir
from pipeline.dataset.samples import PARTS_FOLDER, REST_FILE, read_samples
from pipeline.digests import file_digest
from pipeline.images.near_duplicates import MAX_NEAR_BITS, ImageKind
from pipeline.progress import Progress
from pipeline.sources.base import NAMED_ROWS, first_names
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.stages.base import LOOK_ALIKE_ADVICE
from pipeline.stages.source_copies import REPEATED, DuplicateImages, SampleDeduplicator
from pipeline.stages.source_parts import PASSING_REASONS, without_copies
from pipeline.storage.files import read_table, remove, write_table
from pipeline.tables import NUM_PAGES, SAMPLE, SOURCE_REJECTED
from pipeline.types import Rejected, Sample, Source

READING_FILE = "read.json"  # beside the files of the stage
ADVICE = {  # by reason: what to change if it rejects too many rows
    "image_not_embedded": "the images are named by their address: --allow-urls fetches them",
    "image_is_a_path": "list:FILE reads the images that a CSV or JSON file names; a table holds their bytes",
    "unsupported_format": "convert the files to JPEG; HEIC is read with the package pillow-heif (extra `heic`)",
    "several_images": "--columns pages=COLUMN reads them as a deck",
    "too_many_pages": "split the decks",
    "unpaired_answers": "a list of questions needs a list of as many answers",
    "unknown_split": "of a table, --columns split=none leaves that column alone, and split=COLUMN names another",
    **LOOK_ALIKE_ADVICE,
    "banned_image": "they are in a dataset of --exclude",
    "url_unreachable": "check the network, and run the same command again: it reads all images anew, once",
    "url_not_found": "the hosts no longer have these images, or give them to nobody; a folder of its own (--out) asks again",
    "unreadable_folder": "change the permissions of the folders",
}
# The detail of these is the id or the name of the other image.
_REJECTED_FOR_ANOTHER_IMAGE = ("near_duplicate_image", "near_held_out_image", "banned_image")


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
        **({"captions": [file_digest(path) for path in captions]} if captions else {}),
    }


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
            yield f"source: {row['counts']:,} rows are about images of other rows, and add their texts to them ({shown})"
            continue
        is_id = row["values"] in _REJECTED_FOR_ANOTHER_IMAGE
        names = [one["source_row"] if is_id else f"{one['source_row']}: {one['detail']}" for one in of_reason]
        # Slides of one design look alike, and nobody would look for that in a setting.
        advice = f": {ADVICE[row['values']]}" if row["values"] == "near_duplicate_image" else ""
        yield f"source: {row['counts']:,} {row['values'].replace('_', ' ')} ({first_names(names)}){advice}"
