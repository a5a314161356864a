"""Curation: verification, exclusions, and other thresholds without new requests."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import pipeline
from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.commands import Done, require_success, run_synth
from tests.pipeline.images.test_similarity import cropped, photo, stored_again
from tests.whole.conftest import read_manifest

CHECKS = "round_trip,claims,blind,alignment"
GENERATE = ("generate", "--source", "scenes", "--limit", "4", "--out", "d", "--verify", CHECKS)


def run(*arguments: str, cwd: Path) -> Done:
    return run_synth(*arguments, cwd=cwd)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    done = require_success(run(*GENERATE, cwd=folder))
    assert "verify asks at most" in done.stderr
    return folder / "d"


def caption_of(_: int, body: dict[str, Any]) -> Act:
    return Act(json.dumps({"caption": f"A lamp stands near the door with number {uuid_of(body)[:8]}."}))


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
    done = run(*GENERATE, "--config", str(config), cwd=verified.parent)
    assert "sent 0 requests" in done.stderr
    assert "too_long" in done.stderr
    assert len(read_kept(verified, "verify")) < len(rows)  # long captions are rejected
    funnel = read_manifest(verified, "v1.0.1")["funnel"]
    for step in funnel:
        assert step["kept"] + sum(step["rejected"].values()) == step["input"]
    back = run(*GENERATE, cwd=verified.parent)
    assert back.returncode == 0 and len(read_kept(verified, "verify")) == len(rows)


def test_copies_are_merged_and_crops_share_split_and_excluded_images_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "test").mkdir()
    images = [photo(seed) for seed in range(8)]
    for number, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text("A drawing.")
    stored_again(images[0]).resize((200, 150)).save(tmp_path / "photos" / "0-copy.jpg")
    cropped(images[1]).save(tmp_path / "photos" / "1-crop.png")
    stored_again(images[7]).save(tmp_path / "test" / "7.jpg")
    source = ("--source", "folder:photos", "--exclude", "folder:test", "--out", "d", "--tasks", "caption")
    with running_chat(ChatServer(caption_of)) as chat:
        require_success(run("generate", *source, "--base-url", chat.url, cwd=tmp_path))
    samples = {row["source_row"]: row["sample_id"] for row in read_kept(tmp_path / "d", "read")}
    rejected = pq.read_table(tmp_path / "d" / "steps" / "read" / "rejected.parquet").to_pylist()
    assert [(row["source_row"], row["reason"], row["detail"]) for row in rejected] == [
        ("0-copy.jpg", "near_duplicate_image", samples["0.png"]),
        ("7.png", "banned_image", "folder"),
    ]
    groups: dict[str, set[str]] = {}
    for row in read_kept(tmp_path / "d", "dedupe"):
        groups.setdefault(row["image_group"], set()).add(row["sample_id"])
    assert {samples["1.png"], samples["1-crop.png"]} in groups.values()
    manifest = read_manifest(tmp_path / "d")
    assert manifest["leakage"]["banned_images"] == 1
    assert str(tmp_path) not in json.dumps(manifest) and "folder:test" not in json.dumps(manifest)
