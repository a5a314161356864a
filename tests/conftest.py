"""Shared fixtures, and the order of tests under pytest-xdist."""

import os

import pytest

from tests.browser import browser, opened

__all__ = ["browser", "opened"]

LONGEST = ("tests/whole/test_vllm.py", "tests/whole/test_cluster.py", "tests/whole/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, start with the longest files, so that no worker ends with one of them."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: next((n for n, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST)))
