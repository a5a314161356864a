"""Findings about the machine, tested on the output of other machines."""

import platform
from pathlib import Path

import pytest

from pipeline.doctor import examine, judge_gpus
from pipeline.inference.vllm import VLLM_PYTHON
from pipeline.install import installed_version


@pytest.mark.parametrize(
    ("listed", "is_ok", "result"),
    [
        ("NVIDIA H100, 81559, 2000\nNVIDIA H100, 81559, 81000\n", True, "2 x NVIDIA H100, 79 of 80 GiB free"),
        ("NVIDIA T4, 15360, 3000\n", False, "1 x NVIDIA T4, 3 of 15 GiB free"),
        ("NVIDIA GB10, [N/A], [N/A]\n", False, "nvidia-smi lists no GPU"),
    ],
)
def test_doctor_judges_the_gpu_with_most_free_memory(listed: str, is_ok: bool, result: str) -> None:  # noqa: FBT001
    finding = judge_gpus(listed)
    assert (finding.is_ok, finding.result, bool(finding.hint)) == (is_ok, result, not is_ok)


def test_interpreter_without_vllm_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_PYTHON, "/bin/false")
    (vllm,) = [finding for finding in examine() if finding.name == "vllm"]
    assert not vllm.is_ok
    monkeypatch.setenv(VLLM_PYTHON, "/does/not/exist")
    (vllm,) = [finding for finding in examine() if finding.name == "vllm"]
    assert "cannot run " in vllm.result


def test_failures_have_hints_and_the_default_model_its_license(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    findings = examine()
    assert all(finding.hint for finding in findings if not finding.is_ok)
    (default,) = [finding.result for finding in findings if finding.result.startswith("folder:PATH")]
    assert "Qwen2.5-VL-3B-Instruct (Qwen Research License: no commercial use)" in default
    assert (
        findings[0].result == f"synth-captioner {installed_version()} on Python {platform.python_version()}"
    )
