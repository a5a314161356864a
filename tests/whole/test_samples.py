"""With `--samples`, the best of several captions is kept, and with `--pairs` also the worst."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.dataset.version import Version, read_version
from tests.commands import read_result, require_success, run_synth
from tests.hostile import LONG
from tests.whole.test_readers import train_by_trl

IMAGES, SAMPLES = 20, 3
Chosen = tuple[Version, dict[str, Any]]
SETTINGS = "generate: {sample_temperature: 2.0}\n"  # the tiny teacher has confident outputs


def generate(folder: Path, *options: str) -> dict[str, Any]:
    command = ("generate", "--source", "scenes", "--limit", str(IMAGES), "--config", "s.yaml", "--out", "d")
    return read_result(run_synth(*command, "--json", *options, cwd=folder))


def counts(version: Version, name: str) -> dict[str, Any]:
    return next((step for step in version.manifest["funnel"] if step["step"] == name), {})


def captions(version: Version) -> list[dict[str, Any]]:
    rows = [row for _, batch in version.batches(["captions"]) for row in batch.to_pylist()]
    return [caption for row in rows for caption in row["captions"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "s.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def chosen(folder: Path) -> Chosen:
    """Return the version with pairs, and the result of its run. An earlier run made single captions."""
    generate(folder)
    result = generate(folder, "--samples", str(SAMPLES), "--pairs")
    return read_version(folder / "d/versions/v2.0.0"), result


def test_questions_are_not_asked_again_and_the_worst_caption_becomes_the_rejected_text(
    chosen: Chosen, folder: Path
) -> None:
    version, result = chosen
    # The first captions are asked again, for their log-probabilities.
    assert result["requests"]["asked"] == IMAGES * 2 * SAMPLES
    assert counts(version, "ask")["kept"] == IMAGES * (2 * SAMPLES + 1)
    rejected = counts(version, "select")["rejected"]
    assert rejected.keys() == {"not_the_best"} and rejected["not_the_best"] > IMAGES
    assert len(captions(version)) == IMAGES * 2
    assert not any("select" in warning for warning in result.get("warnings", []))
    pairs = [(row["text"], row["rejected"]) for row in captions(version) if row["rejected"]]
    assert 0 < len(pairs) < IMAGES * 2
    assert all(better != worse for better, worse in pairs)
    card = (version.path / "README.md").read_text()
    assert "`captions[].rejected` is the worst of the others" in card and "Scores of the texts" not in card
    assert "without their texts (except `captions[].rejected`)" in card
    assert "rejected" not in version.manifest["measured"].get("scores", {})
    assert run_synth("report", "d", cwd=folder).returncode == 0


def test_text_reviewed_as_bad_is_not_used_as_worse_caption(chosen: Chosen, folder: Path) -> None:
    version, _ = chosen
    rows = [row for _, batch in version.batches(["sample_id", "captions"]) for row in batch.to_pylist()]
    pairs = [(row["sample_id"], pair) for row in rows for pair in row["captions"]]
    sample_id, pair = next((name, pair) for name, pair in pairs if pair["rejected"])
    _, content = text_name({"sample_id": sample_id, "task": "caption", "text": pair["rejected"]})
    review = {"sample_id": sample_id, "content": content, "verdict": "bad", "reason": "private"}
    reviews = DatasetDir(folder / "d").reviews
    reviews.parent.mkdir(exist_ok=True)
    reviews.write_text(json.dumps(review) + "\n")
    again = read_version(folder / generate(folder, "--samples", str(SAMPLES), "--pairs")["path"])
    left = {row["text"]: row["rejected"] for row in captions(again)}
    assert left[pair["text"]] is None
    assert sum(text is not None for text in left.values()) > 0
    reviews.unlink()


def test_changing_the_selection_rule_sends_no_request(chosen: Chosen, folder: Path) -> None:
    checked = ("--samples", str(SAMPLES), "--verify", "alignment")
    generate(folder, *checked)
    aligned = generate(folder, *checked, "--select", "clip")
    assert aligned["requests"]["asked"] == 0
    alone = generate(folder)
    first, last = read_version(folder / "d/versions/v1.0.0"), read_version(folder / alone["path"])
    assert (alone["requests"]["asked"], last.manifest["digest"]) == (0, first.manifest["digest"])
    assert not (folder / "d/steps/select").exists()
    refused = run_synth("export", alone["path"], "--format", "dpo", cwd=folder)
    assert refused.returncode == 1 and "--samples 4 --pairs" in refused.stderr


@pytest.mark.skipif(not LONG, reason="half a minute: make test-long; test_readers.py runs TRL")
def test_trl_trains_on_exported_pairs(chosen: Chosen, folder: Path) -> None:
    require_success(run_synth("export", "d@v2.0.0", "--format", "dpo", "--out", "pairs", cwd=folder))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    train_by_trl("DPO", "pairs", cwd=folder, env=env)


def test_estimate_does_not_count_selection_as_rejection(folder: Path) -> None:
    command = ("estimate", "--source", "scenes", "--limit", "2000", "--samples", "2", "--out", "dry")
    predicted = json.loads(run_synth(*command, "--json", cwd=folder).stdout)
    assert not any(name.startswith("select") for name in predicted["lost_by"])
    assert predicted["lost_share"][0] < 0.3
