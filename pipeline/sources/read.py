"""The read step: images go to the store (dataset/images.py), and a list of the samples to the step `source`.

A run in one process reads a source by SourceReader, and a worker of a cluster reads the rows of its shard by
`write_source`. A source may be a download of many hours. While SourceReader reads, it writes the rows so far
in parts; the next run resumes after the last part. `read.json` stores what the files of the step were made
of: where none of that has changed, nor a file, the next run uses the files as they are. If rows failed for
passing reasons, such as a host that did not answer, the next run reads all rows again, and later runs only
while that gives more rows.
"""

import secrets
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir, read_exclusions
from pipeline.dataset.images import FILE_BYTES, ImageStore
from pipeline.dataset.records import count_rows, is_done, read_record, write_record
from pipeline.digests import digest, file_digest
from pipeline.errors import SourceError, SynthError
from pipeline.images.decode import has_heif
from pipeline.images.near_duplicates import COMPARED_COLUMNS, LOOK_ALIKE_ADVICE, MAX_NEAR_BITS, ImageKind, compare_samples
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, files_of_source, find_source
from pipeline.sources.base import NAMED_ROWS, first_names
from pipeline.sources.duplicates import (
    IS_COPY,
    POSITION,
    READ_SAMPLE,
    REPEATED,
    ReadBatch,
    RejectedRow,
    SampleDeduplicator,
    without_copies,
)
from pipeline.sources.exclusions import Exclusion, ExclusionIndex, open_exclusions, write_exclusions
from pipeline.storage.files import open_parquet, open_table, read_json, read_table, remove, write_json, write_table
from pipeline.tables import IMAGE_GROUPS, LISTED_SAMPLE, NEAR_DUPLICATE, SOURCE_REJECTED
from pipeline.types import Rejected, Sample, Source

