"""The result: its tables, and a page that escapes the texts of models."""

import html
import json
import re
from pathlib import Path

import pytest

from tests.browser import PHONE, WIDE, Open, violations
from tests.scene_data import make_version, scene_samples
from trainer.config import TrainConfig
from trainer.experiment.grid import Cell
from trainer.experiment.report import write_result
from trainer.experiment.runs import Run

HOSTILE = '<script>alert(1)</script>|</td>\u202e{{ 7*7 }} "quoted"'
QUESTIONS = {"number": {"count": 3, "accuracy": 0.75, "shuffled": 0.2, "majority": 0.25}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Return finished runs of two arms with two seeds each."""
    version, _ = make_version(tmp_path / "d", scene_samples(40))
    ids = version.read("test", ["sample_id"])["sample_id"].to_pylist()
    scores = {"scores": {"bleu_4": 0.1, "rouge_l": 0.5}, "words": {"mean": 3.0, "of_references": 3.0}}
    finished = []
    for data, caption, base, words in (("facts", "a red ring", 4.0, 300), (HOSTILE, HOSTILE, 2.0, 400)):
        metrics = scores | ({"questions": QUESTIONS} if data == "facts" else {})
        row = {"caption": caption, "references": ["a red ring", HOSTILE.lower()], "shuffled_cider_d": 0.5}
        for seed in (0, 1):
            folder = tmp_path / "cells" / f"{base}-{seed}"
            folder.mkdir(parents=True)
            scored = [
                {"sample_id": name, "cider_d": base + n / 10 + seed / 100} for n, name in enumerate(ids)
            ]
            lines = [{"step": step, "validation_cider_d": base * step / 10} for step in (5, 10)]
            (folder / "captions.jsonl").write_text(
                "".join(json.dumps(row | values) + "\n" for values in scored)
            )
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (folder / "metrics.json").write_text(json.dumps(metrics))
            cell = Cell(data, "tiny-clip", "scratch", 0, seed, TrainConfig(text_source="human"))
            finished.append(Run(cell, version, cell.config, folder, frozenset(ids), 24, words))
    return finished


def test_experiment_tables_contain_scores_and_verdicts(runs: list[Run], tmp_path: Path) -> None:
    result = write_result(runs, tmp_path)
    assert json.loads((tmp_path / "experiment.json").read_text()) == json.loads(json.dumps(result))
    facts, hostile = result["arms"]
    assert facts["cider_d"] - hostile["cider_d"] == pytest.approx(2.0)
    assert result["words_differ"] and "number of words differs" in (tmp_path / "experiment.md").read_text()
    (difference,) = result["differences"]
    assert difference["verdict"] == "worse" and difference["difference"] == pytest.approx(-2.0)
    table = (tmp_path / "experiment.md").read_text().splitlines()
    assert table[2].startswith("| facts, tiny-clip, scratch | 2 | ")
    # A bar in a name does not start a new cell.
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in table[:4]}) == 1


def test_page_escapes_texts_of_models(runs: list[Run], tmp_path: Path) -> None:
    write_result(runs, tmp_path)
    page = (tmp_path / "experiment.html").read_text()
    assert "<script" not in page and html.escape(HOSTILE)[:30] in page
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"(?!data:image/webp;base64,)", page) == []


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_page_is_accessible_and_fits_the_screen(
    runs: list[Run], tmp_path: Path, opened: Open, viewport: dict[str, int]
) -> None:
    write_result(runs, tmp_path)
    page = opened(tmp_path / "experiment.html", viewport=viewport)
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert HOSTILE.split("\u202e")[0] in page.locator("main").inner_text()
