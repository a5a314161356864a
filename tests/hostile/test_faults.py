"""Faults: whichever write crashes or fails, the same command goes on, and what comes out is what an untouched run makes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.reviews import text_name
from tests.chat.server import Act, ChatServer, running_chat
from tests.hostile import LONG, part_of
from tests.hostile.faults import KILLED, chosen, run
from tests.hub.server import RunningHub, running_hub
from tests.scene_data import make_version, scene_samples

TRAIN_EVERY = 5  # writes of a training: one in so many fails, since each takes half a minute
COUNT = 2  # faults of each kind for each command in a short run


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    def script(times: int, body: dict[str, Any]) -> Act:
        return Act(text=json.dumps({"caption": "A grey wall of noise stands in a small and quiet room."}))

    with running_chat(ChatServer(script)) as server:
        yield server


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        Image.effect_noise((80 + number, 64), 40 + 20 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


def generate(photos: Path, chat: ChatServer) -> tuple[str, ...]:
    images = ("--source", f"folder:{photos}", "--tasks", "caption", "--out", "data", "--language", "any")
    return ("generate", *images, "--base-url", chat.url, "--json")


def digests(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["digest"] for path in sorted(folder.glob("data/versions/v*/manifest.json"))]


def require_sound(folder: Path) -> None:
    checked = run(folder, "check", "data")
    assert checked.code == 0, checked.output
    left_over = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == ".next"]
    assert left_over == []


@pytest.fixture(scope="module")
def made(photos: Path, chat: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished dataset, made without any fault."""
    folder = tmp_path_factory.mktemp("made")
    outcome = run(folder, *generate(photos, chat))
    assert outcome.code == 0, outcome.output
    return folder


def sweep(start: Path | None, tmp_path: Path, arguments: tuple[str, ...], mode: str, expected: list[str], count: int) -> int:
    """Fail some writes of a command, one a run; run it again each time, and compare. Return how many were tried."""

    def fresh(name: str) -> Path:
        folder = tmp_path / name
        if start is None:
            folder.mkdir()
        else:
            shutil.copytree(start, folder, symlinks=True)
        return folder

    whole = run(fresh("whole"), *arguments)
    assert whole.code == 0, whole.output
    numbers = chosen(whole.writes, part_of, count)
    assert numbers
    for number in numbers:
        folder = fresh(f"{mode}-{number}")
        hit = run(folder, *arguments, number=number, mode=mode)
        if mode == "crash":
            assert hit.code in (KILLED, 0), (number, hit)
        else:
            assert "Traceback" not in hit.output, (number, hit.output)
            assert hit.code in (0, 1), (number, hit)  # 0: of a file that is only a convenience
        again = run(folder, *arguments)
        assert again.code == 0, (number, again.output)
        assert digests(folder) == expected, number
        require_sound(folder)
        shutil.rmtree(folder)
    return len(numbers)


@pytest.mark.parametrize("mode", ["crash", "full", "broken"])
def test_generate_goes_on_after_any_write(mode: str, made: Path, photos: Path, chat: ChatServer, tmp_path: Path) -> None:
    sweep(None, tmp_path, generate(photos, chat), mode, digests(made), COUNT)


@pytest.mark.parametrize("mode", ["crash", "full"])
def test_a_second_run_goes_on_after_any_write(mode: str, made: Path, photos: Path, chat: ChatServer, tmp_path: Path) -> None:
    sweep(made, tmp_path, generate(photos, chat), mode, digests(made), COUNT)


@pytest.mark.parametrize("mode", ["crash", "full"])
def test_report_goes_on_after_any_write(mode: str, made: Path, tmp_path: Path) -> None:
    sweep(made, tmp_path, ("report", "data"), mode, digests(made), COUNT)


@pytest.mark.parametrize("mode", ["crash", "full"])
def test_review_goes_on_after_any_write(mode: str, made: Path, tmp_path: Path) -> None:
    row = pq.read_table(made / "data" / "stages" / "split" / "kept.parquet").to_pylist()[0]
    sample_id, content = text_name(row)
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_text(json.dumps({"sample_id": sample_id, "content": content, "verdict": "bad", "reason": "not_true"}) + "\n")
    arguments = ("review", "apply", str(reviews), "--data", "data")
    reviewed = tmp_path / "reviewed"
    shutil.copytree(made, reviewed)
    assert run(reviewed, *arguments).code == 0
    assert len(digests(reviewed)) == 2
    sweep(made, tmp_path, arguments, mode, digests(reviewed), COUNT)


@pytest.mark.parametrize("mode", ["crash", "full"])
def test_pull_goes_on_after_any_write(mode: str, made: Path, tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        push(hub, made)
        whole = tmp_path / "whole"
        whole.mkdir()
        arguments = ("check", "me/photos@v1.0.0")
        environment = hub.env(whole / "home")
        outcome = run(whole, *arguments, environment=environment)
        assert outcome.code == 0, outcome.output
        for number in chosen(outcome.writes, part_of, COUNT):
            folder = tmp_path / f"pull-{number}"
            folder.mkdir()
            hit = run(folder, *arguments, number=number, mode=mode, environment=hub.env(folder / "home"))
            assert "Traceback" not in hit.output, (number, hit.output)
            again = run(folder, *arguments, environment=hub.env(folder / "home"))
            assert again.code == 0, (number, again.output)


def push(hub: RunningHub, made: Path) -> None:
    outcome = run(made, "push", "data", "--repo", "me/photos", "--license", "cc0-1.0", environment=hub.env(made / "home"))
    assert outcome.code == 0, outcome.output


@pytest.mark.skipif(not LONG, reason="training takes a quarter of a minute a run: make test-long")
@pytest.mark.parametrize("mode", ["crash", "full"])
def test_train_goes_on_after_any_write(mode: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    make_version(made / "data", scene_samples(60))
    arguments = ("train", "--data", "data", "--encoder", "tiny-vit", "--decoder", "scratch", "--steps", "4", "--out", "out")
    whole = tmp_path / "whole"
    shutil.copytree(made, whole)
    outcome = run(whole, *arguments)
    assert outcome.code == 0, outcome.output
    expected = json.loads((whole / "out" / "metrics.json").read_text())["scores"]
    for number in range(1, outcome.writes + 1, TRAIN_EVERY):
        folder = tmp_path / f"train-{number}"
        shutil.copytree(made, folder)
        hit = run(folder, *arguments, number=number, mode=mode)
        assert "Traceback" not in hit.output, (number, hit.output)
        resumed = run(folder, *arguments, *(["--resume"] if (folder / "out" / "resume.pt").exists() else []))
        assert resumed.code == 0, (number, resumed.output)
        assert json.loads((folder / "out" / "metrics.json").read_text())["scores"] == expected
