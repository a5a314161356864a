"""Engine choice: by the settings and by the hardware of this machine."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import ServerConfig
from pipeline.digests import weights_revision
from pipeline.errors import ConfigError, EngineError
from pipeline.executors.messages import describe_boxes
from pipeline.inference import engines, vllm
from pipeline.inference.engines import TINY_WEIGHTS, box_unit_of, choose_engine, pick_engine, serve_model
from pipeline.inference.vllm import VLLM_PYTHON
from pipeline.progress import NullProgress
from tests.chat.server import ChatServer, running_chat

REVISION = "0123456789abcdef"  # `synth serve` appends it to the name


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)


def test_auto_engine_is_the_given_server_or_vllm_on_a_gpu_or_embedded(
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
    assert pick_engine(resolve(source="scenes")) == ("vllm", "this machine has a GPU and vLLM")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"source": "folder:x", "model": "tiny"}, "can only describe --source scenes, not folder:x"),
        ({"server": {"flags": ["--max-num-seqs", "7"]}}, "synth starts no server"),
        ({"engine": "embedded", "base_url": ["http://localhost:1/v1"]}, "exclude each other"),
        ({"generate": {"caption_styles": ["plain"]}}, "does not support the caption style plain"),
    ],
)
def test_settings_that_fit_no_engine_are_refused(
    settings: dict[str, Any], problem: str, no_gpu: None
) -> None:
    with pytest.raises(EngineError, match=problem):
        choose_engine(resolve(**{"source": "scenes", **settings}))


def test_flags_that_may_change_replies_change_the_revision(no_gpu: None) -> None:
    def revision(*flags: str) -> str:
        return choose_engine(resolve(source="scenes", engine="vllm", server={"flags": flags})).revision

    assert revision("--max-num-seqs", "7", "--block-size=16") == revision() == weights_revision(TINY_WEIGHTS)
    assert len({revision(), revision("--quantization", "fp8"), revision("--quantization=awq")}) == 3


def test_missing_vllm_error_has_three_hints(no_gpu: None) -> None:
    choice = choose_engine(resolve(source="scenes", engine="vllm"))
    with pytest.raises(EngineError, match="vLLM is not installed here") as caught:
        choice.make()
    assert all(way in caught.value.hint for way in ("pip install vllm", VLLM_PYTHON, "--base-url"))


def test_ports_of_several_servers_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "visible_gpus", lambda: ("0", "1"))
    monkeypatch.setattr(vllm, "gpu_memory_gib", lambda gpus: None)
    monkeypatch.setenv(VLLM_PYTHON, "/opt/vllm/python")
    with pytest.raises(ConfigError, match="2 servers from port 65535 need ports above 65535"):
        serve_model("tiny", ServerConfig(), 65_535, Path("log"), NullProgress(), print)


@pytest.mark.parametrize(
    ("model", "unit"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "pixels"),
        ("qwen2.5vl:3b", "pixels"),
        ("internlm/CapRL-3B", "pixels"),
        ("/models/Qwen3-VL-4B/", "thousandths"),
        ("OpenGVLab/InternVL3-8B-hf", "thousandths"),
        ("OpenGVLab/InternVL3_5-8B", None),
        ("/data/qwen3-vl-exp/llama", None),
    ],
)
def test_box_unit_follows_the_model_name(model: str, unit: str | None) -> None:
    assert box_unit_of(model) == unit


def test_model_whose_box_unit_differs_from_the_task_is_reported() -> None:
    task = {"name": "things", "kind": "boxes", "prompt": "Find things."}
    config = resolve(source="folder:x", custom_tasks=[task])
    (note,) = describe_boxes(config, "Qwen/Qwen3-VL-8B-Instruct")
    assert "Qwen3-VL-8B-Instruct writes boxes in thousandths, but the task things reads pixels" in note
    assert not [*describe_boxes(config, "Qwen/Qwen2.5-VL-3B-Instruct"), *describe_boxes(config, "gpt-5")]
    assert not [*describe_boxes(resolve(source="folder:x"), "Qwen/Qwen3-VL-8B-Instruct")]
    right = resolve(source="folder:x", custom_tasks=[task | {"coordinates": "thousandths"}])
    assert not [*describe_boxes(right, "Qwen/Qwen3-VL-8B-Instruct")]
