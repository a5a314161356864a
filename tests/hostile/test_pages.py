"""Pages: every string of a version is a vector, in a real browser, in the report and in the card as a careless site has it."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from markdown_it import MarkdownIt
from playwright.sync_api import Page

from pipeline.dataset.card import render_card
from pipeline.report.build import write_report
from pipeline.types import ReferenceQA
from tests.browser import Open
from tests.hostile.vectors import ALL
from tests.pipeline.dataset.test_card import MANIFEST, sample
from tests.scene_data import PROVENANCE, make_version, scene_samples, true_captions

TEXTS = [vector.encode("utf-8", "replace").decode() or "-" for vector in ALL]  # what a table can hold


def require_untouched(page: Page) -> None:
    """Fail if anything of a vector has become an element, an attribute or a change of the page."""
    assert (
        page.evaluate("[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames()).filter(n => /^on/.test(n))")
        == []
    )
    assert page.locator("iframe, object, embed, base, svg animate, math, meta[http-equiv=refresh]").count() == 0
    addresses = page.evaluate(
        "[...document.querySelectorAll('[href], [src]')].map(e => e.getAttribute('href') || e.getAttribute('src'))"
    )
    assert not [address for address in addresses if "evil" in address or address.startswith("javascript:")]
    assert page.evaluate("[...document.querySelectorAll('a')].every(a => a.protocol !== 'javascript:')")


def test_no_string_of_a_version_is_more_than_text_in_its_report(opened: Open, tmp_path: Path) -> None:
    samples = [
        replace(
            one,
            source_row=text,
            references=(text, text),
            reference_qa=(ReferenceQA(question=text, answers=(text,)),),
            license=text.replace("\n", " "),
        )
        for one, text in zip(scene_samples(len(TEXTS)), TEXTS, strict=True)
    ]
    table = true_captions(samples)
    texts = [text for text in TEXTS for _ in range(table.num_rows // len(TEXTS))]
    for name in ("text", "style"):
        table = table.set_column(table.column_names.index(name), name, pa.array(texts))
    for number, text in enumerate(TEXTS[:4]):
        provenance = PROVENANCE | {
            "source": {"name": text, "revision": text},
            "model": {"name": text, "revision": text},
            "title": text,
        }
        folder = tmp_path / str(number)
        version, _ = make_version(folder, samples, table, source=text, provenance=provenance)
        page = opened(write_report(version, folder))
        page.on("dialog", lambda dialog: dialog.dismiss())
        require_untouched(page)
        assert page.locator("#images article").count() == min(48, len(TEXTS))
        page.get_by_role("button", name="Next", exact=True).first.click()
        require_untouched(page)


def test_no_string_of_a_manifest_is_more_than_text_in_a_card_that_is_shown_as_it_is(opened: Open, tmp_path: Path) -> None:
    for number, text in enumerate(ALL):
        values = MANIFEST | {
            "title": text, "source": {"name": text, "revision": text}, "model": {"name": text, "revision": text},
            "prompts": {text: text}, "schemas": {text: {text: text}}, "licenses": [text],
            "measured": {"captions": {text: {"count": 9, "mean_words": 7.5}}},
        }  # fmt: skip
        body = render_card(values, [sample(text)]).split("---\n", 2)[2]
        page_file = tmp_path / f"{number}.html"
        page_file.write_text(
            f"<!doctype html><meta charset=utf-8>{MarkdownIt('gfm-like', {'html': True, 'linkify': False}).render(body)}"
        )
    page = opened(tmp_path / "0.html")
    for number in range(len(ALL)):
        page.goto((tmp_path / f"{number}.html").as_uri())
        require_untouched(page)
        assert page.locator("script, img").count() == 0
