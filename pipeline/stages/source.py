"""Stage: source. Write the samples of a source; reject unreadable rows, copies of an image, and excluded images."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config, resolve
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir, read_samples
from pipeline.digests import canonical, file_digest
from pipeline.errors import SourceError
from pipeline.images.metadata import REMOVED
from pipeline.images.similarity import COMPARED_COLUMNS, MAX_NEAR_BITS, ImageKind, compare_samples
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source, open_source
from pipeline.sources.base import NAMED_ROWS, first_names
from pipeline.sources.exclusions import ExclusionIndex, exclusion_rows
from pipeline.storage.files import read_batches, read_table, write_table
from pipeline.tables import EXCLUSIONS, IMAGE_GROUPS, NEAR_DUPLICATE, SAMPLE, SOURCE_REJECTED, SPLIT_RANK
from pipeline.types import Rejected, Sample, Source

BATCH_SAMPLES = 64  # written at once; fewer, where their images come to BATCH_BYTES
BATCH_BYTES = 16_000_000
ADVICE = {  # by reason: what to change if it rejects too many rows
    "image_not_embedded": "the images are named by their address: --allow-urls fetches them",
    "unsupported_format": "convert the files to JPEG; HEIC is read with the package pillow-heif (extra `heic`)",
    "several_images": "--columns pages=COLUMN reads them as a deck",
    "too_many_pages": "split the decks",
    "unpaired_answers": "a list of questions needs a list of as many answers",
    "unknown_split": "leave split= out of --columns",
    "near_duplicate_image": "for slides or charts, dedupe.images: graphics; none keeps all images that look alike",
    "near_held_out_image": "dedupe.images: none keeps images that look alike",
    "banned_image": "they are in a data set of --exclude",
    "url_unreachable": "check the network, and run the same command again",
    "unreadable_folder": "change the permissions of the folders",
}
# The detail of these is the id or the name of the other image.
_REJECTED_FOR_ANOTHER_IMAGE = ("duplicate_image", "near_duplicate_image", "near_held_out_image", "banned_image")


RowTexts = tuple[str, Sequence[str], Sequence[dict[str, Any]] | None]  # the row of a source, its references and questions


@dataclass(slots=True)
class DuplicateImages:
    """The samples that were kept so far; of copies of one image, the same one stays in whatever order they come.

    With `merges_texts`, the image has the captions and questions of all copies, in the order of their rows: a table of
    questions often has a row for each.
    """

    merges_texts: bool = False
    kept: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # by sample id: row of the source, split
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by sample id: new values of columns
    texts: dict[str, list[RowTexts]] = field(default_factory=dict)  # by sample id: of all copies but the first that came

    def add(self, sample: Sample) -> Sample | Rejected:
        """Return a sample that is new, or the rejection of one of two copies.

        The references and the name of the copy stay whose row in the source comes first by its name.
        """
        if sample.id not in self.kept:
            self.kept[sample.id] = (sample.source_row, sample.split)
            return sample
        row, split = self.kept[sample.id]
        changes: dict[str, Any] = {}
        if self.merges_texts:
            values = asdict(sample)
            self.texts.setdefault(sample.id, []).append((sample.source_row, values["references"], values["reference_qa"]))
        if sample.source_row < row:
            changes = {name: value for name, value in asdict(sample).items() if name not in ("id", "images", "split")}
        if SPLIT_RANK[sample.split] > SPLIT_RANK[split]:  # a copy in a held-out split holds out all of them
            split = changes["split"] = sample.split
        if changes:
            self.changes.setdefault(sample.id, {}).update(changes)
        self.kept[sample.id] = (min(row, sample.source_row), split)
        return Rejected(source_row=max(row, sample.source_row), reason="duplicate_image", detail=sample.id)

    def apply(self, batch: pa.RecordBatch) -> pa.Table:
        """Return samples (tables.SAMPLE) with the changes that their copies have led to."""
        if (self.changes.keys() | self.texts.keys()).isdisjoint(batch["sample_id"].to_pylist()):
            return pa.Table.from_batches([batch])
        rows = [row | self.changes.get(row["sample_id"], {}) | self._merged(row) for row in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=SAMPLE)

    def _merged(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the captions and questions of all copies of an image; nothing if it has none, or they are not merged."""
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


def write_exclusions(dataset: DatasetDir, config: Config, progress: Progress) -> list[dict[str, Any]]:
    """Read the sources of --exclude; return what they are: names, revisions, and numbers of images and texts.

    Raises SourceError if no image of one of them can be read.
    """
    described: list[dict[str, Any]] = []
    kind = choose_image_kind(config)

    def tables() -> Iterator[pa.Table]:
        for given in config.exclude:
            name, split = parse_exclusion(given)
            urls = config.allow_urls and "allow_urls" in find_source(name).options
            partial = config.allow_partial and "allow_partial" in find_source(name).options
            every_s = config.frame_seconds if "frame_seconds" in find_source(name).options else None
            options: dict[str, Any] = {"allow_urls": urls, "allow_partial": partial, "frame_seconds": every_s}
            source = open_source(resolve(source=name, source_split=split, **options))
            label = f"{source.name}#{split}" if split else source.name
            rows: list[dict[str, Any]] = []
            unread = 0
            for sample in source.rows:
                if isinstance(sample, Rejected):
                    unread += 1
                else:
                    rows += exclusion_rows(label, [sample], kind)
                    progress(f"exclude {label}", len(rows), None)
            if not rows:
                raise SourceError(f"no image of {given} could be read, so none would be left out", hint="check --exclude")
            if unread:
                progress.warn(f"exclude {label}: {unread} rows could not be read, and are not compared with")
            counts = {"images": len(rows), "texts": sum(len(row["texts"]) for row in rows), "unread": unread}
            described.append({"name": label, "revision": source.revision, **counts})
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


