"""Shared fixtures, and the order of tests under pytest-xdist."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import browser, opened
from tests.commands import REPLIES

__all__ = ["browser", "opened"]

# Set these before other conftest.py files import torch. Several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads do not spin

# The slowest test files run first, so that no worker has one left at the end.
ORDER = (
    "whole/test_vllm", "whole/test_cluster", "whole/test_browser", "whole/test_install", "trainer/model",
    "whole", "trainer", "hostile", "pipeline/hub", "pipeline/sources", "pipeline/inference",
)  # fmt: skip


@pytest.fixture
def heard_sigint() -> Iterator[None]:
    """Handle SIGINT even if the tests run in a background job, for which shells ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def working_directory() -> Iterator[None]:
    """Fail a test that leaves another working directory, and restore it."""
    here = Path.cwd()
    yield
    try:
        now: Path | None = Path.cwd()
    except FileNotFoundError:  # the test removed the folder
        now = None
    os.chdir(here)
    assert now == here


def pytest_configure(config: pytest.Config) -> None:
    """Set up the tests and their child processes."""
    os.fsync = lambda fd: None  # fsync is slow and not needed: tests kill processes, but never the machine
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        folder = tempfile.TemporaryDirectory(prefix="synth-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ[REPLIES] = folder.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by ORDER under pytest-xdist."""

    def place(item: pytest.Item) -> int:
        starts = (n for n, start in enumerate(ORDER) if item.nodeid.startswith(f"tests/{start}"))
        return next(starts, len(ORDER))

    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=place)
