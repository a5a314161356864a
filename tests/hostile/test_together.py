"""Two of every command in one folder, at once: each ends well or reports the other one, and nothing is lost."""

import json
import subprocess
from collections.abc import Iterator
from itertools import combinations_with_replacement
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from tests.chat.server import Act, ChatServer, running_chat
from tests.commands import SYNTH, run_synth
from tests.hostile import part_of

IMAGES = ("--source", "folder:photos", "--tasks", "caption", "--out", "data", "--language", "any", "--base-url")
COMMANDS = {  # the first four end in the address of a server
    "generate": ("generate", *IMAGES),
    "generate again": ("generate", "--title", "Other", *IMAGES),
    "preview": ("preview", *IMAGES),
    "estimate": ("generate", "--estimate", *IMAGES),
    "check": ("check", "data"),
    "repair": ("check", "data", "--repair"),
    "report": ("report", "data"),
    "review": ("review", "apply", "reviews.jsonl", "--data", "data"),
    "versions": ("versions", "list", "data"),
    "push": ("push", "data", "--repo", "me/x", "--dry-run"),
}
PAIRS = list(combinations_with_replacement(COMMANDS, 2))


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    reply = Act(text=json.dumps({"caption": "A grey wall of noise stands in a small and quiet room."}), seconds=0.05)
    with running_chat(ChatServer(lambda times, body: reply)) as server:
        yield server


@pytest.fixture(scope="module")
def folder(chat: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished dataset, and reviews for it."""
    home = tmp_path_factory.mktemp("together")
    (home / "photos").mkdir()
    for number in range(12):
        Image.effect_noise((80 + number, 64), 40 + 10 * number).convert("RGB").save(home / "photos" / f"{number}.png")
    done = run_synth(*COMMANDS["generate"], chat.url, cwd=home)
    assert done.returncode == 0, done.stderr
    sample_id, content = text_name(pq.read_table(home / "data" / "steps" / "split" / "kept.parquet").to_pylist()[0])
    review = {"sample_id": sample_id, "content": content, "verdict": "good"}
    (home / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    return home


@pytest.mark.parametrize(("first", "second"), part_of(PAIRS, 2))
def test_two_commands_at_once_end_well_or_report_the_other(first: str, second: str, folder: Path, chat: ChatServer) -> None:
    before = [version.manifest["digest"] for version in DatasetDir(folder / "data").versions()]
    commands = [(*COMMANDS[name], *([chat.url] if "--base-url" in COMMANDS[name] else [])) for name in (first, second)]
    running = [
        subprocess.Popen([SYNTH, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors, errors
        assert process.returncode == 0 or "another process is writing" in errors, errors
    assert any(process.returncode == 0 for process in running)
    after = [version.manifest["digest"] for version in DatasetDir(folder / "data").versions()]
    assert after[: len(before)] == before
    checked = run_synth("check", "data", cwd=folder)
    assert "BAD" not in checked.stdout, checked.stdout + checked.stderr
