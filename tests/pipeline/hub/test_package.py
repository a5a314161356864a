"""Tests of packages: pixels are included only if their license allows it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.card import render_model_card
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import describe_data
from pipeline.dataset.version import Version
from pipeline.errors import PushError, StoreError
from pipeline.hub.package import (
    CHECKPOINT_FILES,
    Package,
    base_models,
    build_checkpoint_package,
    build_package,
)
from pipeline.storage.untrusted import UnsafeFileError
from pipeline.tables import Extras
from tests.scene_data import SCORED, make_version, pulled, scene_samples, scored_captions, true_captions

REPO = "me/scenes"


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("free"), scene_samples(20))[0]


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Version:
    samples = [replace(sample, license="flickr-terms") for sample in scene_samples(20)]
    scored, folder = scored_captions(scene_samples(20)), tmp_path_factory.mktemp("held")
    return make_version(folder, samples, scored, extras=Extras(SCORED))[0]


def test_package_with_free_license_has_pixels_and_is_reproducible(free: Version, tmp_path: Path) -> None:
    again, _ = make_version(tmp_path / "again", scene_samples(20))
    with build_package(free, REPO) as package, build_package(again, REPO) as other:
        assert package.manifest == other.manifest and package.manifest["digest"] == free.manifest["digest"]
        assert package.manifest["reader_columns"] == ["text", "messages"]
        assert not {"pixels", "images"} & {*package.manifest}
        path = package.files["train-00000.parquet"]
        assert isinstance(path, Path)
        rows = pq.read_table(path)
        assert rows.drop_columns(["text", "messages"]).to_pylist() == free.read("train").to_pylist()
        assert package.file_sizes()["manifest.json"] == len(package.files["manifest.json"])  # type: ignore[arg-type]
    assert not path.exists()


def test_pulled_version_is_packaged_unchanged(free: Version, tmp_path: Path) -> None:
    version = pulled(free, tmp_path / "home" / "pulled")
    with build_package(version, REPO) as package:
        assert package.manifest == version.manifest
        assert package.files["train-00000.parquet"] == version.path / "train-00000.parquet"


@pytest.mark.parametrize("images", [None, False])
def test_package_with_restricted_license_has_no_pixels(restricted: Version, images: Any) -> None:
    with build_package(restricted, REPO, images=images) as package:
        path = package.files["train-00000.parquet"]
        assert isinstance(path, Path)
        packaged = pq.read_table(path)
        assert packaged.column_names == package.manifest["columns"]
        original = restricted.read("train").drop_columns(["image"])
        assert packaged.to_pylist() == original.to_pylist()
        assert "The images are not included" in str(package.files["README.md"])
        assert json.loads(package.files["manifest.json"])["pixels"] == "left out"  # type: ignore[arg-type]
        assert package.manifest["digest"] == restricted.manifest["digest"]


@pytest.mark.parametrize("images", [None, False])
def test_restricted_pixels_in_a_version_are_left_out(
    restricted: Version, tmp_path: Path, images: Any
) -> None:
    whole = pulled(restricted, tmp_path / "home" / "x", images=True, acknowledged=["flickr-terms"])
    assert whole.holds_pixels
    with (
        build_package(whole, REPO, images=images) as package,
        build_package(restricted, REPO, images=False) as original,
    ):
        for key in ("columns", "features", "pixels", "pixel_columns", "digest", "rows"):
            assert package.manifest[key] == original.manifest[key]
        assert "reader_columns" not in package.manifest
        tables = [pq.read_table(part.files["train-00000.parquet"]) for part in (package, original)]
        assert tables[0].equals(tables[1])


def test_restricted_pixels_need_an_acknowledged_license_and_the_package_records_its_name(
    restricted: Version,
) -> None:
    refusal = pytest.raises(PushError, match="flickr-terms may not be redistributed")
    with refusal as refused, build_package(restricted, REPO, images=True):
        pass
    assert "--acknowledge flickr-terms" in refused.value.hint
    with build_package(restricted, REPO, images=True, acknowledged=["flickr-terms"]) as package:
        assert "image" in pq.read_schema(package.files["train-00000.parquet"]).names
        assert package.manifest["acknowledged"] == ["flickr-terms"]
        assert r"Pixels under flickr\-terms are included" in str(package.files["README.md"], "utf-8")  # type: ignore[arg-type]


def test_package_records_unknown_license(free: Version, tmp_path: Path) -> None:
    samples = [replace(sample, license="unknown") for sample in scene_samples(5)]
    version, _ = make_version(tmp_path, samples, true_captions(samples))
    stated = {None: True, "Unknown": True, "unknwon": True, "cc-by-4.0": False}
    cases = [(False, *case) for case in stated.items()] + [(None, None, True)]
    for images, license_name, is_unknown in cases:
        fields = describe_data(license_name, None, None)
        with build_package(version, REPO, images=images, stated=fields) as package:
            assert package.has_unknown_license == is_unknown
    with build_package(free, REPO) as package:
        assert not package.has_unknown_license


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("versions/v1.0.0/train-*", r"train-00000\.parquet does not match its manifest"),
        ("images/*", r"5 images of .* are not in"),
    ],
)
def test_version_with_missing_or_changed_file_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    version, _ = make_version(tmp_path, scene_samples(5))
    (file,) = tmp_path.glob(name)
    for damaged in (file.read_bytes()[:-1] + b"?", None):
        file.write_bytes(damaged) if damaged else file.unlink()
        with pytest.raises(StoreError, match=problem), build_package(version, REPO):
            pass


def test_disk_error_while_packing_has_a_hint(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(5))
    (tmp_path / ".push").touch()
    with pytest.raises(StoreError, match=r"\.push: a file exists") as refused, build_package(version, REPO):
        pass
    assert refused.value.hint


def pack_checkpoint(folder: Path, values: dict[str, Any]) -> Package:
    """Write the files of a captioner, with `values` by name, and return their package."""
    for name in CHECKPOINT_FILES:
        if not (folder / name).is_symlink():
            (folder / name).write_text(json.dumps(values.get(name.removesuffix(".json"), {})))
    return build_checkpoint_package(folder, "me/captioner", lambda _: {}, {})


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_checkpoint_file_that_links_outside_is_not_packaged(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / name).symlink_to("../secret")
    with pytest.raises(UnsafeFileError, match="a link to a file outside"):
        pack_checkpoint(folder, {})


def test_interrupted_training_is_refused_with_the_resume_command_as_hint(tmp_path: Path) -> None:
    (tmp_path / "resume.pt").touch()
    with pytest.raises(PushError, match="not a finished training run") as refused:
        build_checkpoint_package(tmp_path, "me/captioner", lambda _: {}, {})
    assert f"`synth train --resume --out {tmp_path}`" in refused.value.hint


def test_card_of_a_captioner_names_the_repository_of_its_own_data(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(4))
    DatasetDir(tmp_path).record_push(version.name, "me/scenes", "c")
    folder = tmp_path / "checkpoints" / "one"
    folder.mkdir(parents=True)
    for digest, is_named in ((version.manifest["digest"], True), ("of other data", False)):
        values = captioner_of({"source": {"name": "scenes"}, "version": version.name, "digest": digest})
        package = pack_checkpoint(folder, values)
        assert ("me/scenes" in str(package.files["README.md"])) == is_named


def captioner_of(data: dict[str, Any]) -> dict[str, Any]:
    scores: dict[str, Any] = {"scores": {"cider_d": 1.0}, "shuffled_scores": {"cider_d": 0.5}}
    scores |= {"shown": [{"caption": "a", "references": ["b"]}], "settings": {"steps": 70}}
    scores |= {"parameters": 7, "images": 3, "split": "test", "style": "brief", "against": "references"}
    config = {"prompts": [["synthetic", "brief"]], "data": data}
    train = {"encoder": "vit", "decoder": "scratch", "steps": 0}
    return {"config": config, "train": train, "metrics": scores}


@pytest.mark.parametrize(
    ("init", "published"), [("private/folders/first", "first"), ("ORG/first", "ORG/first"), ("own/a", "a")]
)
def test_card_of_a_captioner_has_computed_settings_and_no_local_folders(
    init: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own/a").mkdir(parents=True)
    values = captioner_of({"source": {"name": "scenes"}, "version": "v1.0.0", "digest": "d"})
    values["train"]["init"] = init
    package = pack_checkpoint(tmp_path, values)
    card, train = (package.files[name] for name in ("README.md", "train.json"))
    assert isinstance(card, bytes) and b'"steps": 70' in card
    assert isinstance(train, bytes) and json.loads(train)["init"] == published
    assert f'"init": "{published}"'.encode() in card


def test_card_of_a_continued_captioner_has_the_data_of_all_trainings() -> None:
    def render(data: dict[str, Any]) -> str:
        return render_model_card(captioner_of(data) | {"digest": "d"}, "me/captioner", None)

    first = {"source": {"name": "scenes"}, "version": "v1.0.0", "digest": "aaa", "texts": "synthetic"}
    second = {**first, "source": {"name": "folder"}, "texts": "human", "init": {"data": first}}
    third = {**second, "digest": "ccc", "init": {"data": second}}
    assert "images of one source" in render(first)
    card = render(third)
    assert card.count("- Data of an earlier training") == 2 and "scenes, version v1.0.0" in card
    assert "images of 2 sources" in card and "and on **machine-generated captions**" in card


def test_local_folder_with_the_name_of_a_model_is_not_listed_as_a_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enc" / "vit").mkdir(parents=True)
    ids = {"vit": "google/vit", "qwen3": "Qwen/Qwen3"}
    assert base_models({"encoder": "enc/vit", "decoder": "qwen3"}, ids) == ["Qwen/Qwen3"]
    assert base_models({"encoder": "vit", "decoder": "me/own"}, ids) == ["google/vit", "me/own"]
    assert base_models({"encoder": "/gone/vit", "decoder": "~/qwen3"}, ids) == []
