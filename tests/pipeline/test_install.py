"""The installed package: somebody else's modules of the same names are noticed, and hints name what can be installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import install
from pipeline.install import DISTRIBUTION, ROOT, check_packages, extra_of, install_command


def test_another_package_named_trainer_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import pipeline; sys.path[:0] = [{str(tmp_path)!r}];"
    code += "from pipeline.cli import main; sys.argv = ['synth', '--version']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"the package `trainer` in {tmp_path}/trainer is another package of that name" in done.stderr
    assert "an environment of its own" in done.stderr


def test_our_own_packages_are_in_order() -> None:
    check_packages()


@pytest.mark.parametrize(("package", "extra"), [("torch", "embedded"), ("ray", "ray"), ("pillow_heif", "heic"), ("s3fs", "s3")])
def test_a_missing_package_is_installed_by_its_extra(package: str, extra: str) -> None:
    assert extra_of(package) == install_command(extra) == f"pip install '{ROOT}[{extra}]'"


def test_a_package_that_no_extra_brings_is_named_itself() -> None:
    assert extra_of("nobody") == f"{sys.executable} -m pip install nobody"


def test_outside_of_its_folder_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert install_command("train") == f"pip install '{DISTRIBUTION}[train]'"


def test_the_module_runs_as_the_command_beside_a_folder_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    done = subprocess.run([sys.executable, "-m", "pipeline", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"synth {install.installed_version()}\n")
