"""Tests of building rows from samples and annotations."""

import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.dataset.version import Version
from pipeline.errors import TableError
from pipeline.tables import REVIEWED, SPLITS, Extras
from pipeline.types import ReferenceQA
from tests.scene_data import (
    SCORED,
    make_version,
    publish_rows,
    sample_table,
    scene_samples,
    scored_captions,
    true_captions,
)


def test_personal_data_in_source_texts_is_redacted(tmp_path: Path) -> None:
    first, *others = scene_samples(6)
    answers = ("yes", "+49 30 123456")
    private = ReferenceQA(question="Is it mail@example.org?", answers=answers, answer_type="other")
    public = ReferenceQA(question="Red?", answers=("no",), answer_type="yes/no")
    captions = ("Call +49 30 123456 or mail@example.org.", "Six red rings.")
    first = replace(first, references=captions, reference_qa=(private, public))
    samples = [first, *(replace(sample, reference_qa=(public,)) for sample in others)]
    version, _ = make_version(tmp_path, samples, true_captions(samples))
    batches = version.batches(["sample_id", "references", "reference_qa"])
    rows = {row["sample_id"]: row for _, batch in batches for row in batch.to_pylist()}
    questions = {n: [(pair["question"], pair["answers"]) for pair in rows[n]["reference_qa"]] for n in rows}
    assert rows[first.id]["references"] == ["Call [phone] or [email].", "Six red rings."]
    assert questions[first.id] == [("Is it [email]?", ["yes", "[phone]"]), ("Red?", ["no"])]
    for sample in others:
        assert rows[sample.id]["references"] == list(sample.references)
        assert questions[sample.id] == [("Red?", ["no"])]


def test_scores_of_edited_text_are_null(tmp_path: Path) -> None:
    samples = scene_samples(2)
    captions = scored_captions(samples)
    edited = pa.array([REVIEWED, *captions["prompt_id"].to_pylist()[1:]])
    captions = captions.append_column("final_prompt_id", edited)
    version, _ = make_version(tmp_path, samples, captions, extras=Extras(SCORED))
    rows = [row for split in SPLITS if version.shards(split) for row in version.read(split).to_pylist()]
    written = [caption for row in rows for caption in row["captions"]]
    scores = {caption["prompt_id"] == REVIEWED: caption["coverage"] for caption in written}
    assert scores == {True: None, False: 0.5}


def test_batch_size_does_not_change_version_and_wrong_sample_order_is_refused(tmp_path: Path) -> None:
    samples = scene_samples(9)
    annotations, batches = true_captions(samples), sample_table(samples).to_batches(max_chunksize=4)
    whole, _ = make_version(tmp_path / "whole", samples)
    for size in (1, 5, 100):
        cuts = [annotations.slice(start, size) for start in range(0, annotations.num_rows, size)]
        version, _ = publish_rows(tmp_path / f"{size}", cuts, batches)
        assert version.manifest["digest"] == whole.manifest["digest"]
        assert version.manifest["files"] == whole.manifest["files"]
    backwards = annotations.take(list(range(annotations.num_rows - 1, -1, -1)))
    with pytest.raises(TableError, match="different orders"):
        publish_rows(tmp_path / "backwards", [backwards], batches)


def test_digest_ignores_order_of_images_but_not_of_captions(tmp_path: Path) -> None:
    samples = scene_samples(40)
    shuffled = random.Random(5).sample(samples, len(samples))
    by_style = true_captions(shuffled).sort_by([("style", "descending"), ("sample_id", "ascending")])
    in_order, _ = make_version(tmp_path / "one", samples)
    reordered, _ = make_version(tmp_path / "other", shuffled, by_style)
    assert in_order.manifest["digest"] != reordered.manifest["digest"]
    assert {*sample_ids(in_order)} == {*sample_ids(reordered)}
    by_sample, _ = make_version(tmp_path / "again", shuffled)
    assert by_sample.manifest["digest"] == in_order.manifest["digest"]
    assert sample_ids(by_sample) != sample_ids(in_order)


def sample_ids(version: Version) -> list[str]:
    return list(version.read("train", ["sample_id"])["sample_id"].to_pylist())


def test_single_page_deck_is_stored_in_pages_column_without_image_column(tmp_path: Path) -> None:
    samples = scene_samples(4)
    two_pages = replace(samples[0], images=(samples[0].images[0], samples[1].images[0]))
    decks = [two_pages, *samples[2:]]
    captions = true_captions([samples[0], *samples[2:]])
    batches = sample_table(decks).to_batches()
    version, _ = publish_rows(tmp_path, [captions], batches, source="decks", decks=True)
    assert "image" not in version.manifest["columns"]
    rows = [row for _, batch in version.batches(version.manifest["columns"]) for row in batch.to_pylist()]
    assert sorted(len(row["pages"]) for row in rows) == [1, 1, 2]
    pages = {row["sample_id"]: [page["bytes"] for page in row["pages"]] for row in rows}
    assert pages == {sample.id: list(sample.images) for sample in decks}
