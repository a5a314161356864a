"""Report files: one file or a folder, with escaped model text."""

import html
import json
import re
from base64 import b64decode
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import DECKS
from pipeline.report import build
from pipeline.report.build import THUMBNAIL_BYTES, write_report
from pipeline.report.html import script_hash
from pipeline.sources.scenes import draw_sample
from tests.scene_data import make_version, scene_samples, true_captions

HOSTILE = '<script>alert(1)</script><img src=x onerror="a()"></script>\u202e{{ 7*7 }} & "quoted"'


def hostile_captions(count: int) -> pa.Table:
    table = true_captions(scene_samples(count))
    return table.set_column(table.column_names.index("text"), "text", pa.array([HOSTILE] * table.num_rows))


def test_page_escapes_model_text_and_allows_only_its_own_scripts(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(12), hostile_captions(12))
    page = write_report(version, tmp_path).read_text()
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == page.count("<script") == page.count("</script") == 3
    assert "<img src=x" not in page
    assert json.dumps(HOSTILE[:40]).replace("<", "\\u003c")[:-1] in scripts[1]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    hashes = " ".join(html.escape(script_hash(script), quote=True) for script in scripts)
    assert html.unescape(policy).endswith(f"script-src {html.unescape(hashes)}")
    assert "default-src 'none'" in policy
    assert re.findall(r"(?:src|href)=\"(?!data:image/webp;base64,|#)", page) == []
    assert page.count("data:image/webp;base64,") == 12


def test_rows_of_large_report_are_in_several_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SMALL_REPORT_IMAGES", 10)
    monkeypatch.setattr(build, "SCRIPT_ROWS", 16)
    version, _ = make_version(tmp_path, scene_samples(40))
    page = write_report(version, tmp_path).read_text()
    parts = [json.loads(part) for part in re.findall(r'add\("images", (.*)\);', page)]
    assert [len(rows) for rows in parts] == [16, 16, 8]
    thumbnails = [b64decode(url.partition(",")[2]) for rows in parts for row in rows for url in row["images"]]
    assert len(thumbnails) == 40 and max(map(len, thumbnails)) <= THUMBNAIL_BYTES


def test_large_report_shows_images_with_lowest_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MAX_IMAGES", 15)
    version, _ = make_version(tmp_path, scene_samples(40))
    page = write_report(version, tmp_path).read_text()
    assert "15 of 40 images, drawn at random, are in this report" in page
    ids = {sample.id for sample in scene_samples(40)}
    assert set(re.findall(r'"id":"([0-9a-f]{64})"', page)) == set(sorted(ids)[:15])


def test_step_with_lost_rows_is_marked(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(4))
    counts = {"unit": "images", "kept": 3, "rejected": {"too_small": 1}}
    funnel = [{"step": "read", "input": 4, **counts}, {"step": "filter", "input": 5, **counts}]
    version.manifest["funnel"] = funnel
    assert write_report(version, tmp_path).read_text().count("rows are missing") == 1


def test_deck_is_shown_with_all_its_pages(tmp_path: Path) -> None:
    samples = [draw_sample(0, index, DECKS) for index in range(3)]
    pair = {"question": "Which page is gray?", "answer": "2", "answer_type": "span", "evidence_pages": [2]}
    pair |= {"expression": "", "task": "deck_qa", "prompt_id": "p", "style": "", "split": "train"}
    rows = [{"sample_id": sample.id, **pair} for sample in samples]
    version, _ = make_version(tmp_path, samples, pa.Table.from_pylist(rows))
    assert "pages" in version.manifest["columns"]
    assert not {"image", "reference_qa"} & set(version.manifest["columns"])
    page = write_report(version, tmp_path).read_text()
    assert page.count("data:image/webp;base64,") == 12
    assert page.count('"evidence_pages":[2]') == 3
