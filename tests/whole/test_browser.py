"""Report in a real browser, opened from disk: search, reviews and their export."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, expect

from pipeline.dataset.directory import DatasetDir, open_dataset
from pipeline.dataset.reviews import Review, read_stored
from pipeline.dataset.version import Version
from pipeline.report.build import write_report
from pipeline.tables import SPLITS, Extras
from tests.browser import PHONE, WIDE, Open, violations
from tests.hostile import LONG
from tests.scene_data import make_version, scene_samples, true_captions
from tests.whole.conftest import Run

expect.set_options(timeout=120_000)  # long, because it only ends a test that hangs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Return a version whose run rejected a near-duplicate image and a duplicate text."""
    folder = tmp_path_factory.mktemp("dataset")
    reasons = {"duplicate": 1, "near_duplicate_image": 1}
    dedupe = {"step": "dedupe", "unit": "annotations", "input": 4, "kept": 2, "rejected": reasons}
    version, _ = make_version(folder, scene_samples(120), funnel=[dedupe])
    a, b = (sample.id for sample in scene_samples(2))
    lost = [
        {"sample_id": a, "clean_text": "a red ring", "reason": "duplicate"},
        {"sample_id": b, "clean_text": "A dot.", "reason": "near_duplicate_image", "near_duplicate_of": a},
    ]
    columns = ("sample_id", "near_duplicate_of", "clean_text", "reason")
    schema = pa.schema([(name, pa.string()) for name in columns])
    (folder / "steps/dedupe").mkdir(parents=True)
    for name, rows in {"kept": [{"sample_id": a}, {"sample_id": b}], "rejected": lost}.items():
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / "steps/dedupe" / f"{name}.parquet")
    return version


@pytest.fixture(scope="module")
def report(dataset: Version) -> Path:
    return write_report(dataset, dataset.dataset_dir)


@pytest.fixture
def page(opened: Open, report: Path) -> Page:
    return opened(report)


def text_of(page: Page, number: int = 0) -> Any:
    return page.locator("#images .texts > li").nth(number)


def result_count(page: Page, section: str = "images") -> str:
    return page.locator(f"#{section} output").inner_text()


def test_search_and_filters_show_matching_images(page: Page, dataset: Version) -> None:
    assert result_count(page) == "1 to 48 of 120 found, 120 in this report"
    tests = dataset.manifest["rows"]["test"]
    page.get_by_label("Split").select_option("test")
    assert f"of {tests} found" in result_count(page)
    page.get_by_label("Split").select_option("")
    source = page.locator("#images article img").first.get_attribute("src") or ""
    page.get_by_label("Search texts").fill("PURPLE RING")
    articles = page.locator("#images article")
    captions = [row for split in SPLITS for row in dataset.read(split, ["captions"])["captions"].to_pylist()]
    texts = [" ".join(caption["text"] for caption in row) for row in captions]
    assert articles.count() == sum("purple ring" in text for text in texts)
    assert all("purple ring" in text.lower() for text in articles.all_inner_texts())
    for absent in ('no such "text" \\', source[-40:-20], "webp"):  # image data is not searched
        page.get_by_label("Search texts").fill(absent)
        assert result_count(page) == "0 found, 120 in this report"


def test_lowest_scores_come_first(opened: Open, tmp_path: Path) -> None:
    samples = scene_samples(60)
    captions = true_captions(samples)
    samples = [replace(sample, source_row=f"{'ab'[n % 2]}/{n}.png") for n, sample in enumerate(samples)]
    samples = [replace(sample, context=(("title", f"<b>Lamp {n}</b>"),)) for n, sample in enumerate(samples)]
    shares = [n % 17 / 16 for n in range(captions.num_rows)]
    captions = captions.append_column("coverage", pa.array(shares, pa.float64()))
    version, _ = make_version(tmp_path, samples, captions, extras=Extras(("coverage",), ("title",)))
    page = opened(write_report(version, tmp_path))
    page.get_by_label("Order").select_option("coverage")
    scores = [
        min(float(score) for score in re.findall(r"coverage ([\d.]+)", text))
        for text in page.locator("#images article").all_inner_texts()
    ]
    assert scores == sorted(scores) and scores[0] == 0
    page.get_by_label("Kind of text").select_option("detailed")  # the order follows the selected kind of text
    first = page.locator("#images article").first.locator("li", has_text="detailed").inner_text()
    assert "coverage 0\n" in f"{first}\n"
    page.get_by_label("Folder").select_option("b")
    assert "of 30 found" in result_count(page)
    page.get_by_label("Folder").select_option("")
    page.get_by_label("Search texts").fill("lamp 17<")
    page.get_by_text("context", exact=True).click()
    expect(page.get_by_text("title: <b>Lamp 17</b>")).to_be_visible()
    page.get_by_text("Meaning of the scores").click()
    expect(page.get_by_text("that the caption alone answers correctly")).to_be_visible()


