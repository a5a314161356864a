"""GPUs: which GPUs a process may use, and how servers share them."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.sections import ServerConfig
from pipeline.errors import EngineError
from pipeline.inference import memory, vllm
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.inference.memory import QWEN_3B, MemoryPlan, ModelShape, plan_memory
from pipeline.inference.vllm import VllmCommand, plan_servers, visible_gpus
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
        (("-tp", "4", "--tensor-parallel-size", "2"), ["1,2", "3,4"], 2),  # the last one counts
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
    with pytest.raises(EngineError, match="but 5 are visible"):
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
    ):  # None: not a Qwen model
        monkeypatch.setattr(ModelShape, "of", lambda config, weights_bytes, shape=shape: shape)
        command, _ = plan(tmp_path)
        assert value_of(command, "--gpu-memory-utilization") == utilization
        assert value_of(command, "--max-num-batched-tokens") == "16384"
