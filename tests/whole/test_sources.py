"""The named sources from the Hub to a version and back, as a user types it; the tiny teacher says what it says of photos."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.generate.engine import LARGE, TINY_WEIGHTS
from pipeline.store import Folder, Version
from tests.hub import datasets
from tests.hub.server import RunningHub, running_hub
from tests.whole.conftest import SYNTH

TRY = ("--engine", "embedded", "--model", "tiny", "--json")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("hub")
    with running_hub(folder / "hub") as running:
        storage = running.hub.storage
        datasets.seed_flickr30k(storage, 20)
        datasets.seed_vqav2(storage, images=5)
        datasets.seed_slidevqa(storage, decks=1)
        running.hub.granted.add("NTT-hil-insight/SlideVQA")
        storage.seed("model", LARGE, {path.name: path.read_bytes() for path in TINY_WEIGHTS.iterdir()})
        yield running


def synth(hub: RunningHub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = hub.env(folder / "home") | {"HF_HUB_OFFLINE": "0"}
    return subprocess.run([SYNTH, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def made(hub: RunningHub, folder: Path, *arguments: str) -> Version:
    done = synth(hub, folder, "generate", *arguments)
    assert done.returncode == 0, done.stderr
    return Folder(folder / Path(json.loads(done.stdout)["path"]).parents[1]).version()


def rows(version: Version) -> list[dict[str, Any]]:
    return [
        row for split in ("train", "validation", "test") if version.shards(split) for row in version.read(split).to_pylist()
    ]


def adds_up(version: Version, upstream: int) -> None:
    """Every row upstream is a sample, or was rejected with a reason."""
    source = version.manifest["funnel"][0]
    assert source["kept"] + sum(source["rejected"].values()) == source["input"] == upstream
    for step in version.manifest["funnel"]:
        assert step["kept"] + sum(step["rejected"].values()) == step["input"]


def test_flickr30k_with_no_other_flag_is_described_by_the_large_model_of_that_name(hub: RunningHub, tmp_path: Path) -> None:
    done = synth(hub, tmp_path, "generate", "--source", "flickr30k")
    assert done.returncode == 0, done.stderr
    version = Folder(tmp_path / "data" / "flickr30k").version()
    adds_up(version, 20)
    assert version.manifest["model"]["name"] == LARGE
    assert version.manifest["model"]["revision"] == hub.hub.storage.repos["model", LARGE].branches["main"]
    by_split = {
        split: version.read(split)["source_row"].to_pylist() for split in version.manifest["rows"] if version.shards(split)
    }
    assert {split: len(found) for split, found in by_split.items()} == {"train": 12, "validation": 4, "test": 4}
    assert all(len(row["references"]) == 5 for row in rows(version))
    pushed = synth(hub, tmp_path, "push", "--repo", "me/flickr", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert "may not be passed on" in pushed.stderr
    files = hub.hub.storage.repos["dataset", "me/flickr"].resolve("main")
    assert files is not None
    for name, file in files.files.items():
        data = hub.hub.storage.path(file.sha256).read_bytes()
        assert datasets.photo(0)[20:200] not in data, name
        if name.endswith(".parquet"):
            table = pq.read_table(hub.hub.storage.path(file.sha256))
            assert "image" not in table.column_names
            assert {"sample_id", "captions"} <= set(table.column_names)
    again = synth(hub, tmp_path, "push", "--repo", "me/flickr")
    assert "nothing to do" in again.stderr


def test_vqav2_keeps_the_questions_of_people_beside_those_of_the_model(hub: RunningHub, tmp_path: Path) -> None:
    version = made(hub, tmp_path, "--source", "vqav2", "--split", "validation", *TRY)
    adds_up(version, 5)
    assert version.manifest["rows"] == {"train": 0, "validation": 5, "test": 0}
    for row in rows(version):
        assert len(row["reference_qa"]) == 3
        assert row["reference_qa"][0]["answers"] == ["2", "2", "2"]
        assert row["licence"] == "flickr-terms"


def test_slidevqa_is_decks_with_all_their_pages(hub: RunningHub, tmp_path: Path) -> None:
    version = made(
        hub, tmp_path, "--source", "slidevqa", "--split", "train", "--config", config(tmp_path, max_tokens=400), *TRY
    )
    adds_up(version, 1)
    (row,) = rows(version)
    assert [len(page["bytes"]) > 0 for page in row["pages"]] == [True] * 20
    assert "image" not in version.manifest["columns"]
    assert row["reference_qa"][1]["evidence_pages"] == [1, 3]
    assert row["qa"]


def config(folder: Path, **generate: Any) -> str:
    (folder / "run.json").write_text(json.dumps({"generate": generate}))
    return str(folder / "run.json")


def test_any_data_set_streams_and_its_licence_travels(hub: RunningHub, tmp_path: Path) -> None:
    datasets.seed_flickr30k_without_split(hub.hub.storage, 6, repo="me/photos")
    version = made(hub, tmp_path, "--source", "hub:me/photos", "--limit", "4", *TRY)
    assert sum(version.manifest["rows"].values()) == 4
    assert version.manifest["licences"] == ["unknown"]
    assert version.manifest["source"]["name"] == "hub:me/photos"
    assert set(version.manifest["rows"]) == {"train", "validation", "test"}
    assert version.manifest["rows"]["test"] == 4  # as upstream files them


def test_parquet_of_ones_own(hub: RunningHub, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(datasets.parquet(datasets.flickr_rows(6), datasets.FLICKR))
    version = made(hub, tmp_path, "--source", "parquet:rows.parquet", *TRY)
    adds_up(version, 6)
    assert "rows.parquet" not in json.dumps(version.manifest["config"])


def test_decks_of_drawn_pages_end_in_questions_whose_evidence_is_true(hub: RunningHub, tmp_path: Path) -> None:
    version = made(hub, tmp_path, "--source", "scenes-deck", "--limit", "24", "--json")
    adds_up(version, 24)
    from pipeline.scenes.deck import answer_deck
    from pipeline.scenes.score import scene_of

    right = asked = 0
    for row in rows(version):
        deck = tuple(scene_of(page) for page in row["page_facts"])
        assert len(row["pages"]) == len(deck) == 4
        for pair in row["qa"]:
            truth = answer_deck(deck, pair["question"])
            asked += 1
            right += truth is not None and (truth.answer, list(truth.evidence_pages)) == (
                pair["answer"],
                pair["evidence_pages"],
            )
    assert asked > 48
    assert right > 0.75 * asked  # benchmarks/teacher.py has the full figures


@pytest.mark.parametrize("name", ["scenes", "flickr30k", "hub:ORG/NAME", "slidevqa"])
def test_sources_says_all_about_one(hub: RunningHub, tmp_path: Path, name: str) -> None:
    about = json.loads(synth(hub, tmp_path, "sources", name, "--json").stdout)
    assert about["example"].startswith("synth generate --source")
    assert all(about[field] for field in ("what", "tasks", "splits", "size", "licence", "needs"))
    shown = synth(hub, tmp_path, "sources", name).stdout
    assert about["licence"] in shown
