"""Engine choice: decided by the settings and by what this machine has, with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.digests import weights_revision
from pipeline.errors import EngineError
from pipeline.executors.messages import describe_boxes
from pipeline.inference import engines
from pipeline.inference.engines import TINY_WEIGHTS, choose_engine, find_family, max_pixels, pick_engine
from pipeline.inference.vllm import VLLM_PYTHON
from tests.chat.server import ChatServer, running_chat

REVISION = "0123456789abcdef"  # as synth serve appends it to a name


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)


def test_auto_takes_a_named_server_or_a_gpu_and_else_this_process(
    monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    choice = choose_engine(resolve(source="scenes"))
    assert (choice.name, choice.model, choice.revision) == (
        "embedded",
        "tiny",
        weights_revision(TINY_WEIGHTS),
    )
    with running_chat(ChatServer(model=f"m@{REVISION}")) as chat:
        choice = choose_engine(resolve(source="folder:x", base_url=[chat.url]))
    assert (choice.name, choice.model, choice.revision) == ("vllm", f"m@{REVISION}", REVISION)
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    monkeypatch.setenv(VLLM_PYTHON, "/opt/vllm/python")
    assert pick_engine(resolve(source="scenes")) == ("vllm", "a GPU and vLLM are here")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"source": "folder:x", "model": "tiny"}, "cannot describe folder:x"),
        ({"server": {"flags": ["--max-num-seqs", "7"]}}, "no server is to be started"),
        ({"engine": "embedded", "base_url": ["http://localhost:1/v1"]}, "--base-url names a server"),
        ({"generate": {"caption_styles": ["plain"]}}, "does not know the caption style plain"),
    ],
)
def test_settings_that_no_engine_fits_are_an_error(
    settings: dict[str, Any], problem: str, no_gpu: None
) -> None:
    with pytest.raises(EngineError, match=problem):
        choose_engine(resolve(**{"source": "scenes", **settings}))


def test_flags_that_may_change_a_reply_change_the_revision(no_gpu: None) -> None:
    def revision(*flags: str) -> str:
        return choose_engine(resolve(source="scenes", engine="vllm", server={"flags": flags})).revision

    assert revision("--max-num-seqs", "7", "--block-size=16") == revision() == weights_revision(TINY_WEIGHTS)
    assert len({revision(), revision("--quantization", "fp8"), revision("--quantization=awq")}) == 3


def test_vllm_that_is_not_there_is_an_error_with_three_ways_out(no_gpu: None) -> None:
    choice = choose_engine(resolve(source="scenes", engine="vllm"))
    with pytest.raises(EngineError, match="vLLM is not installed here") as caught:
        choice.make()
    assert all(way in caught.value.hint for way in ("pip install vllm", VLLM_PYTHON, "--base-url"))


@pytest.mark.parametrize(
    ("name", "content", "pixels"),
    [
        ("preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056}, 12845056),
        (
            "preprocessor_config.json",
            {"image_processor_type": "Qwen2VLImageProcessor", "size": {"longest_edge": 7056}},
            7056,
        ),
        (
            "processor_config.json",
            {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 1_003_520}}},
            1_003_520,
        ),
        ("processor_config.json", {"image_processor": {"size": {"longest_edge": 1536}}}, 1536**2),  # SmolVLM
        ("preprocessor_config.json", {"size": {"height": 896, "width": 896}}, None),  # Gemma
        ("other.json", {"max_pixels": 3}, None),
    ],
)
def test_the_pixel_bound_is_the_processors_own(
    tmp_path: Path, name: str, content: object, pixels: int | None
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert max_pixels(str(tmp_path)) == pixels


def test_a_hub_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match="does not answer, and me/none is not in the cache"):
        max_pixels("me/none")


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL"),
        ("qwen2.5vl:3b", "Qwen2.5-VL"),
        ("/models/Qwen3-VL-4B/", "Qwen3-VL"),
        ("OpenGVLab/InternVL3-8B-hf", "InternVL3"),
        ("OpenGVLab/InternVL3_5-8B", None),
        ("/data/qwen3-vl-exp/llama", None),
    ],
)
def test_a_family_is_recognized_by_the_name_of_a_model(model: str, family: str | None) -> None:
    found = find_family(model)
    assert (found and found.name) == family


def test_a_run_says_so_if_its_model_writes_boxes_in_another_unit() -> None:
    task = {"name": "things", "kind": "boxes", "prompt": "Find things."}
    config = resolve(source="folder:x", own_tasks=[task])
    (note,) = describe_boxes(config, "Qwen/Qwen3-VL-8B-Instruct")
    assert "Qwen3-VL writes boxes in thousandths, and the task things reads them as pixels" in note
    assert not [*describe_boxes(config, "Qwen/Qwen2.5-VL-3B-Instruct"), *describe_boxes(config, "gpt-5")]
    assert not [*describe_boxes(resolve(source="folder:x"), "Qwen/Qwen3-VL-8B-Instruct")]
    right = resolve(source="folder:x", own_tasks=[task | {"coordinates": "thousandths"}])
    assert not [*describe_boxes(right, "Qwen/Qwen3-VL-8B-Instruct")]
