"""The read step writes images to the store (dataset/images.py), and a list of samples to the step's folder.

SourceReader writes rows in parts, so that a stopped run resumes after the last part.
"""

import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import IMAGE_GROUPS_FILE, NEAR_DUPLICATES_FILE, DatasetDir
from pipeline.dataset.images import FILE_BYTES, ImageStore
from pipeline.dataset.records import count_rows, is_done, read_record, write_record
from pipeline.digests import digest, file_digest
from pipeline.errors import SourceError, SynthError
from pipeline.images.decode import has_heif
from pipeline.images.near_duplicates import (
    COMPARED_COLUMNS,
    LOOK_ALIKE_ADVICE,
    MAX_NEAR_BITS,
    compare_samples,
)
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source
from pipeline.sources.base import NAMED_ROWS, first_names
from pipeline.sources.duplicates import (
    IS_COPY,
    POSITION,
    READ_SAMPLE,
    REPEATED,
    DuplicateImages,
    without_copies,
)
from pipeline.sources.exclusions import (
    Exclusion,
    ExclusionIndex,
    hash_images,
    open_exclusions,
    write_exclusions,
)
from pipeline.sources.parquet import NAMED_IMAGES_HINT
from pipeline.sources.texts import join_texts
from pipeline.storage.files import (
    open_parquet,
    open_table,
    read_json,
    read_table,
    remove,
    write_json,
    write_table,
)
from pipeline.tables import (
    IMAGE_GROUPS,
    LISTED_SAMPLE,
    NEAR_DUPLICATE,
    NUM_PAGES,
    SAMPLE_IMAGES,
    SOURCE_REJECTED,
)
from pipeline.types import ImageKind, Rejected, Sample, Source

PARTS_FOLDER = "parts"
PART_SECONDS = 30.0  # a stopped run on a slow source loses at most this much reading time
PART_ROWS = 16_384
READ_VERSION = 6  # increase it when a change makes the same source yield other samples
# Settings that determine which samples a source yields.
READ_SETTINGS = (
    "source", "source_split", "license", "columns", "follow_links", "frame_seconds", "image_filter",
)  # fmt: skip
_TEMPORARY = ("too_slow", "too_much_memory", "decoder_died")
# Advice for the user, by rejection reason.
ADVICE = {
    "image_not_embedded": f"if the table names its images: {NAMED_IMAGES_HINT}",
    "unsupported_format": "convert the files to JPEG; HEIC needs the package pillow-heif (extra `heic`)",
    "several_images": "to read the images of a row as a deck, pass --columns pages=COLUMN",
    "too_many_pages": "split the decks into smaller ones",
    "unreadable_text": "save the text files in UTF-8",
    "unused_text": "pack each text next to its image, for example with tar --sort=name",
    "unpaired_answers": "a list of questions needs an equally long list of answers",
    "unknown_split": "for tables, ignore the column (--columns split=none) or use another (split=COLUMN)",
    **dict.fromkeys(
        ("image_too_small", "extreme_aspect_ratio", "one_color_image"),
        "set other bounds in the section `image_filter`, or disable it: image_filter.enabled: false",
    ),
    **LOOK_ALIKE_ADVICE,
    "banned_image": "the images are in a dataset passed to --exclude",
    **dict.fromkeys(
        _TEMPORARY, "to try these images again, for example on a larger machine, remove the folder steps/read"
    ),
    "unreadable_folder": "change the permissions of the folders",
}
# In these rejections, the detail is the id of another sample or the name of an excluded dataset.
_REJECTED_FOR_ANOTHER_IMAGE = ("near_duplicate_image", "near_held_out_image", "banned_image")
# The advice for these reasons is always shown.
_ALWAYS_ADVISED = ("near_duplicate_image", *_TEMPORARY)


