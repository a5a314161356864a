"""Of two concurrent commands in one folder, both succeed, or one is refused."""

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
from tests.commands import SYNTH, require_success, run_synth
from tests.hostile import part_of

OUTPUT = ("--out", "data", "--language", "any")
IMAGES = ("--source", "folder:photos", "--tasks", "caption", *OUTPUT, "--base-url")
# the address of a server is appended to the first four commands
COMMANDS = {
    "generate": ("generate", *IMAGES),
    "generate again": ("generate", "--title", "Other", *IMAGES),
    "preview": ("preview", *IMAGES),
    "estimate": ("estimate", *IMAGES),
    "check": ("check", "data"),
    "repair": ("check", "data", "--repair"),
    "report": ("report", "data"),
    "review": ("review", "apply", "data", "reviews.jsonl"),
    "versions": ("versions", "list", "data"),
    "push": ("push", "data", "--repo", "me/x", "--dry-run"),
}
PAIRS = list(combinations_with_replacement(COMMANDS, 2))


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatServer]:
    caption = "A grey wall of noise stands in a small and quiet room."
    reply = Act(text=json.dumps({"caption": caption}), seconds=0.05)
    with running_chat(ChatServer(lambda times, body: reply)) as server:
        yield server


@pytest.fixture(scope="module")
def folder(chat: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("together")
    (home / "photos").mkdir()
    for number in range(12):
        image = Image.effect_noise((80 + number, 64), 40 + 10 * number).convert("RGB")
        image.save(home / "photos" / f"{number}.png")
    require_success(run_synth(*COMMANDS["generate"], chat.url, cwd=home))
    rows = pq.read_table(home / "data" / "steps" / "split" / "kept.parquet").to_pylist()
    sample_id, content = text_name(rows[0])
    review = {"sample_id": sample_id, "content": content, "verdict": "good"}
    (home / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    return home


@pytest.mark.parametrize("pair", part_of(PAIRS, 2))
def test_concurrent_commands_succeed_or_report_that_another_process_is_writing(
    pair: tuple[str, str], folder: Path, chat: ChatServer
) -> None:
    before = [version.manifest["digest"] for version in DatasetDir(folder / "data").versions()]
    commands = [COMMANDS[name] for name in pair]
    commands = [(*command, chat.url) if "--base-url" in command else command for command in commands]
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    running = [subprocess.Popen([SYNTH, *command], cwd=folder, text=True, **pipes) for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors, errors
        assert process.returncode == 0 or "another process is writing" in errors, errors
    assert any(process.returncode == 0 for process in running)
    after = [version.manifest["digest"] for version in DatasetDir(folder / "data").versions()]
    assert after[: len(before)] == before
    checked = run_synth("check", "data", cwd=folder)
    assert "BAD" not in checked.stdout, checked.stdout + checked.stderr
