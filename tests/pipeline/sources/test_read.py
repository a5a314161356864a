"""The read step: a stopped run resumes, and an unchanged source is not read again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir, sample_batches
from pipeline.dataset.images import ImageStore
from pipeline.errors import SourceError
from pipeline.sources import open_source
from pipeline.sources import read as read_step
from pipeline.sources.read import READ_SETTINGS, SourceReader
from pipeline.storage.files import read_table, write_table
from pipeline.tables import SOURCE_REJECTED
from pipeline.types import Rejected, Sample, Source
from tests.media import encoded
from tests.notes import Notes
from tests.pipeline.images import test_similarity

# These settings affect the key indirectly, for example by digests of files.
KEYED_OTHERWISE = ["limit", "seed", "exclude", "captions", "human_texts", "dedupe"]
LATER_SETTINGS = (
    "title drop_context tasks custom_tasks models task_models engine model base_url generate server filter "
    "verify select balance split"
)
FILES = ("kept", "rejected", "image_groups", "near_duplicates", "exclusions")


@cache
def photo(number: int, size: tuple[int, int] = (160, 120)) -> bytes:
    """Return a JPEG of a photo; other sizes are near-duplicates."""
    return encoded(test_similarity.photo(number).resize(size), "JPEG")


def fill(folder: Path, count: int = 40) -> None:
    """Write photos with copies, near-duplicates of another size, and invalid files."""
    for number in range(count):
        data = photo(number)
        if number % 9 == 4:
            data = photo(number - 3)
        elif number % 11 == 5:
            data = photo(number - 2, (200, 150))
        elif number % 10 == 7:
            data = b"no image"
        (folder / f"{number:03d}.jpg").write_bytes(data)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of photos that are read in parts of four rows."""
    monkeypatch.setattr(read_step, "PART_ROWS", 4)
    (tmp_path / "photos").mkdir()
    fill(tmp_path / "photos")
    return tmp_path / "photos"


def settings(photos: Path, **more: Any) -> Config:
    return resolve(source=f"folder:{photos}", **more)


class Reading:
    """Reads a source into a dataset. Records messages, and the row at which each read starts."""

    def __init__(self, dataset: Path, config: Config, *, stop_at: int | None = None) -> None:
        self.starts: list[int] = []
        self.notes = Notes()
        source = open_source(config)
        opened = replace(source, read=lambda start: self._rows(source, start, stop_at))
        self.reader = SourceReader(DatasetDir(dataset), config, opened, self.notes)
        self.reader.read(config.limit)

    def _rows(self, source: Source, start: int, stop_at: int | None) -> Iterator[Sample | Rejected]:
        self.starts.append(start)
        for number, row in enumerate(source.read(start), start):
            if number == stop_at:
                raise SourceError("the connection is lost", hint="run the same command")
            yield row


def contents(dataset: Path) -> dict[str, Any]:
    paths = {name: DatasetDir(dataset).step_file("read", name) for name in FILES}
    return {name: path.read_bytes() if path.exists() else b"" for name, path in paths.items()}


def images(dataset: Path) -> list[tuple[str, tuple[bytes, ...]]]:
    batches = sample_batches(DatasetDir(dataset))
    return [pair for batch in batches for pair in zip(batch.ids, batch.read_images(), strict=True)]


def rows(dataset: Path, which: str) -> list[dict[str, Any]]:
    path = DatasetDir(dataset).step_file("read", which)
    return list(read_table(path).to_pylist()) if path.exists() else []


def test_every_setting_is_listed_by_its_effect_on_reading() -> None:
    settings = [*READ_SETTINGS, *KEYED_OTHERWISE, *LATER_SETTINGS.split()]
    assert sorted(settings) == sorted(Config.model_fields)


@pytest.mark.parametrize(
    ("more", "stop_at"), [*(({"human_texts": "keep"}, stop) for stop in (1, 9, 39)), ({"limit": 13}, 14)]
)
def test_interrupted_reading_resumes_and_gives_the_same_bytes(
    photos: Path, tmp_path: Path, more: dict[str, Any], stop_at: int
) -> None:
    config = settings(photos, **more)
    Reading(tmp_path / "whole", config)
    with pytest.raises(SourceError, match="the connection is lost"):
        Reading(tmp_path / "cut", config, stop_at=stop_at)
    again = Reading(tmp_path / "cut", config)
    assert again.starts == [stop_at - 1]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert any("resumes after" in text for text in again.notes.texts)
    assert images(tmp_path / "cut") == images(tmp_path / "whole")
    near = [row["sample_id"] for row in rows(tmp_path / "whole", "near_duplicates")]
    assert near and not ImageStore(tmp_path / "cut").find_missing(near)
    rejected = rows(tmp_path / "whole", "rejected")
    reasons = {row["reason"] for row in rejected}
    assert reasons == {"duplicate_image", "near_duplicate_image", "unreadable_image"}
    repeated = {row["detail"] for row in rejected if row["reason"] == "near_duplicate_image"}
    assert repeated <= {row["sample_id"] for row in rows(tmp_path / "whole", "kept")}


