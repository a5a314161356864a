"""Faults: if a write crashes or fails, repeating the command gives the result of an undisturbed run."""

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

from pipeline.dataset.reviews import text_name
from tests.chat.server import Act, ChatServer, running_chat
from tests.hostile import damaged, part_of
from tests.hostile.faults import KILLED, run
from tests.hub.server import running_hub
from tests.scene_data import make_version, scene_samples

# Each start folder and command has the number of writes and the final state of an undisturbed run.
UNDISTURBED: dict[tuple[Path | None, tuple[str, ...]], tuple[int, Any]] = {}
Command = tuple[str, ...]
Environment = Callable[[Path], dict[str, str]]


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
def made(generate: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    require_success(folder, *generate)
    rows = pq.read_table(folder / "data" / "steps" / "split" / "kept.parquet").to_pylist()
    sample_id, content = text_name(rows[0])
    review = {"sample_id": sample_id, "content": content, "verdict": "bad", "reason": "not_true"}
    (folder / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    return folder


def require_success(folder: Path, *arguments: str) -> None:
    """Run a command, and assert that no scratch files are left."""
    outcome = run(folder, *arguments)
    assert outcome.code == 0, outcome.output
    assert [path for name in ("*.tmp", "*.next") for path in folder.rglob(name)] == []


def sound_digests(folder: Path) -> list[str]:
    require_success(folder, "check", "data")
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
    environment: Environment = lambda folder: dict(os.environ),
) -> Any:
    """Run a command with a fault in each sampled write, then without fault. Return the final state."""

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
    numbers = part_of(range(1, writes + 1), 1)
    assert numbers
    for number in numbers:
        folder = fresh(f"{mode}-{number}")
        hit = run(folder, *arguments, number=number, mode=mode, environment=environment(folder))
        # The exit code is 0 if the fault affected only a scratch file or an optional file.
        assert hit.code in ((KILLED, 0) if mode == "crash" else (1, 0)), (number, hit)
        assert "Traceback" not in hit.output, (number, hit.output)
        repeated = run(folder, *arguments, environment=environment(folder))
        assert repeated.code == 0, (number, repeated.output)
        assert state(folder) == expected, number
        shutil.rmtree(folder)
    return expected


@pytest.mark.parametrize("mode", ["crash", "full", "broken"])
def test_generate_after_fault_equals_undisturbed_run(mode: str, generate: Command, tmp_path: Path) -> None:
    assert len(sweep(None, tmp_path, generate, mode, sound_digests)) == 1


@pytest.mark.parametrize("seed", part_of(range(300), 3))
def test_damaged_journal_is_repaired_or_reported(
    seed: int, generate: Command, made: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "folder"))
    journal = folder / "data" / "journal" / "local.sqlite"
    journal.write_bytes(damaged(journal.read_bytes(), random.Random(seed)))
    shutil.rmtree(folder / "data" / "steps")  # without step files, the run must read the journal
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


@pytest.mark.parametrize("mode", ["crash", "full"])
def test_interrupted_removal_leaves_versions_whole(mode: str, tmp_path: Path) -> None:
    """`gc` is interrupted while it deletes the images of a removed version."""
    start = tmp_path / "start"
    for count in (10, 8, 12):
        make_version(start / "data", scene_samples(count))
    shutil.rmtree(start / "data" / "versions" / "v1.1.0")

    def state(folder: Path) -> object:
        require_success(folder, "versions", "gc", "data")
        return sound_digests(folder), sorted(path.relative_to(folder) for path in folder.rglob("*"))

    sweep(start, tmp_path, ("versions", "gc", "data"), mode, state)
