"""`pipeline.load`: a version as `datasets` has it, with its images."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Features, Image, List

import pipeline
from pipeline.dataset.directory import write_tags
from pipeline.dataset.pixels import images_of_dataset, join_images
from pipeline.errors import ConfigError, StoreError
from pipeline.images.decode import deck_id, image_id
from tests.scene_data import make_version, pulled, scene_samples, true_captions

SAMPLES = scene_samples(20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_local_and_pulled_version_are_loaded_with_images(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", SAMPLES)
    make_version(tmp_path / "d", SAMPLES[:12])
    write_tags(tmp_path / "d", {"paper": version.name})
    published = pulled(version, tmp_path / "home" / "x")
    for name in (f"{tmp_path}/d@{version.name}", f"{tmp_path}/d@paper", published.path):
        loaded = pipeline.load(name)
        assert loaded.num_rows == {split: count for split, count in version.manifest["rows"].items() if count}
        for split, rows in loaded.items():
            assert isinstance(rows.features, Features) and rows.features["image"] == Image()
            expected = version.read(split).to_pylist()
            assert rows.cast_column("image", Image(decode=False)).to_list() == expected
            assert rows[0]["image"].size == (expected[0]["width_px"], expected[0]["height_px"])
    assert sum(pipeline.load(tmp_path / "d").num_rows.values()) == 12


def test_pages_are_lists_of_images(tmp_path: Path) -> None:
    pages = tuple(sample.images[0] for sample in SAMPLES[:3])
    deck = replace(SAMPLES[0], id=deck_id([image_id(page) for page in pages]), images=pages)
    captions = true_captions(SAMPLES[:1])
    ids = captions.schema.get_field_index("sample_id")
    captions = captions.set_column(ids, "sample_id", [[deck.id] * captions.num_rows])
    make_version(tmp_path, [deck], captions, decks=True)
    (rows,) = pipeline.load(tmp_path).values()
    assert rows.features["pages"] == List(Image()) and len(rows[0]["pages"]) == 3


def test_missing_images_are_an_error_with_a_hint(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "d", SAMPLES)
    texts = pulled(version, tmp_path / "home" / "texts", images=False)
    assert "image" not in pipeline.load(texts.path)["train"].column_names
    join_images(texts, images_of_dataset(version.path))
    assert "image" in pipeline.load(texts.path)["train"].column_names
    for path in version.store.paths():
        path.unlink()
    with pytest.raises(StoreError, match="the images of 20 samples are not in") as raised:
        pipeline.load(tmp_path / "d")
    assert "bring back" in raised.value.hint


def test_missing_package_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets") as raised:
        pipeline.load(tmp_path)
    assert "pip install" in raised.value.hint


def test_import_of_the_package_loads_nothing_heavy() -> None:
    code = "import sys, pipeline; print([m for m in ('torch', 'datasets', 'pyarrow', 'duckdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        pipeline.lod  # noqa: B018
