"""GPUs: which GPUs a process may use, and how servers share them."""

from pathlib import Path

import pytest

from pipeline.config.sections import ServerConfig
from pipeline.inference import vllm
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.inference.vllm import VllmCommand, group_gpus, has_bfloat16, plan_servers, visible_gpus

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


@pytest.mark.parametrize(
    ("flags", "groups"),
    [
        ((), [("0",), ("1",), ("2",), ("3",)]),
        (("--tensor_parallel_size", "2"), [("0", "1"), ("2", "3")]),
        (("-tp=2", "--pipeline-parallel-size=2"), [("0", "1", "2", "3")]),
        (("--tensor-parallel-size", "3"), [("0", "1", "2")]),
        (("--tensor-parallel-size", "8"), [("0", "1", "2", "3")]),  # vLLM reports the error
        (("--data-parallel-size", "2"), [("0", "1", "2", "3")]),
    ],
)
def test_parallel_flags_decide_how_many_gpus_a_server_gets(
    flags: tuple[str, ...], groups: list[tuple[str, ...]]
) -> None:
    assert group_gpus(("0", "1", "2", "3"), flags) == groups
    assert group_gpus((), flags) == [()]


def value_of(command: VllmCommand, flag: str) -> str:
    return command.arguments[command.arguments.index(flag) + 1]


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "visible_gpus", lambda: ("5", "7"))
    monkeypatch.setattr(vllm, "vllm_python", lambda: "python")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    has_bfloat16.cache_clear()


@pytest.mark.usefixtures("fake_vllm")
def test_two_gpus_run_two_servers_that_share_the_cores(tmp_path: Path) -> None:
    first, second = plan_servers(str(TINY_WEIGHTS), "r", ServerConfig(), tmp_path / "vllm.log")
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in (first, second)] == ["5", "7"]
    assert [one.log.name for one in (first, second)] == ["vllm.log", "vllm-2.log"]
    assert [value_of(one, "--api-server-count") for one in (first, second)] == ["2", "2"]
    assert first.api_key == second.api_key


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize(("capabilities", "dtype"), [("8.0\\n9.0\\n", "bfloat16"), ("8.6\\n7.0\\n", "half")])
def test_gpu_without_bfloat16_uses_half_precision(
    capabilities: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{capabilities}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command, _ = plan_servers(str(TINY_WEIGHTS), "r", ServerConfig(), tmp_path / "vllm.log")
    assert value_of(command, "--dtype") == dtype
    has_bfloat16.cache_clear()
