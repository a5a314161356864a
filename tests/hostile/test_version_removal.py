"""Removal of versions, killed or failing at each write: every version is whole or gone, and the same command finishes it."""

import shutil
from pathlib import Path

import pytest

from pipeline.dataset.directory import DatasetDir, read_tags, write_tags
from pipeline.dataset.integrity import find_damage, make_repaired_version
from pipeline.dataset.removal import REMOVING
from tests.hostile import part_of
from tests.hostile.faults import KILLED, chosen, run
from tests.scene_data import make_version, scene_samples

RM = ("versions", "rm", "v1.0.0", "v1.0.1", "--data", "data")
GC = ("versions", "gc", "--data", "data")
TAG = ("versions", "tag", "paper", "v1.0.0", "--data", "data", "--move")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose dataset has three versions, two of them with equal files that lie there twice, and leftovers."""
    folder = tmp_path_factory.mktemp("made")
    samples = scene_samples(12)
    first, _ = make_version(folder / "data", samples[:8])
    make_repaired_version(first, [])
    for path in folder.glob("data/versions/v1.0.1/*.parquet"):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    make_version(folder / "data", samples)
    write_tags(folder / "data", {"paper": "v1.1.0"})
    (folder / "data" / "versions" / f"{REMOVING}v0.1.0").mkdir()
    (folder / "data" / "versions" / f"{REMOVING}v0.1.0" / "train-00000.parquet").write_bytes(bytes(50))
    (folder / "data" / "versions" / "v1.0.0" / ".README.md.tmp").write_bytes(b"{")
    return folder


def versions(folder: Path) -> dict[str, list[str]]:
    """Return the damage of each version."""
    return {version.name: find_damage(version) for version in DatasetDir(folder / "data").versions()}


def names_of_files(folder: Path) -> list[Path]:
    """Return the names of all files that are no leftovers."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(path for path in paths if not path.name.endswith(".tmp") and REMOVING not in str(path))


def finish(folder: Path, command: tuple[str, ...]) -> None:
    """Run a command that was ended once more, and collect what it had left."""
    if command == RM:  # of versions that are gone nothing is left to remove
        there = DatasetDir(folder / "data").versions()
        names = [version.name for version in there if version.name in RM]
        command = ("versions", "rm", *names, "--data", "data") if names else GC
    for one in (command, GC):
        outcome = run(folder, *one)
        assert outcome.code == 0, outcome.output
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or REMOVING in path.name]
    assert left == []


@pytest.mark.parametrize(("mode", "code", "count"), [("crash", KILLED, 10), ("full", 1, 3), ("broken", 1, 3)])
@pytest.mark.parametrize("command", [RM, GC, TAG], ids=["rm", "gc", "tag"])
def test_whichever_write_ends_a_command_no_version_is_harmed(
    made: Path, tmp_path: Path, command: tuple[str, ...], mode: str, code: int, count: int
) -> None:
    whole = Path(shutil.copytree(made, tmp_path / "whole"))
    before, outcome = versions(whole), run(whole, *command)
    assert outcome.code == 0, outcome.output
    after, files = versions(whole), names_of_files(whole)
    for number in chosen(outcome.writes, part_of, count):
        folder = Path(shutil.copytree(made, tmp_path / str(number)))
        ended = run(folder, *command, number=number, mode=mode)
        assert ended.code in (code, 0), ended.output  # a scratch file that cannot be removed is no failure
        assert "Traceback" not in ended.output
        there = versions(folder)
        assert set(after) <= set(there) <= set(before)
        assert not any(there.values()), (number, there)
        assert read_tags(folder / "data").keys() == {"paper"}
        finish(folder, command)
        assert versions(folder) == after
        assert names_of_files(folder) == files
        shutil.rmtree(folder)
