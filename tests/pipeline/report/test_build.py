"""Report files: one file or a folder, with escaped model text."""

import html
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DECKS
from pipeline.errors import ConfigError
from pipeline.report import build
from pipeline.report.build import THUMBNAIL_BYTES, newest_checkpoint, write_report
from pipeline.report.html import script_hash
from pipeline.sources.scenes import draw_sample
from tests.scene_data import make_version, pulled, scene_samples, true_captions

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


def test_large_version_report_is_a_folder_of_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ONE_FILE_ROWS", 10)
    monkeypatch.setattr(build, "PART_ROWS", 16)
    monkeypatch.setattr(build, "BATCH_ROWS", 8)
    version, _ = make_version(tmp_path, scene_samples(40))
    index = write_report(version, tmp_path)
    assert index == tmp_path / "report" / "index.html"
    parts = re.findall(r'<script src="([^"]+)"></script>', index.read_text())
    shown = [
        json.loads((index.parent / part).read_text().removeprefix('add("images", ').removesuffix(");\n"))
        for part in parts
    ]
    assert sum(map(len, shown)) == 40
    assert all(len(rows) <= 24 for rows in shown)
    pictures = sorted(index.parent.glob("thumbnails/*/*.webp"))
    assert {image for rows in shown for row in rows for image in row["images"]} == {
        path.relative_to(index.parent).as_posix() for path in pictures
    }
    assert all(path.stat().st_size <= THUMBNAIL_BYTES for path in pictures)


def test_later_report_removes_files_of_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ONE_FILE_ROWS", 10)
    first, _ = make_version(tmp_path, scene_samples(40))
    write_report(first, tmp_path)
    second, _ = make_version(tmp_path, scene_samples(20))
    index = write_report(second, tmp_path)
    assert len(list(index.parent.glob("thumbnails/*/*.webp"))) == 20
    assert sorted(path.name for path in index.parent.glob("*.js")) == re.findall(
        r'<script src="([^"]+)"', index.read_text()
    )


def test_files_that_synth_did_not_write_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ONE_FILE_ROWS", 10)
    notes = tmp_path / "report" / "notes.js"
    notes.parent.mkdir()
    notes.write_text("let mine;")
    version, _ = make_version(tmp_path, scene_samples(20))
    write_report(version, tmp_path)
    write_report(version, tmp_path, max_rows=5)
    assert notes.read_text() == "let mine;"
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["notes.js"]
    (tmp_path / "report.html").write_text("<h1>my report</h1>")
    with pytest.raises(ConfigError, match=r"report\.html is not a report of synth"):
        write_report(version, tmp_path)


def test_sample_id_with_a_path_writes_no_file_outside_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ONE_FILE_ROWS", 1)
    made, _ = make_version(tmp_path / "d", scene_samples(4))
    version = pulled(made, tmp_path / "home" / "x")
    (shard,) = version.shards("train")
    table = pq.read_table(shard)
    names = [f"../../../../{'x' * n}/\u202e" for n in range(table.num_rows)]
    pq.write_table(
        table.set_column(table.column_names.index("sample_id"), "sample_id", pa.array(names)), shard
    )
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    index = write_report(version, tmp_path)
    assert all(
        path.is_relative_to(index.parent)
        for path in tmp_path.rglob("*")
        if path.is_file() and path not in before
    )
    assert len(list(index.parent.glob("thumbnails/*/*.webp"))) == 4


def test_folder_without_a_training_is_an_error(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(4))
    with pytest.raises(ConfigError, match="nosuch has no finished training"):
        write_report(version, tmp_path, tmp_path / "nosuch")


def test_report_of_too_many_images_shows_those_with_the_lowest_ids(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(40))
    page = write_report(version, tmp_path, max_rows=15).read_text()
    assert "15 of 40 images, drawn at random, are in this report" in page
    ids = {sample.id for sample in scene_samples(40)}
    assert set(re.findall(r'"id":"([0-9a-f]{64})"', page)) == set(sorted(ids)[:15])


def test_training_section_shows_scores_of_own_and_shuffled_images(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(12))
    checkpoint = tmp_path / "checkpoints" / "one"
    checkpoint.mkdir(parents=True)
    lines = [{"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.0}, {"step": 40, "validation_loss": 1.5}]
    (checkpoint / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {
        "images": 3,
        "against": "references of the source",
        "scores": {"cider_d": 4.25},
        "shuffled_scores": {"cider_d": 0.5},
        "shown": [{"sample_id": "abc", "caption": HOSTILE, "references": [HOSTILE]}],
    }
    (checkpoint / "metrics.json").write_text(json.dumps(metrics))
    assert newest_checkpoint(tmp_path) == checkpoint
    page = write_report(version, tmp_path, checkpoint).read_text()
    assert "4.250" in page
    assert "0.500" in page
    assert 'points="280.0,0.0 560.0,80.0"' in page
    assert page.count("<script") == 3


def test_deck_is_shown_with_all_its_pages(tmp_path: Path) -> None:
    samples = [draw_sample(0, index, DECKS) for index in range(3)]
    pair = {
        "question": "Which page is gray?",
        "answer": "2",
        "answer_type": "span",
        "evidence_pages": [2],
        "expression": "",
    }
    rows = [
        {"sample_id": s.id, "task": "deck_qa", "prompt_id": "p", "style": "", "split": "train", **pair}
        for s in samples
    ]
    version, _ = make_version(tmp_path, samples, pa.Table.from_pylist(rows))
    assert "pages" in version.manifest["columns"]
    assert not {"image", "reference_qa"} & set(version.manifest["columns"])
    page = write_report(version, tmp_path).read_text()
    assert page.count("data:image/webp;base64,") == 12
    assert page.count('"evidence_pages":[2]') == 3
