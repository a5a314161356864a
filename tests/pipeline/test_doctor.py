"""Doctor: findings about the machine, tested on the output of other machines."""

import platform
import sys
from pathlib import Path

import pytest

from pipeline.doctor import examine, judge_gpus
from pipeline.inference.engines import VLLM_PYTHON
from pipeline.install import installed_version


def test_the_roomiest_card_counts() -> None:
    finding = judge_gpus("NVIDIA H100, 81559, 2000\nNVIDIA H100, 81559, 81000\n")
    assert (finding.ok, finding.found) == (True, "2 x NVIDIA H100, 79 of 80 GiB free")


def test_a_gpu_with_too_little_memory_has_a_hint() -> None:
    finding = judge_gpus("NVIDIA T4, 15360, 3000\n")
    assert not finding.ok
    assert "needs 8 GiB" in finding.hint


def test_unknown_gpu_memory_is_no_crash() -> None:
    assert not judge_gpus("NVIDIA GB10, [N/A], [N/A]\n").ok


def test_a_driver_that_lists_nothing_is_no_gpu() -> None:
    assert not judge_gpus("No devices were found\n").ok


def test_an_interpreter_that_has_no_vllm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_PYTHON, "/bin/false")
    (vllm,) = [finding for finding in examine() if finding.what == "vllm"]
    assert not vllm.ok
    monkeypatch.setenv(VLLM_PYTHON, "/does/not/exist")
    (vllm,) = [finding for finding in examine() if finding.what == "vllm"]
    assert "cannot be run" in vllm.found


def test_every_failure_has_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    assert all(finding.hint for finding in examine() if not finding.ok)


def test_the_package_and_its_python_are_named_first() -> None:
    first = examine()[0]
    assert (first.what, first.ok) == ("synth", True)
    assert first.found == f"synth-captioner {installed_version()} on Python {platform.python_version()}"


def test_modules_of_somebody_else_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    first = examine()[0]
    assert not first.ok
    assert f"the package `trainer` in {tmp_path}/trainer is another package of that name" in first.found
