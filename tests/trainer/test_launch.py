"""Planning a training: defaults depend on the data, and no other file is overwritten."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trainer.launch
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, StoreError, TrainError
from pipeline.progress import NullProgress
from pipeline.storage.files import write_json
from tests.scene_data import make_version, scene_samples
from trainer.config import TrainConfig, resolve
from trainer.launch import choose_encoder, open_version, plan_training, train

OPTIONS = {"encoder": "tiny-vit", "decoder": "scratch", "preset": None}


def plan(
    version: Version, out: Path | None = None, *, resume: bool = False, **options: object
) -> tuple[TrainConfig, Path]:
    return plan_training(version, OPTIONS | options, None, out, NullProgress().message, resume=resume)


def interrupt(folder: Path, config: TrainConfig) -> None:
    write_json(folder / "train.json", config.model_dump(mode="json"))
    (folder / "resume.pt").write_bytes(b"state")


def test_default_settings_and_folder_depend_on_the_data(version: Version) -> None:
    config, folder = plan(version)
    assert (config.preset, config.text_source) == ("scenes", "synthetic")
    assert folder == version.dataset_dir / "checkpoints" / "v1.0.0-tiny-vit-scratch"
    assert plan(version, text_source="human")[0].text_source == "human"


def test_photos_are_trained_longer_if_there_are_fewer(version: Version) -> None:
    def epochs(images: int, **options: Any) -> int:
        manifest = {**version.manifest, "rows": {**version.manifest["rows"], "train": images}}
        return plan(replace(version, manifest=manifest), preset="photos", **options)[0].epochs

    assert [epochs(images) for images in (1_000, 6_000, 100_000)] == [60, 10, 10]
    assert epochs(1_000, epochs=3) == 3


def test_files_of_other_programs_are_not_overwritten(version: Version, tmp_path: Path) -> None:
    for name in ("config.json", "photo.jpg"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ConfigError, match="has other files"):
            plan(version, folder)
    (tmp_path / "config" / "train.json").write_text('{"lr": 1}')
    for folder in (tmp_path / "config", version.dataset_dir, version.path):
        with pytest.raises(ConfigError, match="has other files"):
            plan(version, folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    assert plan(version, tmp_path / "empty")[1] == tmp_path / "empty"


def test_interrupted_training_resumes_unchanged_only_on_request(version: Version, tmp_path: Path) -> None:
    interrupt(tmp_path, resolve(None, **OPTIONS, seed=9, steps=3))
    with pytest.raises(ConfigError, match="has an interrupted training run") as refused:
        plan(version, tmp_path)
    assert "--resume" in refused.value.hint
    with DatasetDir(tmp_path).lock(), pytest.raises(StoreError, match="another process is writing to"):
        # A running training is not an interrupted one.
        plan(version, tmp_path)
    assert plan(version, tmp_path, resume=True)[0].seed == 9
    assert plan(version, tmp_path, resume=True, steps=5)[0].steps == 5
    default = plan(version)[1]
    interrupt(default, resolve(None, **OPTIONS, seed=3))
    assert plan(version, resume=True)[0].seed == 3
    shutil.rmtree(default.parent)


def test_data_is_opened_by_folder_version_or_name(version: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_version(version) is version
    assert open_version(version.dataset_dir) == open_version(f"{version.dataset_dir}@v1.0.0") == version
    monkeypatch.setattr(trainer.launch, "pull_version", {"me/scenes@v1.0.0": version}.__getitem__)
    assert open_version("me/scenes@v1.0.0") is version


def refuse(*_: object, **__: object) -> None:
    raise ConnectionError("offline")


def test_tiny_clip_is_the_offline_fallback_for_drawn_scenes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.launch, "snapshot_download", refuse)
    said: list[str] = []
    assert choose_encoder(said.append, is_drawn=True) == "tiny-clip" and len(said) == 1
    with pytest.raises(TrainError, match="clip-vit-base-patch32"):
        choose_encoder(said.append, is_drawn=False)


@pytest.mark.parametrize(
    ("factor", "model"), [("encoder", "clip"), ("encoder", "me/vit"), ("decoder", "qwen3")]
)
def test_model_that_cannot_be_downloaded_is_reported_before_a_folder_is_made(
    factor: str, model: str, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.launch, "snapshot_download", refuse)
    monkeypatch.setattr(trainer.launch, "plan_training", None)  # imports torch
    with pytest.raises(TrainError, match="does not answer: offline") as caught:
        train(version, TrainConfig.model_validate({factor: model}))
    assert f"--{factor} " in caught.value.hint
    with pytest.raises(TrainError, match=f"no {factor} ./nowhere: the folder does not exist"):
        train(version, TrainConfig.model_validate({factor: "./nowhere"}))
    assert not (version.dataset_dir / "checkpoints").exists()


def test_empty_split_is_reported_before_a_folder_is_made(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "data", scene_samples(1))
    with pytest.raises(StoreError, match="has no rows in its"):
        train(version, encoder="tiny-vit")
    assert not (version.dataset_dir / "checkpoints").exists()
