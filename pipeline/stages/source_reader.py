"""Read a source for a run in one process; what an earlier run has read of the same source is not read again.

A source may be a download of many hours. While it is read, its samples are written in parts (source_parts.py), behind which the
next run goes on. When all are there, they become the files of the stage `source`, and `read.json` says what they were made of:
where nothing of that has changed, and no file either, the next run takes them as they are.
"""

import secrets
from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir, read_exclusions
from pipeline.digests import digest, file_digest
from pipeline.errors import SourceError, SynthError
from pipeline.images.decode import has_heif
from pipeline.images.similarity import COMPARED_COLUMNS, ImageKind, compare_samples
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.stages.base import require_stage
from pipeline.stages.source import (
    ADVICE,
    DuplicateImages,
    Exclusion,
    Intake,
    describe_rejected,
    describe_source,
    forget_near_duplicates,
    open_exclusions,
    without_copies,
    write_exclusions,
    write_rejected,
)
from pipeline.stages.source_parts import IS_COPY, WITHOUT_PIXELS, SourceParts
from pipeline.storage.files import read_json, read_table, write_json, write_table
from pipeline.tables import IMAGE_GROUPS, NEAR_DUPLICATE, SAMPLE
from pipeline.types import Rejected, Sample, Source

READING = 1  # raise it when the same bytes would be read as other samples
# Settings that say which samples a source yields; all others are those of later stages, or stand in the key by themselves.
READ_SETTINGS = (
    "source",
    "source_split",
    "license",
    "columns",
    "allow_urls",
    "allow_partial",
    "follow_links",
    "split_list",
    "frame_seconds",
    "seed",
)
# Why a row may be rejected now and read another time, or on another machine.
PASSING_REASONS = frozenset(
    ("url_unreachable", "unreadable_file", "unreadable_folder", "too_slow", "too_much_memory", "decoder_died")
)


def reading_key(config: Config, source: Source, exclusions: Sequence[Exclusion]) -> str:
    """Return a digest of all that says which samples are read; a new one each time if a source has no revision."""
    revisions = [source.revision, *(exclusion.source.revision for exclusion in exclusions)]
    settings = config.model_dump(mode="json", include={*READ_SETTINGS})
    captions = [file_digest(path) for path in config.captions]
    about = [READING, source.name, revisions, settings, captions, list(config.exclude), config.keeps_human_texts]
    return digest([*about, choose_image_kind(config), has_heif()]) if all(revisions) else secrets.token_hex(32)


