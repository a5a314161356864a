"""Engine choice: by the settings and by the hardware of this machine."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.digests import weights_revision
from pipeline.errors import ConfigError, EngineError, SynthError
from pipeline.inference import engines
from pipeline.inference.engines import TINY_WEIGHTS, box_unit_of, pick_engine
from pipeline.inference.vllm import VLLM_PYTHON
from pipeline.plan import Model, Plan, describe_boxes
from tests.chat.server import ChatServer, running_chat
from tests.plans import engine_of

REVISION = "0123456789abcdef"  # `synth serve` appends it to the name


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)


def test_auto_engine_chooses_given_server_or_vllm_or_embedded(
    monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    choice = engine_of(resolve(source="scenes"))
    assert choice[:3] == ("embedded", "tiny", weights_revision(TINY_WEIGHTS))
    with running_chat(ChatServer(model=f"m@{REVISION}")) as chat:
        choice = engine_of(resolve(source="folder:x", base_url=[chat.url]))
    assert choice[:3] == ("vllm", f"m@{REVISION}", REVISION)
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    monkeypatch.setenv(VLLM_PYTHON, "/opt/vllm/python")
    assert pick_engine(resolve(source="scenes")) == ("vllm", "this machine has a GPU and vLLM")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"verify": {"checks": ["covers"]}}, "can neither read nor repair captions"),
        ({"source": "folder:x", "model": "tiny"}, "can only describe --source scenes, not folder:x"),
        ({"server": {"flags": ["--max-num-seqs", "7"]}}, "synth starts no server"),
        ({"engine": "embedded", "base_url": ["http://localhost:1/v1"]}, "cannot be combined"),
        ({"generate": {"caption_styles": ["plain"]}}, "does not support the caption style plain"),
        ({"source": "folder:x"}, "Qwen2.5-VL-3B-Instruct needs a server: no --base-url, and no GPU"),
        ({"engine": "embedded", "model": "a/b"}, "a/b needs a server: --engine embedded runs only the tiny"),
    ],
)
def test_settings_without_engine_are_refused(settings: dict[str, Any], problem: str, no_gpu: None) -> None:
    with pytest.raises(SynthError, match=problem) as caught:
        engine_of(resolve(**{"source": "scenes", **settings}))
    # Another machine may have a server. The other mistakes are in the settings alone.
    assert type(caught.value) is (EngineError if "needs a server" in problem else ConfigError)


def test_revision_of_a_hub_model_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name: SimpleNamespace(sha=f"{name}1"))
    assert engine_of(resolve(source="folder:x", engine="vllm", model="me/a")).revision == "me/a1"


def test_flags_that_may_change_replies_change_the_revision(no_gpu: None) -> None:
    def revision(*flags: str) -> str:
        return engine_of(resolve(source="scenes", engine="vllm", server={"flags": flags})).revision

    neutral = ("--max-num-seqs", "7", "--block-size=16", "--max_model_len", "4096", "-tp", "2", "-pp=2")
    assert revision(*neutral) == revision() == weights_revision(TINY_WEIGHTS)
    assert len({revision(), revision("--quantization", "fp8"), revision("--quantization=awq")}) == 3
    assert revision("--enforce-eager", "-q", "awq") == revision("-q", "awq", *neutral) != revision()
    assert (
        revision("--block-size", "16", "--seed", "-1") == revision("--seed", "-1") != revision("--seed", "1")
    )


def test_missing_vllm_error_has_three_hints(no_gpu: None) -> None:
    choice = engine_of(resolve(source="scenes", engine="vllm"))
    with pytest.raises(EngineError, match="vLLM is not installed here") as caught:
        choice.make()
    assert all(way in caught.value.hint for way in ("pip install vllm", VLLM_PYTHON, "--base-url"))


@pytest.mark.parametrize(
    ("model", "unit"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "pixels"), ("qwen2.5vl:3b", "pixels"),
        ("internlm/CapRL-3B", "pixels"), ("/models/Qwen3-VL-4B/", "thousandths"),
        ("OpenGVLab/InternVL3-8B-hf", "thousandths"), ("OpenGVLab/InternVL3_5-8B", None),
        ("/data/qwen3-vl-exp/llama", None),
    ],
)  # fmt: skip
def test_box_unit_follows_the_model_name(model: str, unit: str | None) -> None:
    assert box_unit_of(model) == unit


def test_model_whose_box_unit_differs_from_the_task_is_reported() -> None:
    task = {"name": "things", "kind": "boxes", "prompt": "Find things."}
    qwen3, qwen2 = "Qwen/Qwen3-VL-8B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"

    def notes(model: str, small: str = qwen2, **settings: Any) -> list[str]:
        config = resolve(source="folder:x", models={"small": {"model": small}}, **settings)
        models = {"default": Model(model, "1"), "small": Model(small, "2")}
        return list(describe_boxes(Plan.resolve(config, DatasetDir(Path("d")), models)))

    (note,) = notes(qwen3, custom_tasks=[task])
    assert note.startswith(f"{qwen3} writes boxes in thousandths, but the task things expects pixels")
    assert not notes(qwen2, custom_tasks=[task]) and not notes("gpt-5", custom_tasks=[task])
    assert not notes(qwen3) and not notes(qwen3, custom_tasks=[task | {"coordinates": "thousandths"}])
    ladder = {"task_models": {"things": ["default", "small"]}}
    assert len(notes(qwen2, qwen3, custom_tasks=[task], **ladder)) == 1
    assert not notes(qwen3, qwen2, custom_tasks=[task], task_models={"things": "small"})