def write_source(
    shard: DatasetDir,
    rows: Iterable[Sample | Rejected],
    excluded: ExclusionIndex,
    limit: int | None,
    progress: Progress,
    *,
    merges_texts: bool = False,
) -> bool:
    """Write rows of a source, kept and rejected; of several copies of an image one is kept, of an excluded one none.

    `merges_texts` gives it the captions and questions of all copies. Return whether the source has a row after those that the
    limit allowed.
    """
    has_more = False
    rejected: list[dict[str, str]] = []
    images = DuplicateImages(merges_texts)

    def tables() -> Iterator[pa.Table]:
        nonlocal has_more
        batch: list[dict[str, Any]] = []
        batch_bytes = 0
        for row in rows:
            if len(images.kept) == limit:
                has_more = True
                break
            if isinstance(row, Sample) and (name := excluded.find(row)):
                row = Rejected(source_row=row.source_row, reason="banned_image", detail=name)
            row = images.add(row) if isinstance(row, Sample) else row
            if isinstance(row, Rejected):
                rejected.append(asdict(row))
                continue
            batch.append({"sample_id": row.id, **asdict(row)})
            batch_bytes += sum(map(len, row.images))
            if len(batch) == BATCH_SAMPLES or batch_bytes >= BATCH_BYTES:
                yield pa.Table.from_pylist(batch, schema=SAMPLE)
                progress("source", len(images.kept), limit)
                batch.clear()
                batch_bytes = 0
        yield pa.Table.from_pylist(batch, schema=SAMPLE)
        progress("source", len(images.kept), limit and len(images.kept))

    try:
        write_table(shard.stage("source"), tables(), SAMPLE)
    finally:  # processes that render its files wait for what nobody will read
        if isinstance(rows, Generator):
            rows.close()
    if images.changes or images.texts:
        write_table(shard.stage("source"), map(images.apply, read_samples(shard)), SAMPLE)
    _write_rejected(shard, rejected)
    return has_more


def _write_rejected(shard: DatasetDir, rows: list[dict[str, str]]) -> None:
    ordered = pa.Table.from_pylist(sorted(rows, key=lambda row: row["source_row"]), schema=SOURCE_REJECTED)
    write_table(shard.stage("source", "rejected"), [ordered], SOURCE_REJECTED)


def forget_near_duplicates(dataset: DatasetDir) -> None:
    """Remove what `reject_near_duplicates` of an earlier run has written."""
    for name in (IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE):
        dataset.stage("source", name).unlink(missing_ok=True)


def reject_near_duplicates(dataset: DatasetDir, kind: ImageKind) -> None:
    """Reject the samples that look like another one, before a model is asked about them.

    `dataset` holds all samples. The groups of near-duplicates stay in a file for dedupe and split, the rejected samples in
    another one for the report.
    """
    samples = pa.concat_tables(read_batches(dataset.stage("source"), COMPARED_COLUMNS))
    groups = compare_samples(samples, kind)
    write_table(dataset.stage("source", IMAGE_GROUPS_FILE), [groups], IMAGE_GROUPS)
    of_rejected = {row["sample_id"]: row for row in groups.filter(pc.is_valid(groups["image_reason"])).to_pylist()}
    if not of_rejected:
        return
    ids = pa.array(of_rejected, pa.string())
    rows: list[dict[str, str]] = []

    def near_duplicates() -> Iterator[pa.Table]:
        for batch in read_samples(dataset):
            samples = [
                {**row, **of_rejected[row["sample_id"]]} for row in batch.filter(pc.is_in(batch["sample_id"], ids)).to_pylist()
            ]
            rows.extend(
                {"source_row": row["source_row"], "reason": row["image_reason"], "detail": row["near_duplicate_of"]}
                for row in samples
            )
            yield pa.Table.from_pylist(samples, schema=NEAR_DUPLICATE)

    write_table(dataset.stage("source", NEAR_DUPLICATES_FILE), near_duplicates(), NEAR_DUPLICATE)
    rejected = read_table(dataset.stage("source", "rejected")).to_pylist()
    _write_rejected(dataset, [*rejected, *rows])  # first: a row may be counted twice after a kill, and never be lost
    others = (batch.filter(pc.invert(pc.is_in(batch["sample_id"], ids))) for batch in read_samples(dataset))
    write_table(dataset.stage("source"), (pa.Table.from_batches([batch]) for batch in others), SAMPLE)


def describe_rejected(shard: DatasetDir) -> Iterator[str]:
    """Yield how many rows of the source were rejected for each reason, with the names of the first and their details."""
    table = read_table(shard.stage("source", "rejected"))
    for row in sorted(table["reason"].value_counts().to_pylist(), key=lambda row: (-row["counts"], row["values"])):
        of_reason = table.filter(pc.equal(table["reason"], row["values"])).slice(0, NAMED_ROWS + 1).to_pylist()
        is_id = row["values"] in _REJECTED_FOR_ANOTHER_IMAGE
        names = [one["source_row"] if is_id else f"{one['source_row']}: {one['detail']}" for one in of_reason]
        # Slides of one design look alike, and nobody would look for that in a setting.
        advice = f": {ADVICE[row['values']]}" if row["values"] == "near_duplicate_image" else ""
        yield f"source: {row['counts']:,} {row['values'].replace('_', ' ')} ({first_names(names)}){advice}"
