"""Versions: list, previews, and the default dataset."""

import json
import shutil
from pathlib import Path

import pytest

from tests.pipeline.images.test_similarity import photo
from tests.whole.conftest import Run

PLACES = ("a quay", "a meadow", "the stairs", "an old mill", "the market", "a tram stop")
COUNT = len(PLACES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, place in enumerate(PLACES):
        photo(number).save(folder / f"{number}.jpg")
        color = "grey" if number % 2 else "red"
        (folder / f"{number}.txt").write_text(f"Two dogs and a {color} kite wait near {place}.")
    return folder


def test_preview_is_not_the_default_version(synth: Run, photos: Path, tmp_path: Path) -> None:
    read = ("generate", "--no-model", "--source", f"folder:{photos}", "--out", "data/elsewhere")
    assert synth(*read, "--limit", "2").returncode == 0
    only = synth("export", "--format", "csv")
    assert "v1.0.0 is a preview: its run stopped at --limit" in only.stderr
    assert "dataset: data/elsewhere" in only.stderr
    assert synth(*read).returncode == 0
    assert synth(*read, "--limit", "3").returncode == 0
    listed = json.loads(synth("versions", "list", "--json").stdout)
    assert {row["version"]: row["preview"] for row in listed} == {
        "v1.0.0": True, "v1.1.0": False, "v1.1.1": True,
    }  # fmt: skip
    exported = synth("export", "--format", "csv", "--json")
    assert "uses v1.1.0: the newer v1.1.1 is a preview" in exported.stderr
    assert json.loads(exported.stdout)["images"] == COUNT
    pushed = synth("push", "--repo", "ORG/NAME", "--dry-run", "--json")
    assert json.loads(pushed.stdout)["version"] == "v1.1.0"
    assert "the newer v1.1.1 is a preview" in pushed.stderr
    named = synth("export", "data/elsewhere@v1.1.1", "--format", "csv", "--json")
    assert json.loads(named.stdout)["images"] == 3
    assert "v1.1.1 is a preview" in named.stderr
    assert synth("report").returncode == 0
    assert "v1.1.1" in (tmp_path / "data" / "elsewhere" / "report.html").read_text()
    assert "ok  data/elsewhere/versions/v1.1.0" in synth("check", "data/elsewhere@v1.1.0").stdout
    assert f"no dataset at {photos}" in synth("check", str(photos)).stderr
    assert "newer" not in synth("push", "--repo", "ORG/NAME", "--dry-run", "v1.1.0").stderr
    assert "newer" not in synth("export", "data/elsewhere@v1.1.0", "--format", "csv").stderr


def test_versions_are_listed_after_a_removal(synth: Run, photos: Path) -> None:
    source = f"folder:{photos}"
    assert synth("generate", "--no-model", "--source", source, "--limit", "4").returncode == 0
    assert synth("generate", "--no-model", "--source", source).returncode == 0
    (data,) = (photos.parent / "data").iterdir()
    assert synth("versions", "list", str(data)).stdout == synth("versions", "list").stdout
    chosen = synth("push", "--repo", "ORG/NAME", "--dry-run", "v1.0.0", "--json")
    assert json.loads(chosen.stdout)["version"] == "v1.0.0"
    shutil.rmtree(data / "versions" / "v1.0.0")
    assert [row["version"] for row in json.loads(synth("versions", "list", "--json").stdout)] == ["v1.1.0"]
    for command in ("list", "gc"):
        refused = synth("versions", command, f"{data}@v9.9.9")
        assert refused.returncode == 2 and "pass the dataset without a version" in refused.stderr


def test_run_without_limit_makes_a_complete_version_even_if_it_finds_no_more_images(
    synth: Run, photos: Path
) -> None:
    (photos / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "again.jpg").write_bytes((photos / "0.jpg").read_bytes())
    source = ("generate", "--no-model", "--source", f"folder:{photos}")
    limited = ("--limit", f"{COUNT}")
    runs = ((limited, True, [True]), ((), True, [True, False]), (limited, False, [True, False]))
    for options, is_new, previews in runs:
        done = synth(*source, *options)
        assert done.returncode == 0 and is_new != ("nothing new" in done.stderr), done.stderr
        listed = json.loads(synth("versions", "list", "--json").stdout)
        assert [row["preview"] for row in listed] == previews
    assert synth(*source, "--limit", "50", "--out", "all").returncode == 0
    listed = json.loads(synth("versions", "list", "all", "--json").stdout)
    assert [row["preview"] for row in listed] == [False]
