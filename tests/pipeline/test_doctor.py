"""Doctor: findings about the machine, tested on the output of other machines."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import examine, judge_gpus, weights_bytes
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


def model_of(folder: Path, size: int, suffix: str = "safetensors") -> str:
    """Make a folder with a sparse file of weights in two parts, and others that do not count."""
    folder.mkdir()
    for number in range(2):
        with (folder / f"model-{number}.{suffix}").open("wb") as file:
            file.truncate(size // 2)
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_a_model_fits_if_its_weights_and_a_fifth_more_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_memory_gib", lambda: (8.0, "the GPU"))
    small = examine(model_of(tmp_path / "Qwen2.5-VL-3B", 6 << 30))[0]
    assert (small.what, small.ok, small.hint) == ("model", True, "")
    assert "6.0 GiB of weights, 8.0 GiB free in the GPU; Qwen2.5-VL: 3B: Qwen Research License" in small.found
    large = examine(model_of(tmp_path / "large", 7 << 30, "bin"))[0]
    assert not large.ok and "it wants 8.4 GiB" in large.hint
    twice = Path(model_of(tmp_path / "twice", 6 << 30))
    (twice / "pytorch_model.bin").write_bytes(bytes(99))
    assert weights_bytes(str(twice)) == 6 << 30  # the same weights in another format


def test_a_gpu_that_does_not_answer_is_a_finding_and_the_tiny_teacher_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("tiny")[0].ok

    def hang() -> tuple[float, str]:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(doctor, "_free_memory_gib", hang)
    assert "timed out" in examine("tiny")[0].found


def test_a_model_that_is_not_there_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert examine(str(tmp_path / "empty"))[0].found.endswith("has no weights")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, told in (("no name", "not the name of a model"), ("ORG/NAME", "does not answer")):
        finding = examine(name)[0]
        assert not finding.ok and told in finding.found and finding.hint


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


def test_a_folder_that_is_gone_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    finding = doctor._disk()
    assert not finding.ok and finding.hint == "go to another folder"
    monkeypatch.chdir(tmp_path)
