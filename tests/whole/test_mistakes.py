"""Mistakes of new users: each gives one error with a hint, before torch is loaded."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.commands import read_result, run_process, run_python
from tests.mistakes import MISTAKES, PHOTOS, Mistake, add_photos, environment
from tests.whole.conftest import ROOT

NO_TORCH = "raise ImportError('torch was loaded before the mistake was found')"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Make all mistakes in one process that cannot import torch."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "path").mkdir()
    (folder / "path" / "torch.py").write_text(NO_TORCH)
    env = os.environ | {"PYTHONPATH": f"{folder / 'path'}:{ROOT}"}
    return read_result(run_python("-m", "tests.mistakes", folder, cwd=folder, env=env))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_gives_one_error_with_hint(mistake: Mistake, outcomes: dict[str, Any]) -> None:
    code, errors, versions = outcomes[mistake.name]
    assert (code, versions) == (mistake.code, []), errors
    assert "Traceback" not in errors
    message = " ".join(errors.split())
    assert mistake.error in message
    assert mistake.hint in message
    if code == 1:
        error, hint = errors.strip().splitlines()[-2:]
        assert error.startswith("synth: ") and hint.startswith("  hint: ")


def test_missing_package_error_shows_install_command(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    error = "ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "path" / "torch.py").write_text(f"raise {error}")
    add_photos(tmp_path)
    command = f"{PHOTOS} --engine embedded --model tiny".split()
    env = environment(tmp_path) | {"PYTHONPATH": str(tmp_path / "path")}
    done = run_process(*command, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "needs the package torch" in done.stderr
    assert "hint: pip install 'llguidance<" in done.stderr
