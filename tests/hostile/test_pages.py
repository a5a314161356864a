"""In a real browser, an attack in any string of a version stays text in report and audit."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from playwright.sync_api import Page, expect

from pipeline.dataset import audit as audits
from pipeline.dataset.directory import DatasetDir
from pipeline.report import audit_sample
from pipeline.report.audit_sample import PAGE, write_audit
from pipeline.report.build import write_report
from pipeline.storage.files import write_table
from pipeline.tables import FINAL, REVIEW
from pipeline.types import ReferenceQA
from tests.browser import Open
from tests.hostile.vectors import ALL
from tests.scene_data import PROVENANCE, make_version, scene_samples, true_captions

MORE = ("evidence_pages", "expression", "answer_type")
# Arrow tables cannot hold lone surrogates.
TEXTS = [vector.encode("utf-8", "replace").decode() or "-" for vector in ALL]


def require_untouched(page: Page) -> None:
    """Fail if an attack added an element or attribute, or changed the page."""
    names = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not [name for name in page.evaluate(names) if name.startswith("on")]
    elements = "iframe, object, embed, base, svg animate, math, meta[http-equiv=refresh]"
    assert page.locator(elements).count() == 0
    for attribute in ("href", "src"):
        values = f"[...document.querySelectorAll('[{attribute}]')].map(e => e.getAttribute('{attribute}'))"
        for address in page.evaluate(values):
            assert "evil" not in address and not address.startswith("javascript:")
    assert page.evaluate("[...document.querySelectorAll('a')].every(a => a.protocol !== 'javascript:')")


def test_strings_from_a_version_are_escaped_in_the_report(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = scene_samples(len(TEXTS))
    samples = [
        replace(
            one, source_row=text, references=(text, text), license=text.replace("\n", " "),
            reference_qa=(ReferenceQA(question=text, answers=(text,)),),
        )
        for one, text in zip(drawn, TEXTS, strict=True)
    ]  # fmt: skip
    table = true_captions(drawn)
    texts = [text for text in TEXTS for _ in range(table.num_rows // len(TEXTS))]
    for name in ("text", "style"):
        table = table.set_column(table.column_names.index(name), name, pa.array(texts))
    text = " ".join(TEXTS[:13])
    names = {"name": text, "revision": text}
    provenance = PROVENANCE | {"source": names, "model": names, "title": text}
    version, _ = make_version(tmp_path, samples, table, source=text, provenance=provenance)
    page = opened(write_report(version, tmp_path))
    page.on("dialog", lambda dialog: dialog.dismiss())
    require_untouched(page)
    assert page.locator("#images article").count() == min(48, len(TEXTS))
    page.get_by_role("button", name="Next", exact=True).first.click()
    require_untouched(page)
    monkeypatch.setattr(audit_sample, "steps_match", lambda *_: True)
    kept = table.select([name for name in table.column_names if name in {*audits.TEXTS, *MORE}])
    kept = kept.append_column("review", pa.nulls(len(kept), REVIEW))
    for name in (*audits.CHECKED, *audits.TEXTS, *MORE, *FINAL.names):
        if name not in kept.column_names:
            source = name.replace("final_", "").replace("clean_", "")
            values = table[source] if source in ("text", "style") else pa.nulls(len(kept), pa.string())
            kept = kept.append_column(name, values)
    write_table(DatasetDir(tmp_path).step_file("review"), [kept], kept.schema)
    audit, number = write_audit(version, DatasetDir(tmp_path), 100, 0, PAGE)
    page = opened(audit)
    page.get_by_label("Your name").fill(TEXTS[0])
    page.keyboard.press("Enter")
    number += max(10, number // 5)  # texts that are shown twice
    for _ in range(number):
        require_untouched(page)
        page.keyboard.press("r")
    expect(page.locator("#state")).to_contain_text(f"{number} of {number} reviewed")
