"""Tests of joining a version without pixels with its images by sample_id."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.dataset.pixels import find_joined, images_of_dataset, images_of_files, join_images, lacks_pixels
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from pipeline.images.decode import deck_id
from pipeline.storage.files import write_text
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


def files(folder: Path, samples: list[Sample]) -> Path:
    for number, sample in enumerate(samples):
        path = folder / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.images[0])
    write_text(folder / "notes.txt", "no image")
    return folder


def test_joined_image_files_complete_the_version(whole: Version, texts: Version, tmp_path: Path) -> None:
    assert lacks_pixels(texts)
    assert find_joined(texts) is None
    joined = join_images(texts, images_of_files(files(tmp_path / "files", SAMPLES)))
    assert find_joined(texts) == joined and joined.path == texts.path
    assert not lacks_pixels(joined)
    assert joined.manifest["columns"] == whole.manifest["columns"]
    assert joined.manifest["digest"] == whole.manifest["digest"]
    for split in (split for split, count in whole.manifest["rows"].items() if count):
        by_id = [sorted(v.read(split).to_pylist(), key=lambda row: row["sample_id"]) for v in (joined, whole)]
        assert by_id[0] == by_id[1]


def test_missing_images_are_counted_and_joined_from_other_folder(texts: Version, tmp_path: Path) -> None:
    images = images_of_files(files(tmp_path / "files", SAMPLES[4:]))
    with pytest.raises(StoreError, match=r"4 of 30 images of v1\.0\.0 are missing") as refused:
        join_images(texts, images)
    assert "the original, unchanged image files" in refused.value.hint
    assert find_joined(texts) is None
    joined = join_images(texts, images_of_files(files(tmp_path / "others", SAMPLES[:4])))
    assert joined == find_joined(texts) and joined.read("train").num_rows == texts.manifest["rows"]["train"]


def test_decks_are_joined_from_version_with_pages(tmp_path: Path) -> None:
    pages = [sample.images[0] for sample in SAMPLES[:4]]
    deck = replace(SAMPLES[0], id=deck_id([sample.id for sample in SAMPLES[:4]]), images=tuple(pages))
    captions = true_captions(SAMPLES[:1])
    ids = captions.schema.get_field_index("sample_id")
    captions = captions.set_column(ids, "sample_id", [[deck.id] * captions.num_rows])
    whole, _ = make_version(tmp_path / "whole", [deck], captions)
    texts = pulled(whole, tmp_path / "home" / "texts", images=False)
    joined = join_images(texts, images_of_dataset(whole.path))
    split = next(split for split, count in whole.manifest["rows"].items() if count)
    assert [page["bytes"] for page in joined.read(split)["pages"].to_pylist()[0]] == pages
