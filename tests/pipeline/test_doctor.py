"""Findings about the machine, tested with simulated values of other machines."""

import platform
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import examine
from pipeline.inference.vllm import VLLM_PYTHON
from pipeline.install import installed_version


@pytest.mark.parametrize(
    ("sizes", "is_ok", "result"),
    [
        ({"0": (80.0, 2.0), "1": (80.0, 79.0)}, True, "2 visible; the best has 79 of 80 GiB free"),
        ({"0": (15.0, 3.0)}, False, "1 visible; the best has 3 of 15 GiB free"),
        ({"0": None}, False, "nvidia-smi reports no GPU memory"),
        ({}, False, "none"),
    ],
)
def test_doctor_judges_the_gpu_with_most_free_memory(
    sizes: dict[str, Any], *, is_ok: bool, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "visible_gpus", lambda: tuple(sizes))
    monkeypatch.setattr(doctor, "gpu_memory_gib", lambda gpus: sizes[gpus[0]])
    finding = doctor._gpu()
    assert (finding.is_ok, finding.result, bool(finding.hint)) == (is_ok, result, not is_ok)


def test_doctor_reports_an_interpreter_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_PYTHON, "/bin/false")
    (vllm,) = [finding for finding in examine() if finding.name == "vllm"]
    assert not vllm.is_ok
    monkeypatch.setenv(VLLM_PYTHON, "/does/not/exist")
    (vllm,) = [finding for finding in examine() if finding.name == "vllm"]
    assert "cannot run " in vllm.result


def test_failures_have_hints_and_the_default_model_has_a_license(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    findings = examine()
    assert all(finding.hint for finding in findings if not finding.is_ok)
    (default,) = [finding.result for finding in findings if finding.result.startswith("folder:PATH")]
    assert "Qwen2.5-VL-3B-Instruct (Qwen Research License: no commercial use)" in default
    title = f"synth-captioner {installed_version()} on Python {platform.python_version()}"
    assert findings[0].result == title
