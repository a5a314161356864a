"""Faults: a command whose write crashes or fails ends like an undisturbed run when it is repeated."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.integrity import find_damage
from pipeline.dataset.reviews import text_name
from tests.chat.server import Act, ChatServer, running_chat
from tests.hostile import damaged, part_of
from tests.hostile.faults import KILLED, run
from tests.hub.server import running_hub
from tests.scene_data import make_version, scene_samples

COUNT = 1  # faults per command and mode in a short run
GC = ("versions", "gc", "data")
# (folder before, command) -> writes and final state of an undisturbed run
UNDISTURBED: dict[tuple[Path | None, tuple[str, ...]], tuple[int, Any]] = {}
Command = tuple[str, ...]
Environment = Callable[[Path], dict[str, str]]  # folder of a command -> its environment


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    photos = tmp_path_factory.mktemp("photos")
    for number in range(6):
        Image.effect_noise((80 + number, 64), 40 + 20 * number).convert("RGB").save(photos / f"{number}.png")

    def script(times: int, body: dict[str, Any]) -> Act:
        return Act(text=json.dumps({"caption": "A grey wall of noise stands in a small and quiet room."}))

    with running_chat(ChatServer(script)) as chat:
        images = ("--source", f"folder:{photos}", "--tasks", "caption", "--out", "data", "--language", "any")
        yield ("generate", *images, "--base-url", chat.url, "--json")


@pytest.fixture(scope="module")
def human(generate: Command, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return the command that makes a dataset from human captions."""
    captions = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    rows = [{"file_name": f"{n}.png", "caption": f"A grey wall with {n} spots in a room."} for n in range(6)]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (*generate[:3], "--captions", str(captions), "--no-model", "--out", "data", "--language", "any")


