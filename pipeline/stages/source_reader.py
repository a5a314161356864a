"""Read a source for a run in one process; what an earlier run has read of the same source is not read again.

A source may be a download of many hours. While it is read, its samples are written in parts (source_parts.py), behind which the
next run goes on. When all are there, the files of the stage `source` list them, and `read.json` says what they were
made of: where nothing of that has changed, and no file either, the next run takes them as they are. If rows failed for reasons
that may pass, such as a host that did not answer, the next run reads all again, and those after it only while that gives more
rows.
"""

import secrets
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir, read_exclusions
from pipeline.dataset.samples import IS_COPY, PARTS_FOLDER, find_samples_without_images, keep_images
from pipeline.digests import digest, file_digest, state_of
from pipeline.errors import SourceError, StoreError, SynthError
from pipeline.images.decode import has_heif
from pipeline.images.near_duplicates import COMPARED_COLUMNS, ImageKind, compare_samples
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, files_of_source, find_source
from pipeline.sources.exclusions import ExclusionIndex
from pipeline.stages.base import require_stage
from pipeline.stages.source import (
    ADVICE,
    READING_FILE,
    count_passing,
    describe_rejected,
    describe_source,
    forget_near_duplicates,
    is_worth_another_try,
    write_rejected,
)
from pipeline.stages.source_copies import DuplicateImages, SampleDeduplicator
from pipeline.stages.source_exclusions import Exclusion, open_exclusions, write_exclusions
from pipeline.stages.source_parts import PART, POSITION, WITHOUT_PIXELS, SourceParts, key_of_parts, without_copies
from pipeline.storage.files import read_json, remove, write_json, write_table
from pipeline.tables import IMAGE_GROUPS, LISTED_SAMPLE, NEAR_DUPLICATE
from pipeline.types import Rejected, Sample, Source

