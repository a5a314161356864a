"""Commands for captioners, called as functions, and signals to a server process."""

import fcntl
import json
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer import BadParameter

from pipeline.cli.captioners import caption
from pipeline.cli.training import evaluate, train
from pipeline.cli.versions import versions_gc
from pipeline.dataset.version import FEATURES, LOCK, Version
from pipeline.errors import StoreError, TrainError
from tests.hostile import LONG
from tests.pipeline.images.test_similarity import photo
from tests.scene_data import make_version, scene_samples
from tests.trainer.test_captioner import save_captioner
from tests.trainer.tiny_models import save_clip
from tests.whole.conftest import SMALL_DECODER, SYNTH, restore_sigint

SMALL = SMALL_DECODER | {"evaluate_images": 4, "max_caption_tokens": 12}


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("data"), scene_samples(40))[0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


def test_flags_become_settings_and_scenes_use_their_preset(
    version: Version, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: Any = {"encoder": encoder, "epochs": 1, "batch_size": 16, "seed": 3}
    train(data=str(version.path), **flags, lr=0.002, out=tmp_path / "c")
    trained = json.loads((tmp_path / "c/train.json").read_text())
    images = version.manifest["rows"]["train"]
    rates = {"connector_lr": 0.002, "decoder_lr": 0.002}
    expected = flags | rates | {"preset": "scenes", "precision": "fp32"}
    assert expected.items() <= trained.items()
    printed = capsys.readouterr().err
    assert "preset scenes: " in printed and f"At most {-(-images // 16)} steps of 16 images (1." in printed
    train(data=str(version.path), **flags, lr=0.002, out=tmp_path / "c", as_json=True)
    shown = capsys.readouterr()
    assert "already has this captioner" in shown.err
    assert json.loads(shown.out)["scores"] == json.loads((tmp_path / "c/metrics.json").read_text())["scores"]


def test_caption_warns_of_an_unfinished_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioner, out = save_captioner(tmp_path / "c"), tmp_path / "captions.jsonl"
    photo(3).save(tmp_path / "photo.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [str(tmp_path / "photo.png"), str(tmp_path / "bad.png")]
    caption(str(captioner), images, out=out, as_json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"path": str(out), "written": 1, "unread": [images[1]]}
    assert "is not finished" not in printed.err
    (captioner / "resume.pt").write_bytes(b"state")
    caption(str(captioner), images[:1] * 2, as_json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["image"] == images[0]  # an image passed twice is captioned once
    assert "is not finished; `synth train --resume --out " in printed.err.replace("\n", " ")
    with pytest.raises(BadParameter, match="the question is empty"):
        caption(str(captioner), images, question=" ")


def test_failed_evaluation_keeps_the_existing_captions_file(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise TrainError("out of memory")

    monkeypatch.setattr("trainer.evaluate.evaluate_version", fail)
    captioner = str(save_captioner(tmp_path / "c"))
    (tmp_path / "c.jsonl").write_text("before\n")
    with pytest.raises(TrainError, match="out of memory"):
        evaluate(captioner, str(version.path), captions=tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_text() == "before\n"
    with pytest.raises(StoreError, match="a file exists where a folder should be"):
        evaluate(captioner, str(version.path), captions=tmp_path / "c.jsonl" / "d.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM] if LONG else [signal.SIGTERM])
def test_signal_ends_server_while_request_body_arrives(number: int, tmp_path: Path) -> None:
    folder = save_captioner(tmp_path / "c")
    command = [str(SYNTH), "serve-captioner", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint) as server:
        assert server.stderr
        port = int(next(line for line in server.stderr if line.startswith("http")).strip().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += "Content-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 200\r\n\r\n{{".encode())
            # this answer shows that the first request has arrived
            with socket.create_connection(("127.0.0.1", port)) as other:
                other.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert b"200 OK" in other.recv(1000)
            server.send_signal(number)
            try:
                assert server.wait(20) == (130 if number == signal.SIGINT else 143)
            finally:
                server.kill()
        assert "Traceback" not in server.stderr.read()


def test_gc_removes_stored_encoder_states_unless_a_training_uses_them(
    version: Version, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL | {"steps": 1}))
    train(str(version.path), encoder=encoder, decoder="scratch", config=config, out=tmp_path / "c")
    (store,) = (version.dataset_dir / FEATURES).iterdir()
    busy = store.with_name("busy")
    busy.mkdir()
    with (busy / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for dry_run in (True, False):
            capsys.readouterr()
            versions_gc(str(version.dataset_dir), dry_run=dry_run)
            collected = capsys.readouterr()
            assert f" {store}, " in collected.err and str(busy) not in collected.err
            assert collected.out.startswith("would free " if dry_run else "freed ")
            assert store.exists() == dry_run
    assert busy.exists()