def test_clicks_and_keys_open_images_and_turn_pages_but_keys_do_nothing_while_typing(page: Page) -> None:
    small, large = page.locator("#images article img").first, page.locator("#large img")
    first = page.locator("#images article code").first.inner_text()
    small.click()
    expect(large).to_be_visible()
    assert large.get_attribute("src") == small.get_attribute("src")
    assert large.bounding_box()["width"] > 2 * small.bounding_box()["width"]  # type: ignore[index]
    large.click()
    expect(large).to_be_hidden()
    page.keyboard.press("j")
    page.keyboard.press("o")
    expect(large).to_be_visible()
    page.keyboard.press("Escape")
    expect(large).to_be_hidden()
    page.get_by_role("button", name="Next", exact=True).first.click()
    assert result_count(page).startswith("49 to 96 of")
    assert page.locator("#images article code").first.inner_text() != first
    page.keyboard.press("n")
    page.keyboard.press("n")  # there is no fourth page
    assert result_count(page).startswith("97 to 120 of")
    expect(page.locator("#images [data-turn='1']").first).to_be_disabled()
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert page.locator("#images article code").first.inner_text() == first
    page.keyboard.press("/")
    page.keyboard.type("gbn")
    assert page.get_by_label("Search texts").input_value() == "gbn"
    expect(page.locator("#reviewed")).to_have_text("nothing reviewed yet")
    page.get_by_role("button", name="Keys").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_texts_are_reviewed_by_keyboard_and_reviews_survive_reload(page: Page) -> None:
    for key in "jgjbk":
        page.keyboard.press(key)
    expect(text_of(page, 0)).to_be_focused()
    page.get_by_label("Why it is bad").select_option("unclear")
    page.reload()
    expect(page.locator("#reviewed")).to_have_text("1 good, 1 bad, 0 edited")
    expect(text_of(page, 0).get_by_role("button", name="Good")).to_have_attribute("aria-pressed", "true")
    assert page.get_by_label("Why it is bad").input_value() == "unclear"
    page.get_by_label("Review").select_option("bad")
    assert result_count(page).startswith("1 to 1 of 1 found")
    text_of(page, 1).get_by_role("button", name="Bad").click()  # a second click removes the review
    expect(page.locator("#reviewed")).to_have_text("1 good, 0 bad, 0 edited")


def test_edit_can_be_undone_and_a_verdict_replaces_it_only_after_confirmation(page: Page) -> None:
    shown, field = text_of(page).locator("p"), page.get_by_label("text", exact=True)
    before = shown.inner_text()
    page.keyboard.press("j")
    page.keyboard.press("e")
    page.keyboard.press("Escape")  # nothing was changed
    assert shown.inner_text() == before
    text_of(page).get_by_role("button", name="Edit").click()
    field.fill("  Something   else. ")
    page.keyboard.press("Escape")
    expect(text_of(page).locator("output")).to_contain_text("Ctrl+Enter saves the edit")
    assert field.input_value() == "  Something   else. "
    page.get_by_role("button", name="Cancel").click()
    assert shown.inner_text() == before
    text_of(page).get_by_role("button", name="Edit").click()
    field.fill("  Something   else. ")
    page.keyboard.press("Control+Enter")
    answers = iter([False, True])
    page.on("dialog", lambda dialog: dialog.accept() if next(answers) else dialog.dismiss())
    page.keyboard.press("g")
    expect(page.locator("#reviewed")).to_have_text("0 good, 0 bad, 1 edited")
    assert shown.inner_text() == "Something else."
    page.keyboard.press("e")
    field.fill(before)
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#reviewed")).to_have_text("nothing reviewed yet")
    page.keyboard.press("e")
    field.fill("Something else.")
    page.get_by_role("button", name="Save").click()
    page.keyboard.press("g")
    expect(page.locator("#reviewed")).to_have_text("1 good, 0 bad, 0 edited")


def test_edit_begins_with_unescaped_text(opened: Open, tmp_path: Path) -> None:
    samples = scene_samples(2)
    table = true_captions(samples)
    raw = ["A ring\nbelow a dot.", "A \u202ereal\u202c ring."] * len(samples)
    table = table.set_column(table.column_names.index("text"), "text", pa.array(raw))
    version, _ = make_version(tmp_path, samples, table)
    page = opened(write_report(version, tmp_path), accept_downloads=True)
    assert text_of(page).locator("p").inner_text() == "A ring[U+000A]below a dot."
    text_of(page).get_by_role("button", name="Edit").click()
    assert page.get_by_label("text", exact=True).input_value() == "A ring\nbelow a dot."
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#reviewed")).to_have_text("nothing reviewed yet")
    text_of(page, 1).get_by_role("button", name="Edit").click()
    field = page.get_by_label("text", exact=True)
    field.fill(field.input_value().replace("ring", "dot"))
    page.get_by_role("button", name="Save").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export reviews").click()
    download.value.save_as(tmp_path / "reviews.jsonl")
    (review,) = read_stored(tmp_path / "reviews.jsonl", Review)
    assert review.text == "A \u202ereal\u202c dot."


