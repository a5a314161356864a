"""Chromium fixtures for tests of pages."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright

# Chromium has no sandbox as root. The other flags prevent network requests.
DISABLED = ("gpu", "background-networking", "component-update")
FLAGS = ("--no-sandbox", "--no-first-run", *(f"--disable-{part}" for part in DISABLED))
WIDE, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 800}

Open = Callable[..., Page]


# Each module closes its browser, because an open browser blocks other event loops.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        except Error as error:
            if os.environ.get("CI") == "true":
                pytest.fail(f"there is no Chromium, and CI must not pass without it: {error}")
            pytest.skip("NOT RUN: there is no Chromium; `make test` installs one")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Open a page from disk. Fail if it logs an error or a warning, or requests anything but a local file."""
    contexts, problems = [], []

    def record_message(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def record_request(request: Request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            problems.append(request.url[:200])

    def open_page(path: Path, **options: Any) -> Page:
        context = browser.new_context(viewport=options.pop("viewport", WIDE), **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", record_message)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", record_request)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def wait_until(page: Page, condition: str, seconds: float = 300.0) -> None:
    """Wait until a condition in JavaScript holds."""
    # The security policy of the page forbids `wait_for_function` of Playwright.
    ends_at = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < ends_at, condition
        page.wait_for_timeout(20)


def violations(page: Page) -> list[str]:
    """Return the accessibility violations that axe-core finds on a page."""
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    results = page.evaluate("axe.run()")
    found = results["violations"]
    return [f"{violation['id']}: {violation['nodes'][0]['html'][:200]}" for violation in found]
