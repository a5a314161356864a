"""Engine choice: decided by the settings and by what this machine has, with the reason."""

import json
from pathlib import Path

import pytest

from pipeline.config import LARGE
from pipeline.config.files import resolve
from pipeline.digests import weights_revision
from pipeline.errors import EngineError
from pipeline.inference import engines
from pipeline.inference.engines import TINY_WEIGHTS, choose_engine, max_pixels, pick_engine
from tests.chat.server import ChatServer, running_chat


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    monkeypatch.setenv(engines.VLLM_PYTHON, "/opt/vllm/python")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    monkeypatch.delenv(engines.VLLM_PYTHON, raising=False)


def test_auto_takes_vllm_where_a_gpu_and_vllm_are_there(gpu: None) -> None:
    assert pick_engine(resolve(source="scenes")) == ("vllm", "a GPU and vLLM are here")


def test_auto_stays_in_this_process_elsewhere(no_gpu: None) -> None:
    choice = choose_engine(resolve(source="scenes"))
    assert (choice.name, choice.model, choice.revision) == ("embedded", "tiny", weights_revision(TINY_WEIGHTS))


def test_auto_takes_a_server_that_is_named(no_gpu: None) -> None:
    with running_chat(ChatServer(model="m@c0ffee")) as chat:
        choice = choose_engine(resolve(source="folder:x", base_url=[chat.url]))
    assert (choice.name, choice.model, choice.revision) == ("vllm", "m@c0ffee", "c0ffee")


def test_flags_that_may_change_a_reply_change_the_revision(no_gpu: None) -> None:
    def revision(*flags: str) -> str:
        return choose_engine(resolve(source="scenes", engine="vllm", server={"flags": flags})).revision

    assert revision("--max-num-seqs", "7", "--block-size=16") == revision() == weights_revision(TINY_WEIGHTS)
    assert len({revision(), revision("--quantization", "fp8"), revision("--quantization=awq")}) == 3


def test_flags_without_a_server_to_start_are_an_error(no_gpu: None) -> None:
    with pytest.raises(EngineError, match="no server is to be started"):
        choose_engine(resolve(source="scenes", server={"flags": ["--max-num-seqs", "7"]}))


def test_on_a_gpu_photos_go_to_the_large_model_and_scenes_to_the_tiny_one(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_hub_revision", lambda model: "c0ffee")
    photos, scenes = choose_engine(resolve(source="folder:x")), choose_engine(resolve(source="scenes"))
    assert (photos.model, photos.revision, scenes.model) == (LARGE, "c0ffee", "tiny")


def test_the_tiny_teacher_is_not_chosen_for_photos(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_hub_revision", lambda model: "c0ffee")
    assert choose_engine(resolve(source="folder:x")).model == LARGE
    with pytest.raises(EngineError, match="cannot describe folder:x"):
        choose_engine(resolve(source="folder:x", model="tiny"))
    assert choose_engine(resolve(source="folder:x", engine="embedded", model="tiny")).model == "tiny"


def test_vllm_that_is_not_there_is_an_error_with_three_ways_out(no_gpu: None) -> None:
    choice = choose_engine(resolve(source="scenes", engine="vllm"))
    with pytest.raises(EngineError, match="vLLM is not installed here") as caught:
        choice.make()
    assert all(way in caught.value.hint for way in ("pip install vllm", engines.VLLM_PYTHON, "--base-url"))


def test_a_server_and_a_model_in_this_process_exclude_each_other() -> None:
    with pytest.raises(EngineError, match="--base-url names a server"):
        choose_engine(resolve(source="scenes", engine="embedded", base_url=["http://localhost:1/v1"]))


@pytest.mark.parametrize(
    ("name", "content", "pixels"),
    [
        ("preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056}, 12845056),
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", "size": {"longest_edge": 7056}}, 7056),
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 1_003_520}}}, 1_003_520),
        ("processor_config.json", {"image_processor": {"size": {"longest_edge": 1536}}}, 1536**2),  # SmolVLM
        ("preprocessor_config.json", {"size": {"height": 896, "width": 896}}, None),  # Gemma
        ("preprocessor_config.json", {"size": 224}, None),
        ("preprocessor_config.json", {}, None),
        ("other.json", {"max_pixels": 3}, None),
    ],
)
def test_the_pixel_bound_is_the_processors_own(tmp_path: Path, name: str, content: object, pixels: int | None) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert max_pixels(str(tmp_path)) == pixels


@pytest.mark.parametrize("content", ["{", "[]"])
def test_settings_of_a_model_that_cannot_be_read_are_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(EngineError, match=r"preprocessor_config\.json"):
        max_pixels(str(tmp_path))


def test_a_hub_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match="does not answer, and me/none is not in the cache"):
        max_pixels("me/none")
