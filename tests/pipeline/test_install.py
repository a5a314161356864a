"""Hints name the command that installs a missing package."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import install
from pipeline.install import DISTRIBUTION, ROOT, extra_of, install_command

EXTRAS = [("torch", "embedded"), ("ray", "ray"), ("pillow_heif", "heic"), ("s3fs", "s3")]


@pytest.mark.parametrize(("package", "extra"), EXTRAS)
def test_missing_package_hint_names_its_extra(package: str, extra: str) -> None:
    assert extra_of(package) == install_command(extra) == f"pip install '{ROOT}[{extra}]'"


def test_package_without_extra_is_installed_by_name() -> None:
    assert extra_of("nobody") == f"{sys.executable} -m pip install nobody"


def test_package_without_source_folder_is_installed_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert install_command("train") == f"pip install '{DISTRIBUTION}[train]'"


def test_module_runs_next_to_a_folder_named_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    command = [sys.executable, "-m", "pipeline", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"synth {install.installed_version()}\n")
