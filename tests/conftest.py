"""Fixtures for all tests."""

from tests.browser import browser, opened

__all__ = ["browser", "opened"]