def reading_key(config: Config, source: Source, exclusions: Sequence[Exclusion]) -> str:
    """Return a digest of everything that determines the samples.

    If a source has no revision, its changes cannot be detected, so a random key is returned.
    """
    revisions = [source.revision, *(exclusion.source.revision for exclusion in exclusions)]
    if not all(revisions):
        return secrets.token_hex(32)
    settings = config.model_dump(mode="json", include={*READ_SETTINGS})
    limit = config.limit if find_source(config.source).is_endless else None
    compared = [config.keeps_human_texts, choose_image_kind(config), list(config.exclude)]
    captions = [file_digest(path) for path in config.captions if path.exists()]
    facts = [source.name, source.license, revisions, settings, captions, limit, compared, has_heif()]
    return digest([READ_VERSION, *facts])


class SourceReader:
    """Reads the samples of a source into a dataset folder. The caller must hold the folder's lock."""

    def __init__(
        self,
        dataset: DatasetDir,
        config: Config,
        source: Source,
        progress: Progress,
        store: ImageStore | None = None,
    ) -> None:
        self._store = store or ImageStore(dataset.path)
        self.dataset, self.config, self.source, self.progress = dataset, config, source, progress
        self._exclusions = open_exclusions(config)
        self._key = reading_key(config, source, self._exclusions)
        self._images = DuplicateImages()
        # This counts source rows up to the last kept sample.
        self._num_rows = 0

    def read(self, limit: int | None) -> None:
        """Write up to `limit` samples. Raises SourceError if no sample is left."""
        self._excluded = self._read_exclusions()
        earlier = self._find_result(limit)
        result = earlier or self._read_rows(limit)
        if earlier:
            message = f"read: {earlier['images']:,} images were read by an earlier run and are not read again"
            self.progress.message(message)
        self._require_samples(is_new=not earlier)
        described = self._describe(result)
        if not earlier or read_record(self.dataset, "read")["source"] != described:
            kept, rejected = count_rows(self.dataset, "read")
            facts: dict[str, Any] = {"kept": kept, "rejected": rejected, "source": described}
            write_record(self.dataset, "read", self._key, **facts, result=result)

    def _describe(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return the provenance of the source."""
        source, kind, captions = self.source, choose_image_kind(self.config), self.config.captions
        return {
            "name": source.name,
            "revision": source.revision,
            "decks": source.decks,
            **({"partial": True} if source.is_partial else {}),
            **({"preview": True} if result["has_more"] else {}),
            **({"joined_texts": joined} if (joined := result["joined_texts"]) else {}),
            "never": self._excluded,
            "compared_as": kind,
            "near_bits": MAX_NEAR_BITS.get(kind or ""),
            **({"captions": [file_digest(path) for path in captions]} if captions else {}),
        }

    def _find_result(self, limit: int | None) -> dict[str, Any] | None:
        """Return the result of an earlier run if it can be used again, else None."""
        record = read_record(self.dataset, "read")
        try:
            result: dict[str, Any] = record["result"]
            is_below_limit = result["limit"] is None or result["images"] < result["limit"]
            is_all = not result["has_more"] and is_below_limit
            is_wanted = limit == result["limit"] or (is_all and (limit is None or limit >= result["images"]))
            has_unread = any(one["unread"] for one in record["source"]["never"])
            if not is_wanted or has_unread or not is_done(self.dataset, "read", self._key):
                return None
        except (LookupError, TypeError, AttributeError):  # the record is damaged
            return None
        listed = open_table(self.dataset.step_file("read")).read(["sample_id"])["sample_id"]
        return None if self._store.find_missing(listed.to_pylist()) else result

    def _read_exclusions(self) -> list[dict[str, Any]]:
        """Describe the excluded datasets. Their images are read unless an earlier run read all of them."""
        with suppress(LookupError, TypeError, AttributeError):  # the record is damaged
            described = list(read_record(self.dataset, "read", "exclusions")["described"])
            has_unread = any(one["unread"] for one in described)
            if not has_unread and is_done(self.dataset, "read", self._key, "exclusions"):
                return described
        described = write_exclusions(self.dataset, self.config, self._exclusions, self.progress)
        write_record(self.dataset, "read", self._key, "exclusions", described=described)
        return described

    def _read_rows(self, limit: int | None) -> dict[str, Any]:
        """Read rows from the parts and the source, write the step's files, and return the result."""
        parts, new_rows = self._open_source()
        kept = self._images.kept
        part_rows = (row for table in parts.tables() for row in table.to_pylist())
        while (limit is None or len(kept) < limit) and (row := next(part_rows, None)) is not None:
            self._images.add(row)
            self._num_rows = row[POSITION] + 1
        try:
            if limit is None or len(kept) < limit:
                self._num_rows = parts.num_rows
                for new in new_rows:
                    parts.add(self._check(new), self._images)
                    self._num_rows = parts.num_rows
                    self.progress("read", len(kept), limit)
                    if len(kept) == limit:
                        break
            has_more = self._num_rows < parts.num_rows or next(new_rows, None) is not None
        finally:
            parts.write()
            new_rows.close()
        self.progress("read", len(kept), limit and len(kept))
        num_joined = self._write_step(parts)
        if num_joined:
            texts = f"{num_joined:,} tokenized human texts"
            self.progress.message(f'read: joined words and punctuation of {texts}, such as "a dog ."')
        return {"limit": limit, "images": len(kept), "has_more": has_more, "joined_texts": num_joined}

    def _check(self, row: Sample | Rejected) -> Sample | Rejected:
        """Return the sample with perceptual hashes where needed, or a rejection if the sample is excluded."""
        if isinstance(row, Rejected):
            return row
        if self._exclusion_index.kind is not None:
            row = replace(row, pdq_hashes=hash_images(row))
        name = self._exclusion_index.find(row)
        return Rejected(source_row=row.source_row, reason="banned_image", detail=name) if name else row

    def _open_source(self) -> tuple["SourceParts", Generator[Sample | Rejected]]:
        """Open the source. Return the parts, and the rows that are not in the parts."""
        # If the last row of the parts has moved, the source has changed, and all rows are read again.
        kind = choose_image_kind(self.config)
        exclusions = self.dataset.step_file("read", "exclusions")
        self._exclusion_index = ExclusionIndex(read_table(exclusions), kind)
        folder = self.dataset.step_file("read").with_name(PARTS_FOLDER)
        key = digest([self._key, file_digest(exclusions)])
        parts = SourceParts(folder, key, self._store)
        rows = self._rows_from(max(0, parts.num_rows - 1))
        if parts.num_rows:
            last = next(rows, None)
            if last is not None and last.source_row == parts.last_row:
                self.progress.message(f"read: resumes after {parts.num_rows:,} rows read by an earlier run")
            else:
                rows.close()
                remove(folder)
                parts = SourceParts(folder, key, self._store)
                rows = self._rows_from(0)
        return parts, rows

    def _rows_from(self, start: int) -> Generator[Sample | Rejected]:
        """Yield the rows of the source. Closing the generator ends the processes that decode or render."""
        yield from self.source.read(start)

    def _write_step(self, parts: "SourceParts") -> int:
        """Write the kept samples, the near-duplicates and all rejected rows.

        Returns the number of tokenized texts of the kept samples, which are joined.
        """
        num_joined = 0
        kind = choose_image_kind(self.config)
        if kind is None:
            self.dataset.step_file("read", IMAGE_GROUPS_FILE).unlink(missing_ok=True)
        groups = IMAGE_GROUPS.empty_table() if kind is None else self._compare(parts, kind)
        near_groups = groups.filter(pc.is_valid(groups["image_reason"])).to_pylist()
        near = {row["sample_id"]: row for row in near_groups}
        near_ids = pa.array(near, pa.string())

        def samples(*, is_near: bool) -> Iterator[pa.Table]:
            nonlocal num_joined
            for table in parts.tables():
                table = without_copies(table, self._num_rows)
                table = table.filter(pc.equal(pc.is_in(table["sample_id"], near_ids), is_near))
                if table.num_rows:
                    table, joined = join_texts(self._images.apply(table))
                    num_joined += 0 if is_near else joined
                    yield table

        def near_duplicates() -> Iterator[pa.Table]:
            for table in samples(is_near=True):
                rows = [row | near[row["sample_id"]] for row in table.to_pylist()]
                yield pa.Table.from_pylist(rows, schema=NEAR_DUPLICATE)

        rejected = [row for position, row in parts.rejected if position < self._num_rows]
        rejected += self._images.copies
        near_file = self.dataset.step_file("read", NEAR_DUPLICATES_FILE)
        if near:
            write_table(near_file, near_duplicates(), NEAR_DUPLICATE)
            written = read_table(near_file, ["source_row", "image_reason", "near_duplicate_of"])
            rejected += written.rename_columns(SOURCE_REJECTED.names).to_pylist()
        else:
            near_file.unlink(missing_ok=True)
        write_table(self.dataset.step_file("read"), samples(is_near=False), LISTED_SAMPLE)
        rejected.sort(key=lambda row: row["source_row"])
        table = pa.Table.from_pylist(rejected, schema=SOURCE_REJECTED)
        write_table(self.dataset.step_file("read", "rejected"), [table], SOURCE_REJECTED)
        return num_joined

    def _compare(self, parts: "SourceParts", kind: ImageKind) -> pa.Table:
        """Find groups of similar samples, write them, and return them (tables.IMAGE_GROUPS)."""
        columns = [*COMPARED_COLUMNS, POSITION, IS_COPY]
        samples = pa.concat_tables([without_copies(table, self._num_rows) for table in parts.tables(columns)])
        splits = [self._images.kept[sample_id] for sample_id in samples["sample_id"].to_pylist()]
        column = samples.schema.get_field_index("split")
        groups = compare_samples(samples.set_column(column, "split", pa.array(splits, pa.string())), kind)
        write_table(self.dataset.step_file("read", IMAGE_GROUPS_FILE), [groups], IMAGE_GROUPS)
        return groups

    def _require_samples(self, *, is_new: bool) -> None:
        """Report new rejected rows by reason. Raises SourceError if no sample is left."""
        described = list(describe_rejected(self.dataset))
        for text in described if is_new else ():
            self.progress.message(text)
        kept, reasons = count_rows(self.dataset, "read")
        if kept:
            return
        hint = "fix the files, or choose another source; steps/read/rejected.parquet lists every row"
        if reasons:
            # The first reason is the most common one.
            hint = ADVICE.get(next(iter(reasons)), hint)
        problem = f"no image of {self.config.source} can be used; {'; '.join(described) or 'it is empty'}"
        raise SourceError(problem, hint=hint)


@dataclass(slots=True)
class SourceParts:
    """Stores the rows read so far in parts. The next run resumes after the last part.

    A part is a Parquet file with samples and a JSON file, which is written last. At the start, the first
    damaged or outdated part and all later parts are removed.
    """

    folder: Path
    key: str
    store: ImageStore
    num_rows: int = 0
    last_row: str = ""
    rejected: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # (position, SOURCE_REJECTED)
    _count: int = 0
    # Rows that are not in a part yet.
    _samples: list[dict[str, Any]] = field(default_factory=list)
    _images: dict[str, Sequence[bytes]] = field(default_factory=dict)
    _num_bytes: int = 0
    _first_row: int = 0
    _written_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        while (record := self._read_record(self._count)) is not None:
            self.num_rows, self.last_row = record["rows"], record["last_row"]
            self.rejected += [(position, row) for position, row in record["rejected"]]
            self._count += 1
        self._first_row = self.num_rows
        for path in self.folder.glob("*"):
            if path.stem.isdecimal() and int(path.stem) >= self._count:
                path.unlink()

    def add(self, row: Sample | Rejected, duplicates: DuplicateImages) -> None:
        """Add a row, and write a part if a limit is reached. Images of copies are not stored."""
        if isinstance(row, Rejected):
            self.rejected.append((self.num_rows, asdict(row)))
        else:
            values = row.to_row()
            images = values.pop("images")
            values |= {NUM_PAGES: len(images), POSITION: self.num_rows}
            values[IS_COPY] = duplicates.add(values)
            self._samples.append(values)
            if not values[IS_COPY]:
                self._images[row.id] = images
                self._num_bytes += sum(map(len, images))
        self.num_rows, self.last_row = self.num_rows + 1, row.source_row
        is_large = self._num_bytes >= FILE_BYTES or self.num_rows - self._first_row >= PART_ROWS
        if is_large or time.monotonic() - self._written_at >= PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the rows since the last part, if there are any, as a new part. Images are stored first."""
        if self.num_rows > self._first_row:
            images = pa.table([[*self._images], [*self._images.values()]], schema=SAMPLE_IMAGES)
            self.store.add([images])
            added = [row for row in self._samples if row[POSITION] < self.num_rows]
            samples = pa.Table.from_pylist(added, schema=READ_SAMPLE)
            write_table(self._path(self._count, ".parquet"), [samples], READ_SAMPLE)
            new = range(self._first_row, self.num_rows)
            rejected = [[position, row] for position, row in self.rejected if position in new]
            record = {"key": self.key, "rows": self.num_rows, "last_row": self.last_row, "rejected": rejected}
            sha256 = file_digest(self._path(self._count, ".parquet"))
            write_json(self._path(self._count, ".json"), record | {"sha256": sha256})
            self._count, self._first_row = self._count + 1, self.num_rows
            self._samples, self._images, self._num_bytes = [], {}, 0
        self._written_at = time.monotonic()

    def tables(self, columns: Sequence[str] = READ_SAMPLE.names) -> Iterator[pa.Table]:
        """Yield the samples (READ_SAMPLE) in source order. The table sizes do not depend on the parts."""
        table = READ_SAMPLE.empty_table().select(columns)
        for number in range(self._count):
            part = open_parquet(self._path(number, ".parquet")).read(list(columns))
            table = pa.concat_tables([table, part])
            for _ in range(table.num_rows // PART_ROWS):
                yield table.slice(0, PART_ROWS).combine_chunks()
                table = table.slice(PART_ROWS)
        yield table.combine_chunks()

    def _read_record(self, number: int) -> dict[str, Any] | None:
        """Return the record of a part, or None if the part is missing or unusable."""
        try:
            record = read_json(self._path(number, ".json"))
            sha256 = file_digest(self._path(number, ".parquet"))
            is_valid = record["key"] == self.key and record["sha256"] == sha256
            if not is_valid or record["rows"] <= self.num_rows:
                return None
            samples = open_parquet(self._path(number, ".parquet")).read(["sample_id", POSITION, IS_COPY])
            ids = without_copies(samples)["sample_id"].to_pylist()
            return None if self.store.find_missing(ids) else record
        except (OSError, ValueError, LookupError, TypeError, SynthError):
            return None

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:05d}{suffix}"


def describe_rejected(shard: DatasetDir) -> Iterator[str]:
    """Yield a message for each rejection reason, with the number of rows and details of the first rows."""
    table = read_table(shard.step_file("read", "rejected"))
    counts = [(row["values"], row["counts"]) for row in table["reason"].value_counts().to_pylist()]
    for reason, count in sorted(counts, key=lambda item: (-item[1], item[0])):
        rows = table.filter(pc.equal(table["reason"], reason)).slice(0, NAMED_ROWS + 1).to_pylist()
        names = first_names([row["source_row"] for row in rows])
        if reason == REPEATED:
            some = f"{count:,} rows have" if count > 1 else "1 row has"
            yield f"read: {some} the same image as an earlier row, which gets their texts ({names})"
            continue
        if reason not in _REJECTED_FOR_ANOTHER_IMAGE:
            names = first_names([f"{row['source_row']}: {row['detail']}" for row in rows])
        advice = f": {ADVICE[reason]}" if reason in _ALWAYS_ADVISED else ""
        yield f"read: {count:,} {reason.replace('_', ' ')} ({names}){advice}"
