"""Servers of other vendors: a strict one, and one without enforced schemas."""

import json
import os
from pathlib import Path

import pytest

from tests.chat.kinds import DEEPSEEK
from tests.chat.server import ChatServer, running_chat
from tests.commands import Done, run_synth
from tests.whole.conftest import save_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path, 20)


def generate(folder: Path, chat: ChatServer, *arguments: str) -> Done:
    command = ("generate", "--source", "folder:photos", "--base-url", chat.url, "--out", "d", *arguments)
    return run_synth(*command, cwd=folder, env=os.environ | {"SYNTH_API_KEY": chat.key or ""})


def test_card_names_server_without_enforced_schemas(photos: Path) -> None:
    with running_chat(ChatServer(kind=DEEPSEEK)) as chat:
        refused = generate(photos, chat)
        assert refused.returncode == 1 and "--no-enforced-schema" in refused.stderr, refused.stderr
        assert not (photos / "d").exists() or not list((photos / "d").glob("versions/*"))
        done = generate(photos, chat, "--no-enforced-schema")
        assert done.returncode == 0 and "does not enforce JSON schemas" in done.stderr, done.stderr
        settings = photos / "settings.yaml"
        settings.write_text("server: {enforced_schema: false}\n")  # the same setting in the file
        num_requests = len(chat.bodies)
        assert generate(photos, chat, "--config", "settings.yaml").returncode == 0
        assert len(chat.bodies) == num_requests
    card = (photos / "d/versions/v1.0.0/README.md").read_text()
    assert "The server was not required to enforce the JSON schema of the task" in card
    manifest = json.loads((photos / "d/versions/v1.0.0/manifest.json").read_text())
    assert manifest["model"]["revision"].endswith("+unenforced")
