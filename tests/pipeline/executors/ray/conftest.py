"""Fixtures of the tests of workers in this process."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the working directory after each test, because workers change it."""
    monkeypatch.chdir(Path.cwd())
