"""Fixtures for all tests, and their order where several run at once."""

import os

import pytest

from tests.browser import browser, opened

__all__ = ["browser", "opened"]

LONGEST = ("tests/whole/test_vllm.py", "tests/whole/test_cluster.py", "tests/whole/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files are shared out (pytest-xdist), begin with the longest, so that no worker is left with one in the end."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: next((n for n, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST)))