class InterruptedBytes(bytes):
    """Image bytes whose size cannot be read, because the user presses Ctrl-C."""

    def __len__(self) -> int:
        raise KeyboardInterrupt


class Interrupted(Reading):
    """A reading that is interrupted while row 9 is added to a part."""

    def _rows(self, source: Source, start: int, stop_at: int | None) -> Iterator[Sample | Rejected]:
        for number, row in enumerate(super()._rows(source, start, stop_at), start):
            if number == 9 and isinstance(row, Sample):
                row = replace(row, images=tuple(map(InterruptedBytes, row.images)))
            yield row


def test_row_being_added_during_an_interrupt_is_recorded_once(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tmp_path / "d", settings(photos))
    assert Reading(tmp_path / "d", settings(photos)).starts == [8]
    Reading(tmp_path / "whole", settings(photos))
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_unchanged_source_is_not_read_again(photos: Path, tmp_path: Path) -> None:
    Reading(tmp_path / "d", settings(photos))
    before = contents(tmp_path / "d")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*.*")}
    again = Reading(tmp_path / "d", settings(photos, generate={"caption_styles": ["alt"]}, title="Bowls"))
    assert again.starts == []
    assert again.notes.texts[0] == "read: 33 images were read by an earlier run and are not read again"
    assert contents(tmp_path / "d") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*.*")} == written


@pytest.mark.parametrize(
    ("first", "second", "starts"),
    [
        ({}, {"license": "cc-by-4.0"}, [0]),
        ({}, {"dedupe": {"images": "none"}}, [0]),
        ({}, {"human_texts": "keep"}, [0]),
        ({}, {"limit": 10}, [39]),  # only the last row is read again
        ({"limit": 10}, {"limit": 10}, []),
        ({"limit": 10}, {}, [11]),
    ],
)
def test_reading_after_changed_settings_equals_a_new_reading(
    photos: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], starts: list[int]
) -> None:
    Reading(tmp_path / "d", settings(photos, **first))
    assert Reading(tmp_path / "d", settings(photos, **second)).starts == starts
    Reading(tmp_path / "new", settings(photos, **second))
    assert all(rows(tmp_path / "d", name) == rows(tmp_path / "new", name) for name in FILES)
    assert images(tmp_path / "d") == images(tmp_path / "new")


