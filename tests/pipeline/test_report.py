"""The report: one file that needs no network, in which text of a model is only text."""

import html
import json
import re
from pathlib import Path

import pyarrow as pa

from pipeline.report import newest_checkpoint, write_report
from pipeline.source.scenes import draw_deck
from tests.scene_data import make_version, scene_samples, true_captions

HOSTILE = '<script>alert(1)</script><img src=x onerror="a()"></script>\u202e{{ 7*7 }} & "quoted"'


def hostile_captions(count: int) -> pa.Table:
    table = true_captions(scene_samples(count))
    return table.set_column(table.column_names.index("text"), "text", pa.array([HOSTILE] * table.num_rows))


def test_text_of_a_model_never_becomes_markup(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(12), hostile_captions(12))
    page = write_report(version, tmp_path).read_text()
    assert page.count("<script") == 1  # our own
    assert "<img src=x" not in page
    assert html.escape(HOSTILE)[:40] in page
    assert "49" not in re.sub(r"data:[^\"]*|<style>.*?</style>|[0-9a-f]{12,}", "", page, flags=re.DOTALL)


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    version, _ = make_version(tmp_path, scene_samples(12))
    page = write_report(version, tmp_path).read_text()
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"(?!data:image/png;base64,)", page) == []
    assert page.count("data:image/png;base64,") == 12


def test_the_training_is_shown_with_both_scores(tmp_path: Path) -> None:
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
    assert page.count("<script") == 1


def test_a_deck_is_shown_with_all_its_pages(tmp_path: Path) -> None:
    samples = [draw_deck(0, index) for index in range(3)]
    pair = {"question": "Which page is gray?", "answer": "2", "answer_type": "span", "evidence_pages": [2], "expression": ""}
    rows = [{"sample_id": s.id, "task": "deck_qa", "prompt_id": "p", "style": "", "split": "train", **pair} for s in samples]
    version, _ = make_version(tmp_path, samples, pa.Table.from_pylist(rows))
    assert "pages" in version.manifest["columns"]
    assert not {"image", "facts", "reference_qa"} & set(version.manifest["columns"])
    page = write_report(version, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 12
    assert "page 4" in page
