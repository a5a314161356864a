"""Audit in a real browser: reviewers judge a random sample, and the next version states its error rate."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import Verdict, read_stored
from tests.browser import PHONE, WIDE, Open, violations
from tests.commands import require_success
from tests.whole.conftest import Run

SCENES = ("generate", "--source", "scenes", "--limit", "30")


def start(opened: Open, path: Path, reviewer: str, viewport: dict[str, int]) -> Page:
    page = opened(path, accept_downloads=True, viewport=viewport)
    page.get_by_label("Your name").fill(reviewer)
    page.keyboard.press("Enter")
    return page


def export(page: Page, path: Path) -> None:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export verdicts").click()
    download.value.save_as(path)


@pytest.fixture
def audit(synth: Run, tmp_path: Path) -> Path:
    """Generate scenes, and return the page of an audit of 12 texts."""
    require_success(synth(*SCENES))
    done = require_success(synth("review", "sample", "-n", "12"))
    assert "drew 12 texts of v1.0.0" in done.stderr
    return tmp_path / done.stdout.strip()


def test_two_reviewers_give_an_error_rate(audit: Path, opened: Open, synth: Run, tmp_path: Path) -> None:
    for reviewer, viewport in (("Anna", WIDE), ("Ben <b>", PHONE)):
        page, state = start(opened, audit, reviewer, viewport), "#state"
        for number in range(22):
            if number == 3:
                assert violations(page) == []
                assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
                page.keyboard.press("3")  # a wrong color
            else:
                page.keyboard.press("c" if number == 5 else "r")
        expect(page.locator(state)).to_contain_text("22 of 22 reviewed (20 right, 1 wrong, 1 unclear)")
        export(page, tmp_path / f"{reviewer[:3]}.jsonl")
    exported = read_stored(tmp_path / "Ben.jsonl", Verdict)
    assert sum(verdict.repeat for verdict in exported) == 10
    assert [verdict.error for verdict in exported if verdict.verdict == "wrong"] == ["color"]
    applied = require_success(synth("review", "apply", "Ann.jsonl", "Ben.jsonl", "--json"))
    result = json.loads(applied.stdout)
    assert result["version"] == "v1.0.1" and "sent 0 requests" in applied.stderr
    assert "texts of the version are wrong (12 reviewed)" in applied.stderr
    assert "texts that were judged twice have different verdicts" in applied.stderr
    dataset = DatasetDir(tmp_path / "data" / "scenes")
    old, new = (dataset.version(name) for name in ("v1.0.0", "v1.0.1"))
    assert new.manifest["digest"] == old.manifest["digest"] and new.manifest["review"] == {}
    stated = new.manifest["audit"]
    assert (stated["reviewed"], stated["reviewers"]) == (12, 2)
    assert sum(rate["reviewed"] for rate in stated["rates"]) == 12
    assert 0 <= stated["version"]["low"] <= stated["version"]["wrong"] < stated["version"]["high"]
    card = (new.path / "README.md").read_text()
    assert "texts of the version are wrong" in card and "not measured" not in card
    assert "Anna" not in card and "Anna" not in (new.path / "manifest.json").read_text()
    assert "Wrong texts: not measured" in (old.path / "README.md").read_text()
    sampled = require_success(synth("review", "sample", "-n", "12", "--tool", "label-studio"))
    tasks = json.loads((tmp_path / sampled.stdout.strip() / "tasks.json").read_text())
    result = [{"type": "choices", "from_name": "verdict", "value": {"choices": ["right"]}}]
    answered = [task | {"annotations": [{"completed_by": 1, "result": result}]} for task in tasks]
    (tmp_path / "export.json").write_text(json.dumps(answered))
    require_success(synth("review", "apply", "export.json"))
    assert dataset.version("v1.0.2").manifest["audit"]["reviewers"] == 3
    report = opened(tmp_path / require_success(synth("report")).stdout.strip())
    expect(report.get_by_role("region", name="Share of wrong texts")).to_contain_text("captions")
    rerun = require_success(synth(*SCENES))
    assert "nothing new: v1.0.2" in rerun.stderr


def test_reviewer_can_undo_and_resume_verdicts(audit: Path, opened: Open, synth: Run, tmp_path: Path) -> None:
    page = start(opened, audit, "Anna", WIDE)
    state, words = page.locator("#state"), page.locator("#words")
    second = ""
    for key in "rwkr":
        page.keyboard.press(key)
        second = second or words.inner_text()
    expect(state).to_contain_text("2 of 22 reviewed (2 right, 0 wrong")
    page.keyboard.press("u")  # undo restores the earlier verdict "wrong"
    expect(state).to_contain_text("2 of 22 reviewed (1 right, 1 wrong")
    assert words.inner_text() == second
    page.keyboard.press("u")
    expect(state).to_contain_text("1 of 22 reviewed (1 right, 0 wrong")
    page.reload()
    expect(state).to_contain_text("Anna: 1 of 22 reviewed")
    assert words.inner_text() == second
    export(page, tmp_path / "anna.jsonl")
    require_success(synth("review", "apply", "anna.jsonl"))
    require_success(synth("review", "sample", "-n", "12"))
    again = start(opened, audit, "Anna", WIDE)  # in another browser, the page has the applied verdicts
    expect(again.locator("#state")).to_contain_text("Anna: 1 of 22 reviewed")
    everything = require_success(synth("review"))
    assert tmp_path / everything.stdout.strip() == audit and "which are all" in everything.stderr
    require_success(synth("review", "sample", "-n", "12", "--seed", "1"))
    other = start(opened, audit, "Anna", WIDE)  # verdicts belong to a seed
    expect(other.locator("#state")).to_contain_text("Anna: 0 of 22 reviewed")
    again.get_by_role("button", name="Change reviewer").click()
    again.get_by_label("Your name").fill("Ben")
    again.keyboard.press("Enter")
    expect(again.locator("#state")).to_contain_text("Ben: 0 of 22 reviewed")
