"""The page in a browser: drop a photo, read, see where a word looks, ask, copy; on a phone as well, and for everyone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import PHONE, WIDE, violations
from tests.pipeline.images.test_similarity import photo
from tests.trainer.serving.test_server import NAME, running
from tests.trainer.test_captioning import save_captioner
from trainer import Captioner
from trainer.serving.server import CaptionServer


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.from_pretrained(save_captioner(tmp_path_factory.mktemp("models") / "c"), device="cpu")


@pytest.fixture(params=["wide", "phone", "dark"])
def page(request: pytest.FixtureRequest, browser: Browser, captioner: Captioner) -> Iterator[Page]:
    """A page of a running server; fails if it logs an error or asks for anything of another host."""
    problems: list[str] = []
    with running(CaptionServer(captioner, NAME)) as url:
        size = PHONE if request.param == "phone" else WIDE
        is_dark = request.param == "dark"
        context = browser.new_context(
            viewport={"width": size["width"], "height": size["height"]}, color_scheme="dark" if is_dark else "light"
        )
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        opened = context.new_page()
        # A refused image is an answer of 400, which the browser logs.
        opened.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if message.type in ("error", "warning") and "400 (Bad Request)" not in message.text
                else None
            ),
        )
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("request", lambda sent: None if sent.url.startswith((url, "data:", "blob:")) else problems.append(sent.url))
        opened.goto(url)
        yield opened
        context.close()
    assert not problems


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for number in (1, 2):
        photo(number).save(tmp_path / f"{number}.png")
    return sorted(tmp_path.glob("*.png"))


def test_a_person_drops_a_photo_reads_asks_and_copies(page: Page, photos: list[Path], captioner: Captioner) -> None:
    expect(page.locator("h1")).to_have_text(NAME)
    assert violations(page) == []
    page.locator("#files").set_input_files(photos[0])
    (caption,) = captioner.caption(photos[0])
    card = page.locator(".photo")
    expect(card.locator(".text")).to_have_text(caption)
    expect(card.locator("canvas")).to_have_attribute("aria-label", f"1.png: {caption}")
    plain = page.evaluate("document.querySelector('canvas').toDataURL()")
    word = card.locator(".words button").first
    word.focus()
    page.keyboard.press("Enter")
    expect(word).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("document.querySelector('canvas').toDataURL()") != plain
    card.locator("summary").click()
    expect(card.locator(".others li").first).to_be_visible()
    assert violations(page) == []
    page.locator("#question").fill("How many?")
    page.locator("#again").click()
    (answer,) = captioner.caption(photos[0], question="How many?")
    expect(card.locator(".text")).to_have_text(answer)
    card.locator(".copy").click()
    expect(card.locator(".done")).to_have_text("copied")
    assert page.evaluate("navigator.clipboard.readText()") == answer
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    card.locator(".remove").click()
    expect(card).to_have_count(0)


def test_a_captioner_that_answers_nothing_has_no_field_for_questions(browser: Browser, tmp_path: Path) -> None:
    captioner = Captioner.from_pretrained(save_captioner(tmp_path / "c", prompts=[("synthetic", "brief")]), device="cpu")
    with running(CaptionServer(captioner, NAME)) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#style option")).to_have_text("brief")
        expect(page.locator("#question")).to_be_hidden()
        page.close()


def test_several_photos_are_asked_about_in_turn_and_bad_files_are_named(
    page: Page, photos: list[Path], captioner: Captioner, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(photos[0].read_bytes()[:80])
    (tmp_path / "notes.txt").write_text("no image")
    page.locator("#style").select_option("detailed")
    page.locator("#files").set_input_files(photos)
    expect(page.locator(".photo .text")).to_have_text(captioner.caption(photos[::-1], style="detailed"))
    page.locator("#files").set_input_files(tmp_path / "broken.png")
    expect(page.locator(".photo .text.bad")).to_contain_text("broken.png: cannot read the image")
    page.get_by_role("button", name="Remove broken.png").click()
    page.locator("#files").set_input_files(tmp_path / "notes.txt")
    expect(page.locator("#status")).to_have_text("notes.txt is not an image")
    expect(page.locator(".photo")).to_have_count(2)
