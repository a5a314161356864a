"""GPUs: which GPUs a process may use, how servers share them, and the limits of vLLM on each GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError
from pipeline.inference import memory, vllm
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.inference.memory import QWEN_3B, MemoryPlan, ModelShape, needed_gib, plan_memory
from pipeline.inference.vllm import VllmCommand, plan_servers, visible_gpus
from pipeline.tasks.base import MAX_PIXELS
from tests.pipeline.inference.test_vllm import value_of

LISTING = (
    "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaa)\n"
    "  MIG 1g.10gb     Device  0: (UUID: MIG-b1)\n"
    "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-ccc)\n"
)


@pytest.mark.parametrize(
    ("listing", "visible", "gpus"),
    [
        (LISTING, None, ("0", "1")),
        (LISTING, "1, 0", ("1", "0")),
        (LISTING, "MIG-b1,GPU-ccc", ("MIG-b1", "GPU-ccc")),
        (LISTING, "1,-1,0", ("1",)),
        (LISTING, "", ()),
        ("No devices found.\n", "0", ()),
        (None, "0", ()),  # no driver
    ],
)
def test_visible_gpus_come_from_cuda_visible_devices_or_default_to_all(
    listing: str | None,
    visible: str | None,
    gpus: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if listing is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<END\n{listing}END\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if listing is not None else str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    visible_gpus.cache_clear()
    assert visible_gpus() == gpus
    visible_gpus.cache_clear()


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "visible_gpus", lambda: ("5", "7"))
    monkeypatch.setattr(vllm, "vllm_python", lambda: "python")


def plan(tmp_path: Path, *flags: str) -> list[VllmCommand]:
    log = tmp_path / "vllm.log"
    return plan_servers("tiny", lambda: TINY_WEIGHTS, "r", ServerConfig(flags=flags), log, max_pixels=None)


@pytest.mark.usefixtures("fake_vllm")
def test_each_gpu_runs_a_server_with_its_own_log(tmp_path: Path) -> None:
    first, second = plan(tmp_path)
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in (first, second)] == ["5", "7"]
    assert [one.log.name for one in (first, second)] == ["vllm.log", "vllm-2.log"]
    assert first.api_key == second.api_key


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("flags", "groups", "divisor"),
    [
        (("--tensor_parallel_size", "4"), ["1,2,3,4"], 4),
        (("-tp=2",), ["1,2", "3,4"], 2),
        (("-tp", "2", "--pipeline-parallel-size=2"), ["1,2,3,4"], 4),
        (("-tp", "4", "--tensor-parallel-size", "2"), ["1,2", "3,4"], 2),  # the last flag counts
    ],
)
def test_parallel_flags_set_the_gpus_of_a_server_and_the_share_of_each_gpu(
    flags: tuple[str, ...], groups: list[str], divisor: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shares: set[int] = set()

    def plan_share(shape: ModelShape, *limits: Any) -> MemoryPlan:
        shares.add(shape.weights_bytes)
        return plan_memory(shape, *limits)

    monkeypatch.setattr(ModelShape, "of", lambda config, weights_bytes: QWEN_3B)
    monkeypatch.setattr(memory, "plan_memory", plan_share)
    monkeypatch.setattr(vllm, "gpu_memory_gib", lambda gpus: (24.0, 24.0))
    monkeypatch.setattr(vllm, "visible_gpus", lambda: ("1", "2", "3", "4"))
    commands = plan(tmp_path, *flags)
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands] == groups
    assert shares == {QWEN_3B.weights_bytes // divisor}
    monkeypatch.setattr(vllm, "visible_gpus", lambda: ("1", "2", "3", "4", "5"))
    with pytest.raises(EngineError, match="5 visible GPUs cannot be divided into groups of"):
        plan(tmp_path, *flags)


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("flags", [("-dp", "2"), ("--data-parallel-size=2",)])
def test_data_parallelism_of_vllm_is_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="data parallelism is not supported") as caught:
        plan(tmp_path, *flags)
    assert "one server per GPU" in caught.value.hint


@pytest.mark.usefixtures("fake_vllm")
def test_model_that_does_not_fit_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ModelShape, "of", lambda config, weights_bytes: QWEN_3B)
    monkeypatch.setattr(vllm, "gpu_memory_gib", lambda gpus: (8.0, 7.5))
    with pytest.raises(EngineError, match=r"tiny needs .* GiB of free memory .* 7.5 GiB are free") as caught:
        plan(tmp_path)
    assert "FP8 or AWQ" in caught.value.hint
    assert plan(tmp_path, "--quantization", "fp8") and plan(tmp_path, "-tp", "2")


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(
    ("memory", "utilization"), [("81559, 81000", "0.92"), ("24564, 14000", "0.54"), ("[N/A], [N/A]", "0.92")]
)
def test_flags_follow_the_free_memory_of_the_gpu(
    memory: str, utilization: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{memory}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for shape in (
        ModelShape.of(json.loads((TINY_WEIGHTS / "config.json").read_text()), 1),
        None,
    ):
        monkeypatch.setattr(ModelShape, "of", lambda config, weights_bytes, shape=shape: shape)
        command, _ = plan(tmp_path)
        assert value_of(command, "--gpu-memory-utilization") == utilization
        assert value_of(command, "--max-num-batched-tokens") == "16384"


# The published values of Qwen2.5-VL-3B-Instruct that determine its memory use.
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151_936,
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "spatial_merge_size": 2,
    },
}  # fmt: skip


def test_model_shape_is_read_from_the_config_of_a_supported_model_type() -> None:
    assert ModelShape.of(CONFIG, 7_509_245_952) == QWEN_3B
    text = {name: value for name, value in CONFIG.items() if name not in ("vision_config", "model_type")}
    nested = {"model_type": "qwen3_vl", "text_config": text | {"head_dim": 128}}
    vision = CONFIG["vision_config"] | {"patch_size": 16}
    shape = ModelShape.of(nested | {"vision_config": vision}, 1)
    assert shape and shape.token_px == 32 and shape.kv_token_bytes == QWEN_3B.kv_token_bytes
    assert ModelShape.of({"model_type": "llava"}, 1) is None


@pytest.mark.parametrize(
    ("card_gib", "fits", "batched_tokens", "num_seqs"),
    [
        (8, False, 2048, 16),
        (12, True, 4096, 32),
        (16, True, 8192, 64),
        (24, True, 16_384, 128),
        (40, True, 16_384, 256),
        (80, True, 16_384, 512),
    ],
)
def test_memory_plan_of_the_default_model_grows_with_gpu_memory(
    card_gib: int, batched_tokens: int, num_seqs: int, *, fits: bool
) -> None:
    plan = plan_memory(QWEN_3B, card_gib, card_gib, MAX_PIXELS, 8192)
    assert (plan.fits, plan.batched_tokens, plan.num_seqs) == (fits, batched_tokens, num_seqs)
    used_bytes = QWEN_3B.weights_bytes + plan.kv_tokens * QWEN_3B.kv_token_bytes
    assert not fits or used_bytes < 0.92 * card_gib * memory.GIB
    assert not fits or plan.model_len == 8192
    assert fits == (card_gib > needed_gib(QWEN_3B, MAX_PIXELS))


def test_memory_plan_leaves_memory_for_other_programs_and_limits_the_context() -> None:
    plan = plan_memory(QWEN_3B, 24, 14, MAX_PIXELS, 8192)
    assert plan.utilization == 0.56 and plan.fits
    assert not plan_memory(QWEN_3B, 24, 8, MAX_PIXELS, 8192).fits
    plan = plan_memory(QWEN_3B, 10, 10, MAX_PIXELS, 128_000)
    assert 4096 <= plan.model_len == plan.kv_tokens < 128_000
