"""What the tests of workers in this process share."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def changes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change back to the working directory after each test: a worker changes to that of its command."""
    monkeypatch.chdir(Path.cwd())
