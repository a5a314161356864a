"""GPUs: which ones a process may use, and how servers share them."""

from pathlib import Path

import pytest

from pipeline.config.files import resolve
from pipeline.inference import engines, gpus
from pipeline.inference.engines import TINY_WEIGHTS, plan_servers
from pipeline.inference.gpus import group_gpus, select_gpus

UUIDS = ("GPU-8932f937-d72c", "GPU-1111aaaa-0000", "GPU-1112bbbb-0000", "GPU-4444cccc-0000")
FOUR = "".join(f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: {uuid})\n" for n, uuid in enumerate(UUIDS))
SPLIT = (
    "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaa)\n"
    "  MIG 1g.10gb     Device  0: (UUID: MIG-b1)\n"
    "  MIG 1g.10gb     Device  1: (UUID: MIG-b2)\n"
    "GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-ccc)\n"
)


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, ("0", "1", "2", "3")),
        ("", ()),
        ("-1", ()),
        ("2", ("2",)),
        ("3, 1", ("3", "1")),
        ("0,2,-1,1", ("0", "2")),  # what comes after an invalid one is ignored
        ("0,9,1", ("0",)),
        ("0,0", ()),
        ("NoDevFiles", ()),
        ("GPU-8932", (UUIDS[0],)),
        ("GPU-111", ()),  # of two GPUs
        ("GPU-1112,GPU-4", UUIDS[2:]),
        ("GPU-8932,1", (UUIDS[0],)),  # the first decides the kind
        ("0,GPU-8932", ("0",)),
        ("GPU-8932,GPU-8932f937", ()),
    ],
)
def test_cuda_visible_devices_selects_as_the_driver_does(visible: str | None, chosen: tuple[str, ...]) -> None:
    assert select_gpus(FOUR, visible) == chosen


def test_of_a_split_gpu_each_instance_is_one() -> None:
    assert select_gpus(SPLIT, None) == ("GPU-ccc", "MIG-b1", "MIG-b2")
    assert select_gpus(SPLIT, "MIG-b2,MIG-b1") == ("MIG-b2", "MIG-b1")
    assert select_gpus("No devices found.\n", None) == ()


@pytest.mark.parametrize(
    ("flags", "groups"),
    [
        ((), [("0",), ("1",), ("2",), ("3",)]),
        (("--tensor-parallel-size", "2"), [("0", "1"), ("2", "3")]),
        (("--tensor_parallel_size", "2"), [("0", "1"), ("2", "3")]),
        (("-tp=2", "--pipeline-parallel-size=2"), [("0", "1", "2", "3")]),
        (("--tensor-parallel-size", "3"), [("0", "1", "2")]),
        (("--tensor-parallel-size", "8"), [("0", "1", "2", "3")]),  # vLLM says what is wrong
        (("--data-parallel-size", "2"), [("0", "1", "2", "3")]),
    ],
)
def test_each_server_gets_the_gpus_that_the_flags_give_to_one(flags: tuple[str, ...], groups: list[tuple[str, ...]]) -> None:
    assert group_gpus(("0", "1", "2", "3"), flags) == groups


def test_without_a_gpu_there_is_one_server() -> None:
    assert group_gpus((), ("--tensor-parallel-size", "2")) == [()]


def test_a_machine_with_two_gpus_runs_two_servers_that_share_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "visible_gpus", lambda: ("5", "7"))
    monkeypatch.setattr(engines, "vllm_python", lambda: "python")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    first, second = plan_servers(str(TINY_WEIGHTS), "r", resolve(source="scenes"), tmp_path / "vllm.log")
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in (first, second)] == ["5", "7"]
    assert [one.log.name for one in (first, second)] == ["vllm.log", "vllm-2.log"]
    assert [one.arguments[one.arguments.index("--api-server-count") + 1] for one in (first, second)] == ["2", "2"]
    assert first.api_key == second.api_key


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    gpus.visible_gpus.cache_clear()
    assert gpus.visible_gpus() == ()
    gpus.visible_gpus.cache_clear()


@pytest.mark.parametrize(
    ("said", "dtype"), [("8.0\n9.0\n", "bfloat16"), ("7.5\n", "half"), ("8.6\n7.0\n", "half"), ("[N/A]\n", "bfloat16")]
)
def test_a_gpu_without_bfloat16_is_served_in_half_precision(
    said: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(engines, "visible_gpus", lambda: ("0",))
    monkeypatch.setattr(engines, "vllm_python", lambda: "python")
    gpus.has_bfloat16.cache_clear()
    (command,) = plan_servers(str(TINY_WEIGHTS), "r", resolve(source="scenes"), tmp_path / "vllm.log")
    assert command.arguments[command.arguments.index("--dtype") + 1] == dtype
    gpus.has_bfloat16.cache_clear()
