"""A real browser for the tests of pages, which opens them from the disk."""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

# As root there is no sandbox to be had; the rest keeps Chromium from calling home.
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 800}

Open = Callable[..., Page]


@pytest.fixture(scope="module")  # while it is open an event loop runs, and no test could start another
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        except Error as error:
            if os.environ.get("CI") == "true":
                pytest.fail(f"there is no Chromium, and CI must not pass without it: {error}")
            pytest.skip("NOT RUN: there is no Chromium; `make test` installs one")
        yield found
        found.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Open a page of the disk; fail if it says an error or asks for anything that is not beside it."""
    contexts, wrong = [], []

    def open_page(path: Path, **how: Any) -> Page:
        context = browser.new_context(viewport=how.pop("viewport", WIDE), **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: wrong.append(asked.url[:200]) if not asked.url.startswith(("file:", "data:", "blob:")) else None,
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def violations(page: Page) -> list[str]:
    """What axe-core finds to be in the way of people who cannot see or click well."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    told = page.evaluate("axe.run()")
    return [f"{wrong['id']}: {wrong['nodes'][0]['html'][:200]}" for wrong in told["violations"]]