class SourceReader:
    """Reads the samples of a source into a dataset folder, whose lock the caller holds."""

    def __init__(self, dataset: DatasetDir, config: Config, source: Source, limit: int | None, progress: Progress) -> None:
        self.dataset, self.config, self.source, self.progress = dataset, config, source, progress
        self._exclusions = open_exclusions(config)
        self._path = dataset.provenance("source").with_name("read.json")
        key = reading_key(config, source, self._exclusions)
        self._result = self._find_result(key) or {"key": key, "files": {}}
        self._parts = SourceParts(dataset.stage("source").with_name("parts"), key)
        self._intake: Intake | None = None
        self._opened: Iterator[Sample | Rejected] = iter(())
        self._rows = self._opened
        # How many images to read first: as many as are there, where the run reads on until enough are kept.
        there = max(self._result.get("limit") or 0, self._parts.num_images) if config.rows is not None else 0
        self.first_limit = limit and max(limit, min(there, config.limit or there))
        if not self._has_result(self.first_limit):
            self._result.pop("images", None)
            for which in ("kept", "rejected"):  # nobody shall take them for the samples of these settings
                dataset.stage("source", which).unlink(missing_ok=True)

    def read(self, limit: int | None) -> bool:
        """Write the samples of the source, `limit` at most; return whether it has more. Raise SourceError if there is none."""
        if self._has_result(limit):
            self.progress.message(f"source: {self._result['images']:,} images, as an earlier run has read them")
        else:
            self._read_exclusions()
            self._read_on(limit)
        self._require_samples()
        has_more = bool(self._result["has_more"])
        kind, preview = choose_image_kind(self.config), has_more and self.config.rows is None
        described = describe_source(self.source, self._result["exclusions"], kind, self.config.captions, preview=preview)
        write_json(self.dataset.provenance("source"), described)
        return has_more

    def finish(self) -> None:
        """Write down what was read, so that the next run may take the files as they are; parts are not needed any more."""
        self.close()
        if self._intake is not None:
            files = {path.name: file_digest(path) for path in sorted(self._path.parent.glob("*.parquet"))}
            self._result["files"] = files
            write_json(self._path, self._result)
        self._parts.forget()

    def close(self) -> None:
        """End the processes that render files of the source, which wait for what nobody will read."""
        if isinstance(self._opened, Generator):
            self._opened.close()

    def _find_result(self, key: str) -> dict[str, Any] | None:
        """Return what an earlier run wrote down, if it read the same source and its files are as they were."""
        try:
            found = read_json(self._path)
            files = [(self._path.with_name(Path(name).name), sha256) for name, sha256 in found["files"].items()]
            return found if found["key"] == key and all(file_digest(path) == sha256 for path, sha256 in files) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SynthError):
            return None

    def _has_result(self, limit: int | None) -> bool:
        """Return whether the files of the stage are those that reading up to this limit would give."""
        found = self._result
        if "images" not in found or not (limit == found["limit"] or self._is_all(limit)):
            return False
        reasons = read_table(self.dataset.stage("source", "rejected"), ["reason"])["reason"]
        return PASSING_REASONS.isdisjoint(reasons.to_pylist())

    def _is_all(self, limit: int | None) -> bool:
        """Return whether the whole source was read, and the limit allows as much; some sources end where the limit says."""
        is_limitless = find_source(self.config.source).counts_rows and not self._result["has_more"]
        return is_limitless and (limit is None or limit >= self._result["images"])

    def _read_exclusions(self) -> None:
        """Read the images that are left out, unless an earlier run has."""
        if "exclusions" not in self._result:
            described = write_exclusions(self.dataset, self.config, self.progress, self._exclusions)
            path = self.dataset.stage("source", "exclusions")
            self._result |= {"exclusions": described, "files": {path.name: file_digest(path)}}
            write_json(self._path, self._result)

    def _read_on(self, limit: int | None) -> None:
        """Read behind what was read, and write the files of the stage."""
        intake = self._start(limit) if self._intake is None else self._intake
        try:
            for batch in intake.batches(self._rows, limit):
                self._parts.add(batch)
                self.progress("source", len(intake.images.kept), limit)
        finally:
            self._parts.write()
        following = next(self._rows, None)
        self._rows = self._rows if following is None else chain([following], self._rows)
        self._write_stage(intake)
        self._result |= {"limit": limit, "images": len(intake.images.kept), "has_more": following is not None}

    def _start(self, limit: int | None) -> Intake:
        """Take what lies in the parts, and open the source behind it."""
        if limit is not None and self._parts.num_images > limit:
            self._parts.forget()
        index = ExclusionIndex.of(read_exclusions(self.dataset), choose_image_kind(self.config))
        self._intake = intake = Intake(index, DuplicateImages(self.config.keeps_human_texts))
        for table in self._parts.tables(WITHOUT_PIXELS):
            for row in table.drop_columns([IS_COPY]).to_pylist():
                intake.add(row | {"images": []})
        if self._parts.num_rows:
            self.progress.message(f"source: {self._parts.num_rows:,} rows were read by an earlier run, which goes on")
        self._rows = self._opened = self.source.read(self._parts.num_rows)
        return intake

    def _write_stage(self, intake: Intake) -> None:
        """Write the samples that are kept, those that look like another one, and all rows that were rejected."""
        forget_near_duplicates(self.dataset)
        kind = choose_image_kind(self.config)
        groups = IMAGE_GROUPS.empty_table() if kind is None else self._compare(intake, kind)
        of_near = {row["sample_id"]: row for row in groups.filter(pc.is_valid(groups["image_reason"])).to_pylist()}
        ids, near_rows = pa.array(of_near, pa.string()), list[dict[str, str]]()

        def near_duplicates() -> Iterator[pa.Table]:
            for samples in self._parts.tables(holding=of_near):
                samples = intake.images.apply(without_copies(samples))
                samples = samples.filter(pc.is_in(samples["sample_id"], ids))
                rows = [row | of_near[row["sample_id"]] for row in samples.to_pylist()]
                near_rows.extend(
                    {"source_row": row["source_row"], "reason": row["image_reason"], "detail": row["near_duplicate_of"]}
                    for row in rows
                )
                yield pa.Table.from_pylist(rows, schema=NEAR_DUPLICATE)

        def kept() -> Iterator[pa.Table]:
            for samples in self._parts.tables():
                samples = without_copies(samples)
                samples = samples.filter(pc.invert(pc.is_in(samples["sample_id"], ids)))
                if samples.num_rows:
                    yield intake.images.apply(samples)

        if of_near:
            write_table(self.dataset.stage("source", NEAR_DUPLICATES_FILE), near_duplicates(), NEAR_DUPLICATE)
        write_table(self.dataset.stage("source"), kept(), SAMPLE)
        write_rejected(self.dataset, [*self._parts.rejected, *intake.copies, *near_rows])

    def _compare(self, intake: Intake, kind: ImageKind) -> pa.Table:
        """Return the groups of samples that look alike, which dedupe and split read (tables.IMAGE_GROUPS)."""
        tables = [without_copies(table) for table in self._parts.tables([*COMPARED_COLUMNS, IS_COPY])]
        samples = pa.concat_tables(tables)
        splits = pa.array([intake.images.kept[name][1] for name in samples["sample_id"].to_pylist()], pa.string())
        samples = samples.set_column(samples.schema.get_field_index("split"), "split", splits)
        groups = compare_samples(samples, kind)
        write_table(self.dataset.stage("source", IMAGE_GROUPS_FILE), [groups], IMAGE_GROUPS)
        return groups

    def _require_samples(self) -> None:
        """Say which rows were rejected, and why. Raise SourceError if no sample is left."""
        described = list(describe_rejected(self.dataset))
        for text in described:
            self.progress.message(text)
        kept, rejected = require_stage(self.dataset, "source")
        if not kept:
            files = "mend the files, or choose another source; stages/source/rejected.parquet names every row"
            hint = ADVICE.get(max(rejected, key=lambda reason: rejected[reason], default=""), files)
            problem = f"no image of {self.config.source} can be used; {'; '.join(described) or 'it is empty'}"
            raise SourceError(problem, hint=hint)