def test_two_tabs_keep_all_reviews(page: Page) -> None:
    second_tab = page.context.new_page()
    second_tab.goto(page.url)
    items = "[...document.querySelectorAll('#images .texts > li')]"
    press = f"([first, end]) => {items}.slice(first, end).forEach(i => i.review('good'))"
    for first in range(0, 40, 4):  # both tabs store reviews in turn, without waiting for each other
        page.evaluate(press, [first, first + 2])
        second_tab.evaluate(press, [first + 2, first + 4])
    text_of(page, 40).get_by_role("button", name="Bad").click()
    expect(second_tab.locator("#reviewed")).to_have_text("40 good, 1 bad, 0 edited")
    bad_button = text_of(second_tab, 40).get_by_role("button", name="Bad")
    expect(bad_button).to_have_attribute("aria-pressed", "true")
    text_of(second_tab, 41).get_by_role("button", name="Good").click()
    second_tab.get_by_label("Note").fill("no ring")
    text_of(page, 42).get_by_role("button", name="Good").click()
    page.reload()
    expect(page.locator("#reviewed")).to_have_text("42 good, 1 bad, 0 edited")
    assert page.get_by_label("Note").input_value() == "no ring"


@pytest.mark.parametrize("viewport", [WIDE, PHONE])
def test_first_image_and_its_name_are_on_the_first_screen(
    opened: Open, report: Path, dataset: Version, viewport: dict[str, int]
) -> None:
    page = opened(report, viewport=viewport)
    card = page.locator("#images article").first
    (bottom,) = (box["y"] + box["height"] for box in [card.locator(".about").bounding_box()] if box)
    assert bottom < viewport["height"]
    names = [row for split in SPLITS for row in dataset.read(split, ["source_row"])["source_row"].to_pylist()]
    assert card.locator("code").inner_text() in names


def test_rejected_row_names_and_shows_the_image_that_it_repeats(page: Page) -> None:
    page.get_by_label("Reason").select_option("looks like another image")
    row = page.locator("#rejected tbody tr")
    expect(row.locator(".text")).to_have_text(f"repeats {scene_samples(1)[0].id}")
    first, second = row.locator("img").all()
    assert first.get_attribute("src") != second.get_attribute("src")


LOOKS = [(viewport, scheme) for viewport in (WIDE, PHONE) for scheme in ("light", "dark")]


@pytest.mark.parametrize(("viewport", "scheme"), LOOKS if LONG else LOOKS[1:3])
def test_report_is_accessible(opened: Open, report: Path, viewport: dict[str, int], scheme: str) -> None:
    page = opened(report, viewport=viewport, color_scheme=scheme)
    text_of(page).get_by_role("button", name="Bad").click()
    text_of(page, 1).get_by_role("button", name="Edit").click()
    assert violations(page) == []
    page.get_by_text("How it was made", exact=True).last.click()
    expect(page.get_by_role("region", name="Rows of each step")).to_be_visible()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= viewport["width"]


def test_exported_reviews_make_next_version(opened: Open, synth: Run, tmp_path: Path) -> None:
    assert synth("generate", "--source", "scenes", "--limit", "24").returncode == 0
    assert synth("report").returncode == 0
    page = opened(tmp_path / "data" / "scenes" / "report.html", accept_downloads=True)
    texts = page.locator("#images .texts > li")
    bad, pair = texts.nth(0), texts.filter(has_text="How many").first
    removed = bad.locator("p").inner_text()
    bad.get_by_role("button", name="Bad").click()
    page.get_by_label("Note").fill("the ring is not there")
    pair.get_by_role("button", name="Edit").click()
    page.get_by_label("answer").fill("9")
    page.get_by_role("button", name="Save").click()
    texts.nth(1).get_by_role("button", name="Good").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export reviews").click()
    assert download.value.suggested_filename == "reviews-v1.0.0.jsonl"
    download.value.save_as(tmp_path / "reviews.jsonl")
    done = synth("review", "apply", "reviews.jsonl", "--json")
    assert json.loads(done.stdout)["version"] == "v1.0.1", done.stderr
    assert "review: 3 reviews applied" in done.stderr
    assert "sent 0 requests" in done.stderr
    old, new = (open_dataset(tmp_path / "data" / f"scenes@{name}") for name in ("v1.0.0", "v1.0.1"))
    assert new.manifest["review"] == {"good": 1, "bad": 1, "edited": 1}
    before, after = (version.manifest["measured"]["captions"].values() for version in (old, new))
    assert sum(style["count"] for style in before) - sum(style["count"] for style in after) == 1
    rows = [row for _, batch in new.batches(["captions", "qa"]) for row in batch.to_pylist()]
    assert removed not in {caption["text"] for row in rows for caption in row["captions"]}
    assert [pair["answer"] for row in rows for pair in row["qa"] if pair["prompt_id"] == "review"] == ["9"]
    rejections = DatasetDir(tmp_path / "data" / "scenes").version().path / "about/rejections.parquet"
    assert "reviewed_not_true" in pa.parquet.read_table(rejections)["reason"].to_pylist()
    texts_of_files = [path.read_text(errors="replace") for path in new.path.rglob("*.*")]
    assert "ring is not there" not in "".join(texts_of_files)
    rerun = synth("generate", "--source", "scenes", "--limit", "24")  # a later run keeps the reviews
    assert "nothing new: v1.0.1" in rerun.stderr, rerun.stderr