READING = 3  # raise it when the same bytes would be read as other samples
# Settings that say which samples a source yields; all others are those of later stages, or stand in the key in another form.
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

    Where a number of rows is wanted, the parts stay: the next run with it begins with as few of their images as this one.
    """

    def __init__(self, dataset: DatasetDir, config: Config, source: Source, progress: Progress) -> None:
        self.dataset, self.config, self.source, self.progress = dataset, config, source, progress
        self._exclusions = open_exclusions(config)
        self.key = reading_key(config, source, self._exclusions)
        self.described: dict[str, Any] = {}  # what the manifest says of the source
        self._path = dataset.stage("source").with_name(READING_FILE)
        self._results: dict[int | None, dict[str, Any] | None] = {}
        self._deduplicator: SampleDeduplicator | None = None
        self._written: Iterator[dict[str, Any]] = iter(())  # rows of the parts, without their pixels
        self._opened: Iterator[Sample | Rejected] = iter(())
        self._rows = self._opened  # behind the parts

    def has_read(self, limit: int | None) -> bool:
        """Return whether an earlier run has written the files of the stage that reading up to this limit would give."""
        return self.config.images is None and self._find_result(limit) is not None

    def read(self, limit: int | None) -> bool:
        """Write the samples of the source, `limit` at most; return whether it has more. Raise SourceError if there is none."""
        result = self._find_result(limit) if self.config.images is None else None
        if result is not None:
            self.progress.message(f"source: {result['images']:,} images were read by an earlier run, and are not read again")
        else:
            result = self._read_on(limit)
        self._require_samples()
        kind, preview = choose_image_kind(self.config), result["has_more"] and self.config.images is None
        described = describe_source(self.source, self._excluded, kind, self.config.captions, preview=preview)
        self.described = described
        return bool(result["has_more"])

    def finish(self) -> None:
        """End the reading: the next run may take the files as they are. Parts stay as long as only they hold the images."""
        self.close()
        if self._deduplicator is not None:
            paths = sorted(self._path.parent.glob("*.parquet"))
            files = {path.name: file_digest(path) for path in paths}
            states = {path.name: state_of(path.stat()).hex() for path in paths}
            before = self._failed_before.get("may_pass") if self._failed_before.get("limit") == self._result["limit"] else None
            result = self._result | {"may_pass": count_passing(self.dataset), "may_pass_before": before}
            write_json(self._path, self._state() | {"result": result, "files": files, "states": states})

    def close(self) -> None:
        """End the processes that render files of the source, which wait for what nobody will read."""
        if isinstance(self._opened, Generator):
            self._opened.close()

    @cached_property
    def _earlier(self) -> dict[str, Any]:
        """What an earlier run wrote down, if it read the same source; nothing if excluded images could not all be read."""
        try:
            record = read_json(self._path)
            is_whole = record["key"] == self.key and not any(one["unread"] for one in record["exclusions"])
            is_there = is_whole and self._is_unchanged("exclusions.parquet", record["excluded_sha256"])
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
            files, states = self._earlier["files"], self._earlier["states"]
            if not all(self._is_unchanged(name, sha256, states[name]) for name, sha256 in files.items()):
                return None
            if find_samples_without_images(self.dataset):
                return None
            is_whole = not is_worth_another_try(count_passing(self.dataset), result.get("may_pass_before"))
            return dict(result) if is_whole else None
        except (OSError, LookupError, TypeError, AttributeError):
            return None

    @cached_property
    def _failed_before(self) -> dict[str, Any]:
        """How many rows failed so when all were read before this time, and up to which limit; nothing if they were not."""
        result = self._earlier.get("result", self._earlier)
        return {name: result[name] for name in ("may_pass", "limit") if name in result} if isinstance(result, dict) else {}

    def _is_unchanged(self, name: str, sha256: str, state: str | None = None) -> bool:
        """Return whether a file of the stage has these bytes; it is not read where its size and times are what they were."""
        path = self._path.with_name(Path(name).name)
        return state_of(path.stat()).hex() == state or file_digest(path) == sha256

    @cached_property
    def _excluded(self) -> list[dict[str, Any]]:
        """The images that are left out, which are read unless an earlier run has."""
        if self._earlier:
            return list(self._earlier["exclusions"])
        return write_exclusions(self.dataset, self.config, self._exclusions, self.progress)

    def _state(self) -> dict[str, Any]:
        excluded = self._excluded  # which may write the file
        sha256 = file_digest(self.dataset.stage("source", "exclusions"))
        return {"key": self.key, "exclusions": excluded, "excluded_sha256": sha256}

    def _read_on(self, limit: int | None) -> dict[str, Any]:
        """Read behind what was read, write the files of the stage, and return what was read."""
        deduplicator = self._deduplicator = self._deduplicator or self._begin()
        while (limit is None or len(deduplicator.images.kept) < limit) and (row := next(self._written, None)) is not None:
            deduplicator.add(row | {"images": []})
            deduplicator.num_rows = row[POSITION] + 1
        if limit is None or len(deduplicator.images.kept) < limit:
            deduplicator.num_rows = self._parts.num_rows
        try:
            for batch in deduplicator.batches(self._rows, limit):
                self._parts.add(batch)
                self.progress("source", len(deduplicator.images.kept), limit)
        finally:
            self._parts.write()
        has_more = deduplicator.num_rows < self._parts.num_rows
        if not has_more and (following := next(self._rows, None)) is not None:
            has_more, self._rows = True, chain([following], self._rows)
        self.progress("source", len(deduplicator.images.kept), limit and len(deduplicator.images.kept))
        self._write_stage(deduplicator)
        self._result = {"limit": limit, "images": len(deduplicator.images.kept), "has_more": has_more}
        return self._result

    def _begin(self) -> SampleDeduplicator:
        """Open the source behind what lies in the parts, if its last row is still at its place.

        Rows that failed in a reading that has ended are tried again. What lies there of another reading goes; the images of
        the samples that are listed are kept, since this one may end before its first.
        """
        state = self._state()
        folder = self.dataset.stage("source").with_name(PARTS_FOLDER)
        has_failed = bool(self._failed_before.get("may_pass")) and "result" in self._earlier
        if folder.exists() and (has_failed or key_of_parts(folder) != digest(state)):
            with suppress(StoreError):  # the list of samples is damaged, and made anew
                keep_images(self.dataset)
            remove(folder)
        write_json(self._path, state | self._failed_before)
        self._parts = parts = SourceParts(
            folder, digest(state), takes_failed=self.config.images is None
        )  # else nothing would be tried again: a reading for a number of rows has no end
        self._opened = self.source.read(max(0, parts.num_rows - 1))
        if parts.num_rows:
            last = next(self._opened, None)
            if last is not None and last.source_row == parts.last_row:
                self.progress.message(f"source: goes on behind {parts.num_rows:,} rows that an earlier run has read")
            else:
                self.close()
                parts.forget()
                self._opened = self.source.read(0)
        self._rows = self._opened
        self._written = (row for table in parts.tables(WITHOUT_PIXELS) for row in table.drop_columns([IS_COPY]).to_pylist())
        index = ExclusionIndex.of(read_exclusions(self.dataset), choose_image_kind(self.config))
        return SampleDeduplicator(index, DuplicateImages())

    def _write_stage(self, deduplicator: SampleDeduplicator) -> None:
        """Write the samples that are kept, those that look like another one, and all rows that were rejected."""
        if (kind := choose_image_kind(self.config)) is None:
            forget_near_duplicates(self.dataset)
        groups = IMAGE_GROUPS.empty_table() if kind is None else self._compare(deduplicator, kind)
        of_near = {row["sample_id"]: row for row in groups.filter(pc.is_valid(groups["image_reason"])).to_pylist()}
        ids, near_rows = pa.array(of_near, pa.string()), list[dict[str, str]]()

        def near_duplicates() -> Iterator[pa.Table]:
            for samples in self._parts.tables(holding=of_near):
                samples = deduplicator.images.apply(without_copies(samples, deduplicator.num_rows))
                samples = samples.filter(pc.is_in(samples["sample_id"], ids))
                rows = [row | of_near[row["sample_id"]] for row in samples.to_pylist()]
                near_rows.extend(
                    {"source_row": row["source_row"], "reason": row["image_reason"], "detail": row["near_duplicate_of"]}
                    for row in rows
                )
                yield pa.Table.from_pylist(rows, schema=NEAR_DUPLICATE)

        def kept() -> Iterator[pa.Table]:
            for samples in self._parts.tables(WITHOUT_PIXELS):
                samples = without_copies(samples, deduplicator.num_rows)
                samples = samples.filter(pc.invert(pc.is_in(samples["sample_id"], ids)))
                if samples.num_rows:
                    yield deduplicator.images.apply(samples)

        if of_near:
            write_table(self.dataset.stage("source", NEAR_DUPLICATES_FILE), near_duplicates(), NEAR_DUPLICATE)
        else:
            self.dataset.stage("source", NEAR_DUPLICATES_FILE).unlink(missing_ok=True)
        write_table(self.dataset.stage("source"), kept(), LISTED_SAMPLE)
        rejected = [row for position, row in self._parts.rejected if position < deduplicator.num_rows]
        write_rejected(self.dataset, [*rejected, *deduplicator.copies, *near_rows])

    def _compare(self, deduplicator: SampleDeduplicator, kind: ImageKind) -> pa.Table:
        """Return the groups of samples that look alike, which dedupe and split read (tables.IMAGE_GROUPS)."""
        columns = [*COMPARED_COLUMNS, POSITION, IS_COPY]
        tables = [PART.empty_table().select(columns), *self._parts.tables(columns)]
        samples = pa.concat_tables([without_copies(table, deduplicator.num_rows) for table in tables])
        splits = pa.array([deduplicator.images.kept[name][1] for name in samples["sample_id"].to_pylist()], pa.string())
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
