"""Several captions to choose from: each is paid once, the best is kept, and pairs of them teach a model what is better."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.dataset.version import Version, read_version
from tests.commands import run_synth
from tests.hostile import LONG
from tests.whole.test_readers import train_by_trl

IMAGES, SAMPLES = 20, 3
SETTINGS = "generate: {sample_temperature: 2.0}\n"  # the tiny teacher is sure of itself


def generate(folder: Path, *options: str) -> dict[str, Any]:
    done = run_synth(
        "generate", "--source", "scenes", "--limit", str(IMAGES), "--config", "s.yaml", "--out", "d", "--json", *options,
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def counts(version: Version, name: str) -> dict[str, Any]:
    return next((one for one in version.manifest["funnel"] if one["step"] == name), {})


def captions(version: Version) -> list[dict[str, Any]]:
    return [one for _, batch in version.batches(["captions"]) for row in batch.to_pylist() for one in row["captions"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "s.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def chosen(folder: Path) -> tuple[Version, dict[str, Any]]:
    """Return the version with pairs, and what a run said that asked for one caption first, then for several."""
    generate(folder)
    result = generate(folder, "--samples", str(SAMPLES), "--pairs")
    return read_version(folder / "d/versions/v2.0.0"), result


def test_further_captions_alone_are_paid_and_a_pair_is_the_kept_caption_and_a_worse_one(
    chosen: tuple[Version, dict[str, Any]], folder: Path
) -> None:
    version, result = chosen
    assert result["requests"]["asked"] == IMAGES * 2 * (SAMPLES - 1)
    assert counts(version, "ask")["kept"] == IMAGES * (2 * SAMPLES + 1)
    rejected = counts(version, "select")["rejected"]
    assert rejected.keys() == {"not_the_best"} and rejected["not_the_best"] > IMAGES
    assert len(captions(version)) == IMAGES * 2
    assert not any("select" in warning for warning in result.get("warnings", []))
    pairs = [(one["text"], one["rejected"]) for one in captions(version) if one["rejected"]]
    assert 0 < len(pairs) < IMAGES * 2
    assert all(better != worse for better, worse in pairs)
    card = (version.path / "README.md").read_text()
    assert "`captions[].rejected` is the worst of the others" in card and "Scores of the texts" not in card
    assert "without their texts (except `captions[].rejected`)" in card
    assert "rejected" not in version.manifest["measured"].get("scores", {})
    assert run_synth("report", "d", cwd=folder).returncode == 0


def test_a_text_that_was_reviewed_as_bad_does_not_come_back_as_the_worse_one(
    chosen: tuple[Version, dict[str, Any]], folder: Path
) -> None:
    version, _ = chosen
    rows = [row for _, batch in version.batches(["sample_id", "captions"]) for row in batch.to_pylist()]
    sample_id, pair = next((row["sample_id"], one) for row in rows for one in row["captions"] if one["rejected"])
    _, content = text_name({"sample_id": sample_id, "task": "caption", "text": pair["rejected"]})
    review = {"sample_id": sample_id, "content": content, "verdict": "bad", "reason": "private"}
    reviews = DatasetDir(folder / "d").reviews
    reviews.parent.mkdir(exist_ok=True)
    reviews.write_text(json.dumps(review) + "\n")
    again = read_version(folder / generate(folder, "--samples", str(SAMPLES), "--pairs")["path"])
    left = {one["text"]: one["rejected"] for one in captions(again)}
    assert left[pair["text"]] is None
    assert sum(text is not None for text in left.values()) > 0
    reviews.unlink()


def test_another_measure_asks_nothing_and_one_caption_is_as_before(
    chosen: tuple[Version, dict[str, Any]], folder: Path
) -> None:
    checked = ("--samples", str(SAMPLES), "--verify", "claims")
    generate(folder, *checked)
    longest = generate(folder, *checked, "--select", "longest")
    assert (longest["requests"]["asked"], longest["is_new"]) == (0, True)
    alone = generate(folder)
    first, last = read_version(folder / "d/versions/v1.0.0"), read_version(folder / alone["path"])
    assert (alone["requests"]["asked"], last.manifest["digest"]) == (0, first.manifest["digest"])
    assert not counts(last, "select") and not (folder / "d/steps/select").exists()
    refused = run_synth("export", "--data", alone["path"], "--format", "dpo", cwd=folder)
    assert refused.returncode == 1 and "--samples 4 --pairs" in refused.stderr


@pytest.mark.skipif(not LONG, reason="half a minute: make test-long; test_export.py reads pairs, test_readers.py runs TRL")
def test_trl_learns_from_the_pairs_as_they_are_exported(chosen: tuple[Version, dict[str, Any]], folder: Path) -> None:
    exported = run_synth("export", "--data", "d@v2.0.0", "--format", "dpo", "--out", "pairs", cwd=folder)
    assert exported.returncode == 0, exported.stderr
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    train_by_trl("DPO", "pairs", cwd=folder, env=env)


def test_forecast_counts_no_choice_as_a_loss(folder: Path) -> None:
    command = ("generate", "--source", "scenes", "--limit", "2000", "--samples", "2", "--estimate", "--json", "--out", "dry")
    predicted = json.loads(run_synth(*command, cwd=folder).stdout)
    assert not any(name.startswith("select") for name in predicted["lost_by"])
    assert predicted["lost_share"][0] < 0.3
