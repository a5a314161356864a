"""Features: cached states equal computed states to the bit, and an interrupted build resumes."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL.Image import Image

from tests.scene_data import make_version, scene_samples
from tests.trainer.tiny_models import save_clip, save_vit
from trainer import features
from trainer.data import Example, examples_in
from trainer.features import OnlineFeatures, cache_features
from trainer.model.encoder import Encoder, load_encoder

CPU = torch.device("cpu")


def quiet(stage: str, done: int, total: int | None) -> None:
    pass


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return examples_in(make_version(tmp_path_factory.mktemp("data"), scene_samples(30))[0], "train")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(save_clip(tmp_path_factory.mktemp("clip")))


def test_cached_states_are_those_that_would_be_computed(encoder: Encoder, examples: list[Example], tmp_path: Path) -> None:
    cached = cache_features(encoder, examples, tmp_path, CPU, quiet)
    chosen = [examples[3], examples[0], examples[3]]
    assert torch.equal(cached(chosen), OnlineFeatures(encoder, CPU)(chosen))


def test_the_second_time_only_one_image_is_encoded(
    encoder: Encoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_features(encoder, examples, tmp_path, CPU, quiet)
    batch_sizes: list[int] = []
    encode = encoder.pixels

    def count(images: list[Image]) -> torch.Tensor:
        batch_sizes.append(len(images))
        return encode(images)

    monkeypatch.setattr(encoder, "pixels", count)
    second = cache_features(encoder, examples, tmp_path, CPU, quiet)
    assert batch_sizes == [1]  # for the shape
    assert torch.equal(second(examples), first(examples))


def test_states_that_an_earlier_release_computed_with_dropout_are_not_used(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_vit(tmp_path / "vit")
    encoder = load_encoder(str(tmp_path / "vit"))
    cache_features(encoder, examples, tmp_path / "states", CPU, quiet)
    assert len([*(tmp_path / "states").glob("*.bin")]) == 1
    monkeypatch.setattr(encoder, "is_random_in_training", lambda pixels: True)
    cache_features(encoder, examples, tmp_path / "states", CPU, quiet)
    assert len([*(tmp_path / "states").glob("*.bin")]) == 2


def test_a_build_that_was_cut_off_goes_on(
    encoder: Encoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH_IMAGES", 8)
    calls = itertools.count()

    def die(stage: str, done: int, total: int | None) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(encoder, examples, tmp_path, CPU, die)
    done: list[int] = []
    cached = cache_features(encoder, examples, tmp_path, CPU, lambda stage, images, total: done.append(images))
    assert done[0] == 24  # 16 were on the disk
    assert torch.equal(cached(examples), OnlineFeatures(encoder, CPU)(examples))


def test_other_weights_or_images_are_another_cache(encoder: Encoder, examples: list[Example], tmp_path: Path) -> None:
    cache_features(encoder, examples, tmp_path, CPU, quiet)
    cache_features(encoder, examples[1:], tmp_path, CPU, quiet)
    assert len(list(tmp_path.glob("*.bin"))) == 2


BUILD = """
import sys
from pathlib import Path
import torch
from pipeline.dataset.version import read_version
from trainer.data import examples_in
from trainer.features import OnlineFeatures, cache_features
from trainer.model.encoder import load_encoder
torch.set_num_threads(1)
examples, encoder = examples_in(read_version(Path(sys.argv[1])), "train"), load_encoder(sys.argv[2])
looked = []
states = cache_features(encoder, examples, Path(sys.argv[3]), torch.device("cpu"), lambda *_: looked.append(1))
assert torch.equal(states(examples), OnlineFeatures(encoder, torch.device("cpu"))(examples))
print(len(looked))
"""


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path / "data", scene_samples(30))
    arguments = [str(version.path), save_clip(tmp_path / "clip"), str(tmp_path / "features")]
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD, *arguments], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    built = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert built == ["0", "1"]