READING_FILE, PARTS_FOLDER = "read.json", "parts"  # next to the files of the step
PART_SECONDS = 30.0  # a slow source loses no more than these
ROWS_AT_ONCE = 16_384  # of parts, without images
# Why a row may be rejected now and read another time, or on another machine.
PASSING_REASONS = frozenset(("url_unreachable", "host_given_up", "too_slow", "too_much_memory", "decoder_died"))
READING = 4  # raise it when the same bytes would be read as other samples
# Settings that say which samples a source yields; all others are those of later steps, or stand in the key
# in another form.
READ_SETTINGS = (
    "source",
    "source_split",
    "license",
    "columns",
    "allow_urls",
    "allow_partial",
    "follow_links",
    "frame_seconds",
)
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
    "url_unreachable": "check the network, and run the same command again: it reads all images again, once",
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
    """Return the provenance of a source with its files of captions, whose images were compared as `kind` with
    the excluded.

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


def reading_key(config: Config, source: Source, exclusions: Sequence[Exclusion]) -> str:
    """Return a digest of all that says which samples are read; a new one each time if a source has no revision."""
    revisions = [source.revision, *(exclusion.source.revision for exclusion in exclusions)]
    if not all(revisions):
        return secrets.token_hex(32)
    settings = config.model_dump(mode="json", include={*READ_SETTINGS})
    limit: int | str | None = None
    if not find_source(config.source).counts_rows:  # such as drawn scenes, which end where the limit says
        limit = config.limit if config.images is None else "images"
    compared = [config.keeps_human_texts, choose_image_kind(config), list(config.exclude)]
    return digest(
        [READING, source.name, source.license, revisions, settings, files_of_source(config), limit, compared, has_heif()]
    )


class SourceReader:
    """Reads the samples of a source into a dataset folder, whose lock the caller holds.

    With `--images N` the next run begins with as few of the images as this one, from the parts.
    """

    def __init__(self, dataset: DatasetDir, config: Config, source: Source, progress: Progress) -> None:
        self.dataset, self.config, self.source, self.progress = dataset, config, source, progress
        self._exclusions = open_exclusions(config)
        self._key = reading_key(config, source, self._exclusions)
        self._path = dataset.step_file("read").with_name(READING_FILE)
        self._results: dict[int | None, dict[str, Any] | None] = {}
        self._deduplicator: SampleDeduplicator | None = None
        self._written: Iterator[dict[str, Any]] = iter(())  # rows of the parts
        self._opened: Iterator[Sample | Rejected] = iter(())
        self._rows = self._opened  # after the parts

    def read(self, limit: int | None) -> bool:
        """Write the samples of the source, `limit` at most; return whether it has more. Raise SourceError if there is none."""
        result = self._find_result(limit) if self.config.images is None else None
        if result is not None:
            self.progress.message(f"read: {result['images']:,} images were read by an earlier run, and are not read again")
        else:
            result = self._read_on(limit)
        self._require_samples()
        kind, preview = choose_image_kind(self.config), result["has_more"] and self.config.images is None
        described = describe_source(self.source, self._excluded, kind, self.config.captions, preview=preview)
        if not is_done(self.dataset, "read", self._key) or read_record(self.dataset, "read").get("source") != described:
            kept, rejected = count_rows(self.dataset, "read")
            write_record(self.dataset, "read", self._key, kept=kept, rejected=rejected, source=described)
        return bool(result["has_more"])

    def finish(self) -> None:
        """End the reading: the next run may take the files as they are."""
        self.close()
        if self._deduplicator is not None:
            before = self._failed_before.get("may_pass") if self._failed_before.get("limit") == self._result["limit"] else None
            result = self._result | {"may_pass": count_passing(self.dataset), "may_pass_before": before}
            write_json(self._path, self._state() | {"result": result})

    def close(self) -> None:
        """End the processes that render files of the source."""
        if isinstance(self._opened, Generator):
            self._opened.close()

    @cached_property
    def _earlier(self) -> dict[str, Any]:
        """What an earlier run wrote down, if it read the same source; nothing if excluded images could not all be read."""
        try:
            record = read_json(self._path)
            is_whole = record["key"] == self._key and not any(one["unread"] for one in record["exclusions"])
            exclusions = self.dataset.step_file("read", "exclusions")
            is_there = is_whole and file_digest(exclusions) == record["excluded_sha256"]
            return record if is_there else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SynthError):
            return {}

    def _find_result(self, limit: int | None) -> dict[str, Any] | None:
        """Return what an earlier run read, if its files are as they were, and reading now would give no others."""
        if limit not in self._results:
            self._results[limit] = self._look_for_result(limit)
        return self._results[limit]

    def _look_for_result(self, limit: int | None) -> dict[str, Any] | None:
        try:
            result = self._earlier["result"]
            is_all = not result["has_more"] and (result["limit"] is None or result["images"] < result["limit"])
            if limit != result["limit"] and not (is_all and (limit is None or limit >= result["images"])):
                return None
            if not is_done(self.dataset, "read", self._key):
                return None
            listed = open_table(self.dataset.step_file("read")).read(["sample_id"])["sample_id"]
            if ImageStore(self.dataset.path).find_missing(listed.to_pylist()):
                return None
            is_whole = not is_worth_another_try(count_passing(self.dataset), result.get("may_pass_before"))
            return dict(result) if is_whole else None
        except (OSError, LookupError, TypeError, AttributeError, SynthError):
            return None

    @cached_property
    def _failed_before(self) -> dict[str, Any]:
        """How many rows failed so when all were read before this time, and up to which limit; nothing if they were not."""
        result = self._earlier.get("result", self._earlier)
        return {name: result[name] for name in ("may_pass", "limit") if name in result} if isinstance(result, dict) else {}

    @cached_property
    def _excluded(self) -> list[dict[str, Any]]:
        """The images that are left out, which are read unless an earlier run has."""
        if self._earlier:
            return list(self._earlier["exclusions"])
        return write_exclusions(self.dataset, self.config, self._exclusions, self.progress)

    def _state(self) -> dict[str, Any]:
        excluded = self._excluded  # which may write the file
        sha256 = file_digest(self.dataset.step_file("read", "exclusions"))
        return {"key": self._key, "exclusions": excluded, "excluded_sha256": sha256}

    def _read_on(self, limit: int | None) -> dict[str, Any]:
        """Read the rows after those of the parts, write the files of the step, and return a summary."""
        deduplicator = self._deduplicator = self._deduplicator or self._begin()
        while (limit is None or len(deduplicator.images.kept) < limit) and (row := next(self._written, None)) is not None:
            deduplicator.is_copy(row)
            deduplicator.num_rows = row[POSITION] + 1
        if limit is None or len(deduplicator.images.kept) < limit:
            deduplicator.num_rows = self._parts.num_rows
        try:
            for batch in deduplicator.batches(self._rows, limit):
                self._parts.add(batch)
                self.progress("read", len(deduplicator.images.kept), limit)
        finally:
            self._parts.write()
        has_more = deduplicator.num_rows < self._parts.num_rows
        if not has_more and (following := next(self._rows, None)) is not None:
            has_more, self._rows = True, chain([following], self._rows)
        self.progress("read", len(deduplicator.images.kept), limit and len(deduplicator.images.kept))
        self._write_step(deduplicator)
        self._result = {"limit": limit, "images": len(deduplicator.images.kept), "has_more": has_more}
        return self._result

    def _begin(self) -> SampleDeduplicator:
        """Open the source after the rows of the parts, if its last row is still at its place.

        Rows that failed in a reading that has ended are tried again. Parts of another reading are removed;
        their images stay.
        """
        state = self._state()
        folder = self._path.with_name(PARTS_FOLDER)
        has_failed = bool(self._failed_before.get("may_pass")) and "result" in self._earlier
        if has_failed or key_of_parts(folder) != digest(state):
            remove(folder)
        write_json(self._path, state | self._failed_before)
        # With --images nothing would be tried again: such a reading has no end.
        takes_failed = self.config.images is None
        self._parts = parts = SourceParts(folder, digest(state), ImageStore(self.dataset.path), takes_failed)
        self._opened = self.source.read(max(0, parts.num_rows - 1))
        if parts.num_rows:
            last = next(self._opened, None)
            if last is not None and last.source_row == parts.last_row:
                self.progress.message(f"read: resumes after {parts.num_rows:,} rows of an earlier run")
            else:
                self.close()
                parts.forget()
                self._opened = self.source.read(0)
        self._rows = self._opened
        self._written = (row for table in parts.tables() for row in table.to_pylist())
        index = ExclusionIndex.of(read_exclusions(self.dataset), choose_image_kind(self.config))
        return SampleDeduplicator(index)

    def _write_step(self, deduplicator: SampleDeduplicator) -> None:
        """Write the samples that are kept, those that look like another one, and all rows that were rejected."""
        if (kind := choose_image_kind(self.config)) is None:
            forget_near_duplicates(self.dataset)
        groups = IMAGE_GROUPS.empty_table() if kind is None else self._compare(deduplicator, kind)
        of_near = {row["sample_id"]: row for row in groups.filter(pc.is_valid(groups["image_reason"])).to_pylist()}
        ids, near_rows = pa.array(of_near, pa.string()), list[dict[str, str]]()

        def near_duplicates() -> Iterator[pa.Table]:
            for samples in self._parts.tables():
                samples = without_copies(samples, deduplicator.num_rows)
                samples = samples.filter(pc.is_in(samples["sample_id"], ids))
                rows = [row | of_near[row["sample_id"]] for row in deduplicator.images.apply(samples).to_pylist()]
                near_rows.extend(
                    {"source_row": row["source_row"], "reason": row["image_reason"], "detail": row["near_duplicate_of"]}
                    for row in rows
                )
                yield pa.Table.from_pylist(rows, schema=NEAR_DUPLICATE)

        def kept() -> Iterator[pa.Table]:
            for samples in self._parts.tables():
                samples = without_copies(samples, deduplicator.num_rows)
                samples = samples.filter(pc.invert(pc.is_in(samples["sample_id"], ids)))
                if samples.num_rows:
                    yield deduplicator.images.apply(samples)

        if of_near:
            write_table(self.dataset.step_file("read", NEAR_DUPLICATES_FILE), near_duplicates(), NEAR_DUPLICATE)
        else:
            self.dataset.step_file("read", NEAR_DUPLICATES_FILE).unlink(missing_ok=True)
        write_table(self.dataset.step_file("read"), kept(), LISTED_SAMPLE)
        rejected = [row for position, row in self._parts.rejected if position < deduplicator.num_rows]
        write_rejected(self.dataset, [*rejected, *deduplicator.copies, *near_rows])

    def _compare(self, deduplicator: SampleDeduplicator, kind: ImageKind) -> pa.Table:
        """Return the groups of samples that look alike, which dedupe and split read (tables.IMAGE_GROUPS)."""
        columns = [*COMPARED_COLUMNS, POSITION, IS_COPY]
        tables = [READ_SAMPLE.empty_table().select(columns), *self._parts.tables(columns)]
        samples = pa.concat_tables([without_copies(table, deduplicator.num_rows) for table in tables])
        splits = pa.array([deduplicator.images.kept[name][1] for name in samples["sample_id"].to_pylist()], pa.string())
        samples = samples.set_column(samples.schema.get_field_index("split"), "split", splits)
        groups = compare_samples(samples, kind)
        write_table(self.dataset.step_file("read", IMAGE_GROUPS_FILE), [groups], IMAGE_GROUPS)
        return groups

    def _require_samples(self) -> None:
        """Say which rows were rejected, and why. Raise SourceError if no sample is left."""
        described = list(describe_rejected(self.dataset))
        for text in described:
            self.progress.message(text)
        kept = open_table(self.dataset.step_file("read")).metadata.num_rows
        if not kept:
            reasons = Counter(read_table(self.dataset.step_file("read", "rejected"), ["reason"])["reason"].to_pylist())
            files = "fix the files, or choose another source; steps/read/rejected.parquet names every row"
            hint = ADVICE.get(max(reasons, key=lambda reason: reasons[reason], default=""), files)
            problem = f"no image of {self.config.source} can be used; {'; '.join(described) or 'it is empty'}"
            raise SourceError(problem, hint=hint)


@dataclass(slots=True)
class SourceParts:
    """The rows read so far, in a folder: the next run resumes after the last part. Parts of another key are
    removed.

    A part is a Parquet file of samples in the order of the source, and a JSON file that is written after it:
    the rejected rows, the number of rows of the source in all parts so far, and the name of the last row. Its
    images are in the store before it is written. A part is not used, nor are those after it, if it is
    damaged, if its images are gone, or if most rows failed for passing reasons (without a network, say).
    Unless it `takes_failed` rows, one such row is enough.
    """

    folder: Path
    key: str  # a digest of everything that decides which samples are read
    store: ImageStore
    takes_failed: bool = True
    num_rows: int = 0  # of the source
    last_row: str = ""
    rejected: list[RejectedRow] = field(default_factory=list)
    _count: int = 0
    _pending: list[ReadBatch] = field(default_factory=list)
    _written_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        while (about := self._read(self._count)) is not None:
            self.num_rows, self.last_row = about["rows"], about["last_row"]
            self.rejected += [(position, row) for position, row in about["rejected"]]
            self._count += 1
        for path in self.folder.glob("*") if self._count else ():
            if path.stem.isdecimal() and int(path.stem) >= self._count:
                path.unlink()

    def add(self, batch: ReadBatch) -> None:
        """Take rows; a part is written when they are many, or took long."""
        self._pending.append(batch)
        self.num_rows += batch.num_rows
        self.rejected += batch.rejected
        self.last_row = batch.last_row
        is_due = time.monotonic() - self._written_at >= PART_SECONDS
        if is_due or sum(waiting.images.nbytes for waiting in self._pending) >= FILE_BYTES:
            self.write()

    def write(self) -> None:
        """Write the rows since the last part, if there are any: first their images."""
        if self._pending:
            self.store.add(batch.images for batch in self._pending)
            write_table(self._samples(self._count), [pa.concat_tables(batch.samples for batch in self._pending)], READ_SAMPLE)
            rejected = [row for batch in self._pending for row in batch.rejected]
            about = {"key": self.key, "rows": self.num_rows, "last_row": self.last_row, "rejected": rejected}
            write_json(self._about(self._count), about | {"sha256": file_digest(self._samples(self._count))})
            self._count, self._pending = self._count + 1, []
        self._written_at = time.monotonic()

    def tables(self, columns: Sequence[str] = READ_SAMPLE.names) -> Iterator[pa.Table]:
        """Yield the samples (READ_SAMPLE) in the order in which they were read."""
        for number in range(self._count):
            for batch in open_parquet(self._samples(number)).iter_batches(ROWS_AT_ONCE, columns=list(columns)):
                yield pa.Table.from_batches([batch])

    def forget(self) -> None:
        """Remove the parts."""
        remove(self.folder)
        self.num_rows, self.last_row, self.rejected, self._count, self._pending = 0, "", [], 0, []

    def _read(self, number: int) -> dict[str, Any] | None:
        """Return the record of a part; None if there is no part that can be used."""
        try:
            about = read_json(self._about(number))
            is_ours = about["key"] == self.key and about["sha256"] == file_digest(self._samples(number))
            fits = isinstance(about["rows"], int) and isinstance(about["last_row"], str) and about["rows"] > self.num_rows
            may_pass = sum(row["reason"] in PASSING_REASONS for _, row in about["rejected"])
            most = (about["rows"] - self.num_rows) // 2 if self.takes_failed else 0
            return about if is_ours and fits and may_pass <= most and self._has_images(number) else None
        except (OSError, ValueError, LookupError, TypeError, SynthError):
            return None

    def _has_images(self, number: int) -> bool:
        samples = without_copies(open_parquet(self._samples(number)).read(["sample_id", POSITION, IS_COPY]))
        return not self.store.find_missing(samples["sample_id"].to_pylist())

    def _samples(self, number: int) -> Path:
        return self.folder / f"{number:05d}.parquet"

    def _about(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


def key_of_parts(folder: Path) -> str | None:
    """Return the key of the parts in a folder; None if its first part has none."""
    try:
        return str(read_json(folder / "00000.json")["key"])
    except (OSError, ValueError, LookupError, TypeError, SynthError):
        return None


def write_source(
    shard: DatasetDir,
    rows: Iterator[Sample | Rejected],
    excluded: ExclusionIndex,
    limit: int | None,
    progress: Progress,
) -> None:
    """Write rows of a source to a shard: images, the list of samples, and rejected rows."""
    deduplicator = SampleDeduplicator(excluded)
    listed, rejected = [LISTED_SAMPLE.empty_table()], list[dict[str, str]]()

    def images() -> Iterator[pa.Table]:
        for batch in deduplicator.batches(rows, limit):
            rejected.extend(row for _, row in batch.rejected)
            listed.append(without_copies(batch.samples))
            progress("read", len(deduplicator.images.kept), limit)
            yield batch.images

    ImageStore(shard.path).add(images())
    write_table(shard.step_file("read"), map(deduplicator.images.apply, listed), LISTED_SAMPLE)
    write_rejected(shard, [*rejected, *deduplicator.copies])


def write_rejected(shard: DatasetDir, rows: list[dict[str, str]]) -> None:
    """Write which rows of a source were rejected."""
    ordered = pa.Table.from_pylist(sorted(rows, key=lambda row: row["source_row"]), schema=SOURCE_REJECTED)
    write_table(shard.step_file("read", "rejected"), [ordered], SOURCE_REJECTED)


def forget_near_duplicates(dataset: DatasetDir) -> None:
    """Remove what a run in one process wrote about images that look alike."""
    for name in (IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE):
        dataset.step_file("read", name).unlink(missing_ok=True)


def forget_reading(dataset: DatasetDir) -> None:
    """Remove what a run in one process has written down of its source, and the parts of one that was stopped."""
    dataset.step_file("read").with_name(READING_FILE).unlink(missing_ok=True)
    remove(dataset.step_file("read").with_name(PARTS_FOLDER))


def count_passing(shard: DatasetDir) -> int:
    """Return how many rows of the source were rejected for reasons that may pass."""
    reasons = read_table(shard.step_file("read", "rejected"), ["reason"])["reason"]
    return sum(reason in PASSING_REASONS for reason in reasons.to_pylist())


def is_worth_another_try(may_pass: int, before: int | None) -> bool:
    """Return whether rows that failed so are tried again: once, and then as long as that gives more rows than `before`."""
    return may_pass > 0 and (before is None or may_pass < before)


def describe_rejected(shard: DatasetDir) -> Iterator[str]:
    """Yield how many rows of the source were rejected for each reason, with the names of the first and their details."""
    table = read_table(shard.step_file("read", "rejected"))
    for row in sorted(table["reason"].value_counts().to_pylist(), key=lambda row: (-row["counts"], row["values"])):
        of_reason = table.filter(pc.equal(table["reason"], row["values"])).slice(0, NAMED_ROWS + 1).to_pylist()
        if row["values"] == REPEATED:
            shown = first_names([one["source_row"] for one in of_reason])
            yield f"read: {row['counts']:,} rows are about images of other rows, and add their texts to them ({shown})"
            continue
        is_id = row["values"] in _REJECTED_FOR_ANOTHER_IMAGE
        names = [one["source_row"] if is_id else f"{one['source_row']}: {one['detail']}" for one in of_reason]
        # Slides of one design look alike, and nobody would look for that in a setting.
        advice = f": {ADVICE[row['values']]}" if row["values"] == "near_duplicate_image" else ""
        yield f"read: {row['counts']:,} {row['values'].replace('_', ' ')} ({first_names(names)}){advice}"
