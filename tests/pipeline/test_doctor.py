"""Findings about the machine, tested on the output of other machines."""

import platform
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import check_server, check_tasks, examine, judge_gpus, weights_bytes
from pipeline.inference.vllm import VLLM_PYTHON
from pipeline.install import installed_version
from tests.chat.server import ChatServer, running_chat


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
    files[0].write_text("{name: offer, kind: text, require: [id], prompt: 'Say what {{ row.title }} is.'}")
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


def test_server_is_asked_for_its_model() -> None:
    with running_chat(ChatServer()) as chat:
        finding = check_server([chat.url])
        assert finding.is_ok and finding.result.startswith(f"{chat.url}: ")
        wrong = check_server([chat.url], "nothing")
    assert not wrong.is_ok and "nothing" in wrong.result and wrong.hint


def model_of(folder: Path, size: int, suffix: str = "safetensors") -> str:
    """Create a folder with sparse weights in two files, and a file that is not counted."""
    folder.mkdir()
    for number in range(2):
        with (folder / f"model-{number}.{suffix}").open("wb") as file:
            file.truncate(size // 2)
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_model_fits_if_memory_holds_its_weights_and_a_fifth_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_free_memory_gib", lambda: (8.0, "the GPU"))
    small = examine(model_of(tmp_path / "Qwen2.5-VL-3B", 6 << 30))[0]
    assert (small.name, small.is_ok, small.hint) == ("model", True, "")
    assert "6.0 GiB of weights, 8.0 GiB free in the GPU" in small.result
    large = examine(model_of(tmp_path / "large", 7 << 30, "bin"))[0]
    assert not large.is_ok and "it needs 8.4 GiB" in large.hint
    twice = Path(model_of(tmp_path / "twice", 6 << 30))
    (twice / "pytorch_model.bin").write_bytes(bytes(99))
    # The second file holds the same weights in another format.
    assert weights_bytes(str(twice)) == 6 << 30


def test_license_of_the_model_is_shown(tmp_path: Path) -> None:
    model, *_ = findings = examine(model_of(tmp_path / "Qwen3-VL-2B-Instruct", 2 << 10))
    assert "(Apache-2.0): " in model.result
    default = [finding.result for finding in findings if finding.result.startswith("folder:PATH")]
    assert "Qwen2.5-VL-3B-Instruct (Qwen Research License: no commercial use)" in default[0]


def test_missing_model_fails_with_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert examine(str(tmp_path / "empty"))[0].result.endswith("has no weight files")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, problem in (("no name", "not the name of a model"), ("ORG/NAME", "does not answer")):
        finding = examine(name)[0]
        assert not finding.is_ok and problem in finding.result and finding.hint


def test_every_failure_has_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    findings = examine()
    assert all(finding.hint for finding in findings if not finding.is_ok)
    assert (
        findings[0].result == f"synth-captioner {installed_version()} on Python {platform.python_version()}"
    )
