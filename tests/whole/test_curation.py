"""Verification, and other thresholds without new requests."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import pipeline
from tests.commands import require_success, run_synth
from tests.whole.conftest import read_manifest

CHECKS = "round_trip,claims,blind,alignment"
GENERATE = ("generate", "--source", "scenes", "--limit", "4", "--out", "d", "--verify", CHECKS)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    done = require_success(run_synth(*GENERATE, cwd=folder))
    assert "verify asks at most" in done.stderr
    return folder / "d"


def read_kept(folder: Path, step: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "steps" / step / "kept.parquet").to_pylist()
    return rows


def test_annotations_are_verified_and_changed_thresholds_send_no_request(verified: Path) -> None:
    rows = read_kept(verified, "verify")
    assert rows
    for row in rows:
        kinds = {check["kind"] for check in row["checks"]}
        assert kinds == ({"claims"} if row["task"] == "caption" else {"round_trip", "blind"})
        assert row["agreement"] == 1.0
        assert (row["alignment"] is not None) == (row["task"] == "caption")
    version = pipeline.load(verified)
    pairs = [pair for split in version.values() for pairs in split["qa"] for pair in pairs]
    assert pairs and all(pair["answered_blind"] in (False, True) for pair in pairs)
    config = verified.parent / "loose.yaml"
    thresholds = "{max_true_captions_lost: 0.5, lowest_alignment_frac: 0.0}"
    config.write_text(f"verify: {thresholds}\nfilter: {{max_caption_words: 12}}\n")
    done = run_synth(*GENERATE, "--config", str(config), cwd=verified.parent)
    assert "sent 0 requests" in done.stderr
    assert "too_long" in done.stderr
    assert len(read_kept(verified, "verify")) < len(rows)  # long captions are rejected
    funnel = read_manifest(verified, "v1.0.1")["funnel"]
    for step in funnel:
        assert step["kept"] + sum(step["rejected"].values()) == step["input"]
    back = run_synth(*GENERATE, cwd=verified.parent)
    assert back.returncode == 0 and len(read_kept(verified, "verify")) == len(rows)
