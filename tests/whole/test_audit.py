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
        for number in range(12):
            if number == 3:
                page.keyboard.press("w")
                page.keyboard.press("ArrowRight")
                page.keyboard.press("Space")
                assert violations(page) == []
                assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
                page.keyboard.press("Enter")
            else:
                page.keyboard.press("c" if number == 5 else "r")
        expect(page.locator(state)).to_contain_text("12 of 12 reviewed (10 right, 1 wrong, 1 cannot tell)")
        export(page, tmp_path / f"{reviewer[:3]}.jsonl")
    assert [len(verdict.words) for verdict in read_stored(tmp_path / "Ben.jsonl", Verdict)].count(1) == 1
    applied = require_success(synth("review", "apply", "Ann.jsonl", "Ben.jsonl", "--json"))
    result = json.loads(applied.stdout)
    assert result["version"] == "v1.0.1" and "sent 0 requests" in applied.stderr
    assert "reviewed; by 2 reviewers, agreement 1.00" in applied.stderr
    dataset = DatasetDir(tmp_path / "data" / "scenes")
    old, new = (dataset.version(name) for name in ("v1.0.0", "v1.0.1"))
    assert new.manifest["digest"] == old.manifest["digest"] and new.manifest["review"] == {}
    stated = new.manifest["audit"]
    assert (stated["reviewed"], stated["reviewers"], stated["agreement"]) == (12, 2, 1.0)
    totals = [rate for rate in stated["rates"] if not rate["style"]]
    assert sum(rate["reviewed"] for rate in totals) == 12
    assert sum(rate["wrong"] > 0 for rate in totals) == 1
    card = (new.path / "README.md").read_text()
    assert "% of captions are wrong" in card and "not measured" not in card
    assert "Anna" not in card and "Anna" not in (new.path / "manifest.json").read_text()
    assert "Share of wrong texts: not measured" in (old.path / "README.md").read_text()
    sampled = require_success(synth("review", "sample", "-n", "12", "--tool", "label-studio"))
    tasks = json.loads((tmp_path / sampled.stdout.strip() / "tasks.json").read_text())
    result = [{"type": "choices", "value": {"choices": ["right"]}}]
    exported = [task | {"annotations": [{"completed_by": 1, "result": result}]} for task in tasks]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    assert "by 3 reviewers" in require_success(synth("review", "apply", "export.json")).stderr
    report = opened(tmp_path / require_success(synth("report")).stdout.strip())
    expect(report.get_by_role("region", name="Share of wrong texts")).to_contain_text("captions")
    rerun = require_success(synth(*SCENES))
    assert "nothing new: v1.0.2" in rerun.stderr


def test_reviewer_can_undo_and_resume_verdicts(audit: Path, opened: Open, synth: Run, tmp_path: Path) -> None:
    page = start(opened, audit, "Anna", WIDE)
    state, words = page.locator("#state"), page.locator("#words")
    second = ""
    for key in "rwr":
        page.keyboard.press(key)
        second = second or words.inner_text()
    expect(state).to_contain_text("2 of 12 reviewed (2 right, 0 wrong")
    page.keyboard.press("u")  # undo restores the earlier verdict "wrong"
    expect(state).to_contain_text("2 of 12 reviewed (1 right, 1 wrong")
    assert words.inner_text() == second
    page.keyboard.press("u")
    expect(state).to_contain_text("1 of 12 reviewed (1 right, 0 wrong")
    page.reload()
    expect(state).to_contain_text("Anna: 1 of 12 reviewed")
    assert words.inner_text() == second
    export(page, tmp_path / "anna.jsonl")
    require_success(synth("review", "apply", "anna.jsonl"))
    require_success(synth("review", "sample", "-n", "12"))
    again = start(opened, audit, "Anna", WIDE)  # in another browser, the page has the applied verdicts
    expect(again.locator("#state")).to_contain_text("Anna: 1 of 12 reviewed")
    again.get_by_role("button", name="Change reviewer").click()
    again.get_by_label("Your name").fill("Ben")
    again.keyboard.press("Enter")
    expect(again.locator("#state")).to_contain_text("Ben: 0 of 12 reviewed")