@pytest.fixture(scope="module")
def made(generate: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished dataset and a file of reviews."""
    folder = tmp_path_factory.mktemp("made")
    outcome = run(folder, *generate)
    assert outcome.code == 0, outcome.output
    rows = pq.read_table(folder / "data" / "steps" / "split" / "kept.parquet").to_pylist()
    sample_id, content = text_name(rows[0])
    review = {"sample_id": sample_id, "content": content, "verdict": "bad", "reason": "not_true"}
    (folder / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    return folder


def left_over(folder: Path) -> list[Path]:
    """Return the scratch files in a folder."""
    return [path for name in ("*.tmp", "*.next") for path in folder.rglob(name)]


def sound_digests(folder: Path) -> list[str]:
    """Check a dataset, and return the digests of its versions."""
    checked = run(folder, "check", "data")
    assert checked.code == 0, checked.output
    assert left_over(folder) == []
    return digests(folder)


def digests(folder: Path) -> list[str]:
    manifests = sorted(folder.glob("data/versions/v*/manifest.json"))
    return [json.loads(path.read_text())["digest"] for path in manifests]


def sweep(
    start: Path | None,
    tmp_path: Path,
    arguments: tuple[str, ...],
    mode: str,
    state: Callable[[Path], Any],
    *,
    count: int = COUNT,
    environment: Environment = lambda folder: dict(os.environ),
    after_fault: Callable[[Path], object] = lambda folder: None,
) -> Any:
    """Run a command with a fault in each sampled write, then again. Return the final state."""

    def fresh(name: str) -> Path:
        folder = tmp_path / name
        if start is None:
            folder.mkdir()
            return folder
        return Path(shutil.copytree(start, folder, symlinks=True))

    if (start, arguments) not in UNDISTURBED:
        whole = fresh("whole")
        outcome = run(whole, *arguments, environment=environment(whole))
        assert outcome.code == 0, outcome.output
        UNDISTURBED[start, arguments] = outcome.writes, state(whole)
    writes, expected = UNDISTURBED[start, arguments]
    numbers = part_of(range(1, writes + 1), count)
    assert numbers
    for number in numbers:
        folder = fresh(f"{mode}-{number}")
        hit = run(folder, *arguments, number=number, mode=mode, environment=environment(folder))
        # 0: a scratch file could not be removed, or an optional file could not be written
        assert hit.code in ((KILLED, 0) if mode == "crash" else (1, 0)), (number, hit)
        assert "Traceback" not in hit.output, (number, hit.output)
        after_fault(folder)
        repeated = run(folder, *arguments, environment=environment(folder))
        assert repeated.code == 0, (number, repeated.output)
        assert state(folder) == expected, number
        shutil.rmtree(folder)
    return expected


@pytest.mark.parametrize("mode", ["crash", "full", "broken"])
@pytest.mark.parametrize("command", ["generate", "human"])
def test_generate_after_fault_equals_undisturbed_run(
    command: str, mode: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    assert len(sweep(None, tmp_path, request.getfixturevalue(command), mode, sound_digests)) == 1


@pytest.mark.parametrize("seed", part_of(range(300), 3))
def test_damaged_journal_is_repaired_or_reported(
    seed: int, generate: Command, made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "folder"))
    journal = folder / "data" / "journal" / "local.sqlite"
    journal.write_bytes(damaged(journal.read_bytes(), random.Random(seed)))
    shutil.rmtree(folder / "data" / "steps")  # the run reads the replies again
    for arguments in (generate, ("check", "data"), ("check", "data", "--repair")):
        outcome = run(folder, *arguments)
        assert outcome.code in (0, 1) and "Traceback" not in outcome.output, outcome
    after = run(folder, *generate)
    assert "Traceback" not in after.output, after
    # A journal that cannot be repaired may still have all replies that a run needs.
    if outcome.code:
        assert after.code or digests(folder) == digests(made)
    else:
        assert after.code == 0, after
        assert sound_digests(folder) == sound_digests(made)


@pytest.mark.parametrize("mode", ["crash", "full"])
@pytest.mark.parametrize(
    ("arguments", "num_versions"),
    [(None, 1), (("report", "data"), 1), (("review", "apply", "data", "reviews.jsonl"), 2)],
    ids=["generate again", "report", "review"],
)
def test_command_after_fault_equals_undisturbed_run(
    arguments: Command | None, num_versions: int, mode: str, generate: Command, made: Path, tmp_path: Path
) -> None:
    assert len(sweep(made, tmp_path, arguments or generate, mode, sound_digests)) == num_versions


@pytest.mark.parametrize("mode", ["crash", "full"])
def test_pull_after_fault_equals_undisturbed_run(mode: str, made: Path, tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        push = ("push", "data", "--repo", "me/photos", "--license", "cc0-1.0")
        outcome = run(made, *push, environment=hub.env(made / "home"))
        assert outcome.code == 0, outcome.output

        def environment(folder: Path) -> dict[str, str]:
            return hub.env(folder / "home")

        check = ("check", "me/photos@v1.0.0")
        sweep(None, tmp_path, check, mode, lambda folder: None, environment=environment)


@pytest.fixture(scope="module")
def versions_with_leftovers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with versions and unused images, and leftovers of killed commands."""
    folder = tmp_path_factory.mktemp("versions")
    samples = scene_samples(12)
    for count in (10, 8, 12):
        make_version(folder / "data", samples[:count])
    shutil.rmtree(folder / "data" / "versions" / "v1.1.0")
    (folder / "data" / "versions" / ".next").mkdir()
    (folder / "data" / "versions" / ".next" / "train-00000.parquet").write_bytes(bytes(50))
    return folder


@pytest.mark.parametrize(("mode", "count"), [("crash", 3), ("full", 1)])
def test_interrupted_removal_leaves_versions_whole(
    versions_with_leftovers: Path, tmp_path: Path, mode: str, count: int
) -> None:
    def versions(folder: Path) -> list[str]:
        """Check all versions, and return their names."""
        there = DatasetDir(folder / "data").versions()
        assert [find_damage(version) for version in there] == [[] for _ in there]
        return [version.name for version in there]

    def state(folder: Path) -> object:
        """Return versions and files after garbage collection."""
        outcome = run(folder, *GC)
        assert outcome.code == 0, outcome.output
        assert left_over(folder) == []
        return versions(folder), sorted(path.relative_to(folder) for path in folder.rglob("*"))

    def after_fault(folder: Path) -> None:
        assert versions(folder) == ["v1.0.0", "v1.0.1"]

    sweep(versions_with_leftovers, tmp_path, GC, mode, state, count=count, after_fault=after_fault)
