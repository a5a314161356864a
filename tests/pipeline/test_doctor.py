"""Findings about the machine, tested on the output of other machines."""

import platform
from pathlib import Path

import pytest

from pipeline.doctor import check_tasks, examine, judge_gpus
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


def test_custom_tasks_are_checked_without_source(tmp_path: Path) -> None:
    files = [tmp_path / "offer.yaml", tmp_path / "short.yaml"]
    files[0].write_text(
        "{name: offer, kind: text, when: row.id is not null, prompt: 'Say what {{ row.title }} is.'}"
    )
    files[1].write_text("{name: short, kind: text, needs: [offer], prompt: '{{ results.offer }}'}")
    finding = check_tasks(files)
    assert (finding.is_ok, finding.result) == (
        True,
        "offer (text), short (text); needs --columns context=id,title",
    )
    missing = check_tasks(files[1:])
    assert not missing.is_ok and missing.result.startswith("the task short needs offer")
    files[1].write_text("{name: short, kind: text, prompt: 'Go on {{ row.x }.'}")
    invalid = check_tasks(files)
    assert not invalid.is_ok and "not a valid template: line 1" in invalid.result and invalid.hint


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
