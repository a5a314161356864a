"""A small version, CLIP and language model, made once per module."""

import pytest

from pipeline.dataset.version import Version
from tests.scene_data import make_version, scene_samples
from tests.trainer.tiny_models import save_clip, save_language_model


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("data"), scene_samples(60))[0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_language_model(tmp_path_factory.mktemp("lm"), "qwen3")
