"""Tests of joining a version without pixels with its images by sample_id."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, StoreError
from pipeline.images.decode import deck_id
from pipeline.sources.join import Images, find_joined, join_images, with_pixels
from pipeline.tables import Extras
from pipeline.types import Sample
from tests.scene_data import SCORED, make_version, pulled, scene_samples, scored_captions, true_captions

SAMPLES = scene_samples(30)


@pytest.fixture
def whole(tmp_path: Path) -> Version:
    return make_version(tmp_path / "whole", SAMPLES, scored_captions(SAMPLES), extras=Extras(SCORED))[0]


@pytest.fixture
def texts(whole: Version, tmp_path: Path) -> Version:
    return pulled(whole, tmp_path / "home" / "texts", images=False)


def images_of(samples: list[Sample]) -> list[Images]:
    return [(sample.id, sample.images) for sample in samples]


def test_joined_images_complete_the_version(whole: Version, texts: Version) -> None:
    assert texts.lacks_pixels
    assert find_joined(texts) is None
    joined = join_images(texts, images_of(SAMPLES))
    assert find_joined(texts) == joined and joined.path == texts.path
    assert not joined.lacks_pixels
    assert joined.manifest["columns"] == whole.manifest["columns"]
    assert joined.manifest["digest"] == whole.manifest["digest"]
    for split in (split for split, count in whole.manifest["rows"].items() if count):
        by_id = [sorted(v.read(split).to_pylist(), key=lambda row: row["sample_id"]) for v in (joined, whole)]
        assert by_id[0] == by_id[1]


def test_missing_images_are_counted_and_joined_later(texts: Version) -> None:
    with pytest.raises(StoreError, match=r"4 of 30 images of v1\.0\.0 are missing") as refused:
        join_images(texts, images_of(SAMPLES[4:]))
    assert "the original, unchanged image files" in refused.value.hint
    assert find_joined(texts) is None
    joined = join_images(texts, images_of(SAMPLES[:4]))
    assert joined == find_joined(texts) and joined.read("train").num_rows == texts.manifest["rows"]["train"]


def test_images_are_joined_from_a_folder_of_files(texts: Version, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("no image")
    for number, sample in enumerate(SAMPLES):
        (tmp_path / "files" / f"{number}.png").write_bytes(sample.images[0])
    with pytest.raises(ConfigError, match="whole is a dataset"):
        with_pixels(texts, str(tmp_path / "whole"))
    joined = with_pixels(texts, str(tmp_path / "files"))
    assert joined == find_joined(texts) and joined.read("train").num_rows == texts.manifest["rows"]["train"]


def test_joined_deck_has_all_pages(tmp_path: Path) -> None:
    pages = [sample.images[0] for sample in SAMPLES[:4]]
    deck = replace(SAMPLES[0], id=deck_id([sample.id for sample in SAMPLES[:4]]), images=tuple(pages))
    captions = true_captions(SAMPLES[:1])
    ids = captions.schema.get_field_index("sample_id")
    captions = captions.set_column(ids, "sample_id", [[deck.id] * captions.num_rows])
    whole, _ = make_version(tmp_path / "whole", [deck], captions)
    texts = pulled(whole, tmp_path / "home" / "texts", images=False)
    joined = join_images(texts, [(deck.id, tuple(pages))])
    split = next(split for split, count in whole.manifest["rows"].items() if count)
    assert [page["bytes"] for page in joined.read(split)["pages"].to_pylist()[0]] == pages
