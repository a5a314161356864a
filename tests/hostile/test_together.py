"""Two of every command in one folder, at once: each ends well or says that the other one is there, and nothing is lost."""

import json
import subprocess
from collections.abc import Iterator
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from tests.chat.server import Act, ChatServer, running_chat
from tests.commands import SYNTH, run_synth
from tests.hostile import part_of


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    def script(times: int, body: dict[str, Any]) -> Act:
        return Act(text=json.dumps({"caption": "A grey wall of noise stands in a small and quiet room."}), seconds=0.05)

    with running_chat(ChatServer(script)) as server:
        yield server


@pytest.fixture(scope="module")
def folder(chat: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished dataset, and reviews for it."""
    home = tmp_path_factory.mktemp("together")
    (home / "photos").mkdir()
    for number in range(12):
        Image.effect_noise((80 + number, 64), 40 + 10 * number).convert("RGB").save(home / "photos" / f"{number}.png")
    done = run_synth(*commands(chat)["generate"], cwd=home)
    assert done.returncode == 0, done.stderr
    row = pq.read_table(home / "data" / "stages" / "split" / "kept.parquet").to_pylist()[0]
    sample_id, content = text_name(row)
    review = {"sample_id": sample_id, "content": content, "verdict": "good"}
    (home / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    return home


def commands(chat: ChatServer) -> dict[str, tuple[str, ...]]:
    images = ("--source", "folder:photos", "--tasks", "caption", "--out", "data", "--language", "any")
    return {
        "generate": ("generate", *images, "--base-url", chat.url),
        "generate again": ("generate", *images, "--base-url", chat.url, "--from-stage", "filter"),
        "preview": ("preview", *images, "--base-url", chat.url),
        "dry run": ("generate", *images, "--base-url", chat.url, "--dry-run"),
        "check": ("check", "data"),
        "repair": ("check", "data", "--repair"),
        "report": ("report", "data"),
        "review": ("review", "apply", "reviews.jsonl", "--data", "data"),
        "versions": ("versions", "data"),
        "push": ("push", "data", "--repo", "me/x", "--dry-run"),
    }


def start(home: Path, arguments: tuple[str, ...]) -> "subprocess.Popen[str]":
    return subprocess.Popen([SYNTH, *arguments], cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


NAMES = ("generate", "generate again", "preview", "dry run", "check", "repair", "report", "review", "versions", "push")
PAIRS = list(combinations_with_replacement(NAMES, 2))


@pytest.mark.parametrize(("first", "second"), part_of(PAIRS, 4))
def test_two_commands_at_once_end_well_or_say_that_the_other_is_there(
    first: str, second: str, folder: Path, chat: ChatServer
) -> None:
    before = [version.manifest["digest"] for version in DatasetDir(folder / "data").versions()]
    running = [start(folder, commands(chat)[name]) for name in (first, second)]
    for name, process in zip((first, second), running, strict=True):
        _, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors, (name, errors)
        assert process.returncode == 0 or "another process is writing" in errors, (name, errors)
    assert any(process.returncode == 0 for process in running)
    after = [version.manifest["digest"] for version in DatasetDir(folder / "data").versions()]
    assert after[: len(before)] == before
    checked = run_synth("check", "data", cwd=folder)
    assert "BAD" not in checked.stdout, checked.stdout + checked.stderr
