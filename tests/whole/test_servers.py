"""A server that does not enforce schemas is refused, or accepted and named in the card."""

from dataclasses import replace
from pathlib import Path

from tests.chat.kinds import PROXY
from tests.chat.server import ChatServer, running_chat
from tests.commands import run_synth
from tests.whole.conftest import read_card, read_manifest, save_photos


def test_card_names_server_without_enforced_schemas(tmp_path: Path) -> None:
    save_photos(tmp_path, 20)
    (tmp_path / "settings.yaml").write_text("server: {enforced_schema: false}\n")
    with running_chat(ChatServer(kind=replace(PROXY, wrap=str, lists_models=True))) as chat:
        command = ("generate", "--source", "folder:photos", "--base-url", chat.url, "--out", "d")
        refused = run_synth(*command, cwd=tmp_path)
        assert refused.returncode == 1 and "--no-enforced-schema" in refused.stderr, refused.stderr
        assert not list((tmp_path / "d").glob("versions/*"))
        done = run_synth(*command, "--no-enforced-schema", cwd=tmp_path)
        assert done.returncode == 0 and "does not enforce JSON schemas" in done.stderr, done.stderr
        num_requests = len(chat.bodies)
        assert run_synth(*command, "--config", "settings.yaml", cwd=tmp_path).returncode == 0
        assert len(chat.bodies) == num_requests
    card = read_card(tmp_path / "d")
    assert "The server was not required to enforce the JSON schema of the task" in card
    assert read_manifest(tmp_path / "d")["model"]["revision"].endswith("+unenforced")
