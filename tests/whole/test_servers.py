"""Servers of other vendors: a strict one, and one without enforced schemas."""

import json
import os
from pathlib import Path

import pytest

from tests.chat.kinds import DEEPSEEK
from tests.chat.server import ChatServer, running_chat
from tests.commands import Done, require_success, run_synth
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


def test_password_in_address_reaches_server_but_no_file_or_message(photos: Path) -> None:
    with running_chat(ChatServer()) as chat:
        address = chat.url.replace("://", "://bob:s3cret,'word@")
        source = ("--source", "folder:photos", "--tasks", "caption", "--out", "d")
        arguments = ("generate", *source, "--base-url")
        made = require_success(run_synth(*arguments, address, "--json", cwd=photos))
        assert all(sent and sent.startswith("Basic ") for sent in chat.authorizations)
        num_requests = len(chat.bodies)
        judged = run_synth(*arguments, address, "--judge", f"other@{address}/wrong", cwd=photos)
        again = run_synth(*arguments, address, cwd=photos)
        assert (again.returncode, len(chat.bodies)) == (0, num_requests), again.stderr
    refused = run_synth(*arguments, address, "--words", "12", cwd=photos)
    unread = run_synth(*arguments, address.replace("http", "ftp"), cwd=photos)
    assert (judged.returncode, refused.returncode, unread.returncode) == (1, 1, 1)
    shown = [text for done in (made, judged, again, refused, unread) for text in (done.stdout, done.stderr)]
    assert "no server answers at http://127.0.0.1" in refused.stderr
    assert "ftp://***@127.0.0.1" in unread.stderr
    assert not [text for text in shown if "s3cret" in text]
    files = [path for path in (photos / "d").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"s3cret" in path.read_bytes()]