def test_changed_file_of_source_or_step_is_read_again(photos: Path, tmp_path: Path) -> None:
    Reading(tmp_path / "d", settings(photos))
    whole = contents(tmp_path / "d")
    for name in FILES:
        path = DatasetDir(tmp_path / "d").step_file("read", name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        starts = [] if name == "exclusions" else [39]  # only the last row is read again
        assert Reading(tmp_path / "d", settings(photos)).starts == starts, name
        path.unlink()
        assert Reading(tmp_path / "d", settings(photos)).starts == starts, name
        assert contents(tmp_path / "d") == whole
    (photos / "001.jpg").write_bytes(photo(99))
    assert Reading(tmp_path / "d", settings(photos)).starts == [0]
    config = settings(photos, captions=[str(tmp_path / "captions.jsonl")])
    for text in ("A bowl.", "Two bowls."):
        (tmp_path / "captions.jsonl").write_text(f'{{"file_name": "001.jpg", "text": "{text}"}}')
        assert [Reading(tmp_path / "d", config).starts for _ in range(2)] == [[0], []]


def test_damaged_or_outdated_part_of_an_interrupted_reading_is_read_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reading(tmp_path / "whole", settings(photos))
    with pytest.raises(SourceError, match="the connection is lost"):
        Reading(tmp_path / "d", settings(photos), stop_at=20)
    (tmp_path / "d/steps/read/parts/00002.json").write_text('{"key": 1')
    assert Reading(tmp_path / "d", settings(photos)).starts == [7]  # the last row that is intact
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")
    with pytest.raises(SourceError, match="the connection is lost"):
        Reading(tmp_path / "e", settings(photos), stop_at=20)
    assert Reading(tmp_path / "e", settings(photos, license="mit")).starts == [0]
    monkeypatch.setattr("pipeline.sources.folder.digest", lambda _: "unchanged")
    with pytest.raises(SourceError, match="the connection is lost"):
        Reading(tmp_path / "f", settings(photos), stop_at=20)
    (photos / "000a.jpg").write_bytes(photo(99))  # row 19 has changed, so all rows are read again
    assert Reading(tmp_path / "f", settings(photos)).starts == [19, 0]


def test_source_without_rows_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    config = resolve(source=f"parquet:{tmp_path / 'empty.parquet'}")
    reader = SourceReader(DatasetDir(tmp_path / "d"), config, open_source(config), Notes())
    with pytest.raises(SourceError, match=r"no image of .* can be used; it is empty"):
        reader.read(None)


def test_source_without_revision_is_read_each_time(photos: Path, tmp_path: Path) -> None:
    config = settings(photos)
    source = replace(open_source(config), revision="")
    for _ in range(2):
        notes = Notes()
        reader = SourceReader(DatasetDir(tmp_path / "d"), config, source, notes)
        reader.read(None)
        assert not any("earlier run" in text for text in notes.texts)


@pytest.fixture
def others(tmp_path: Path) -> Path:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/a.jpg").write_bytes(photo(2))
    return tmp_path / "others"


def banned(dataset: Path) -> list[str]:
    return [row["source_row"] for row in rows(dataset, "rejected") if row["reason"] == "banned_image"]


def test_unreadable_excluded_images_are_retried(
    photos: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The revision of the source stays the same, as if decoding had only timed out.
    monkeypatch.setattr("pipeline.sources.folder.digest_or_fault", lambda *_: "sha256")
    (others / "b.jpg").write_bytes(b"no image")
    config = settings(photos, exclude=[f"folder:{others}"])
    for starts in ([0], [39]):  # the second run reads only the last row
        reading = Reading(tmp_path / "d", config)
        assert any("1 rows could not be read, and were not excluded" in text for text in reading.notes.texts)
        assert (reading.starts, banned(tmp_path / "d")) == (starts, ["002.jpg"])
    (others / "b.jpg").write_bytes(photo(3))
    assert Reading(tmp_path / "d", config).starts == [0]
    assert banned(tmp_path / "d") == ["002.jpg", "003.jpg", "005.jpg"]
    assert Reading(tmp_path / "d", config).starts == []


def test_damaged_record_of_a_finished_reading_is_written_again(
    photos: Path, others: Path, tmp_path: Path
) -> None:
    config = settings(photos, exclude=[f"folder:{others}"])
    Reading(tmp_path / "d", config)
    for name, key in (("done", "source"), ("done", "result"), ("exclusions", "described")):
        path = tmp_path / f"d/steps/read/{name}.json"
        record = json.loads(path.read_text())
        for value in (None, {"never": 1}, [1]):
            path.write_text(json.dumps(record | {key: value}))
            Reading(tmp_path / "d", config)
            assert json.loads(path.read_text()) == record


@pytest.mark.parametrize(
    ("reason", "advice"),
    [("too_slow", "on a larger machine"), ("near_duplicate_image", "dedupe.images: graphics"), ("empty", "")],
)
def test_rejections_are_reported_with_advice(tmp_path: Path, reason: str, advice: str) -> None:
    table = pa.Table.from_pylist([{"source_row": "a.jpg", "reason": reason, "detail": "b"}], SOURCE_REJECTED)
    write_table(DatasetDir(tmp_path).step_file("read", "rejected"), [table], SOURCE_REJECTED)
    (message,) = read_step.describe_rejected(DatasetDir(tmp_path))
    assert message.startswith(f"read: 1 {reason.replace('_', ' ')} (a.jpg") and advice in message
    assert bool(advice) == bool(message.partition(")")[2])


def test_excluded_images_are_read_once(
    photos: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(photos, exclude=[f"folder:{others}"])
    with pytest.raises(SourceError, match="the connection is lost"):
        Reading(tmp_path / "d", config, stop_at=20)
    monkeypatch.setattr(read_step, "write_exclusions", lambda *_: pytest.fail("they are read again"))
    Reading(tmp_path / "d", config)
    assert Reading(tmp_path / "d", config).starts == []
    assert banned(tmp_path / "d") == ["002.jpg"]
    monkeypatch.undo()
    (others / "a.jpg").write_bytes(photo(3))
    Reading(tmp_path / "d", config)
    assert banned(tmp_path / "d") == ["003.jpg", "005.jpg"]  # 005.jpg is 003.jpg in another size


def test_failed_reading_with_other_settings_keeps_the_images_of_the_last_reading(
    photos: Path, tmp_path: Path
) -> None:
    Reading(tmp_path / "d", settings(photos))
    before = images(tmp_path / "d")
    with pytest.raises(SourceError, match="the connection is lost"):
        Reading(tmp_path / "d", settings(photos, license="mit"), stop_at=1)
    assert images(tmp_path / "d") == before and before
