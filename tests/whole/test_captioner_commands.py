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

import trainer.loop
from pipeline.cli.captioners import caption
from pipeline.cli.training import evaluate, train
from pipeline.cli.versions import versions_gc
from pipeline.dataset.version import FEATURES, LOCK, Version
from pipeline.errors import StoreError, TrainError
from tests.hostile import LONG
from tests.pipeline.images.test_similarity import photo
from tests.scene_data import make_version, scene_samples
from tests.trainer.test_captioner import save_captioner
from tests.trainer.tiny_models import save_clip, save_language_model
from tests.whole.conftest import SMALL_DECODER, SYNTH, restore_sigint
from trainer.runtime.training_state import save_resume

SMALL = SMALL_DECODER | {"evaluate_images": 4, "max_caption_tokens": 12}


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return make_version(tmp_path / "data", scene_samples(40))[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    return {"encoder": save_clip(root / "clip"), "decoder": save_language_model(root / "lm", "qwen3")}


def settings(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return values


def test_flags_become_settings_and_scenes_use_their_preset(
    version: Version, models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: Any = {"encoder": models["encoder"], "epochs": 1, "batch_size": 16, "lr": 0.002, "seed": 3}
    train(data=str(version.path), **flags, out=tmp_path / "c")
    trained = settings(tmp_path / "c")
    images = version.manifest["rows"]["train"]
    expected = {
        "epochs": 1,
        "preset": "scenes",
        "connector_lr": 0.002,
        "decoder_lr": 0.002,
        "seed": 3,
        "batch_size": 16,
    }
    assert expected.items() <= trained.items() and trained["precision"] == "fp32"
    printed = capsys.readouterr().err
    assert "preset scenes: " in printed and f"At most {-(-images // 16)} steps of 16 images (1." in printed
    before = (tmp_path / "c/model.safetensors").stat().st_mtime_ns
    train(data=str(version.path), **flags, out=tmp_path / "c", as_json=True)
    shown = capsys.readouterr()
    assert "already has this captioner" in shown.err
    assert json.loads(shown.out)["scores"] == json.loads((tmp_path / "c/metrics.json").read_text())["scores"]
    assert (tmp_path / "c/model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def interrupted(
    version: Version, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return the folder of an interrupted training with a pretrained decoder."""

    def save_and_die(folder: Path, state: dict[str, Any]) -> None:
        save_resume(folder, state)
        raise KeyboardInterrupt

    config = tmp_path / "c.yaml"
    changes = {"steps": 3, "evaluations": 3, "preset": "photos-lm", "lora_rank": 2}
    config.write_text(json.dumps(SMALL | changes))
    monkeypatch.setattr(trainer.loop, "save_resume", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(data=str(version.path), config=config, **models)
    monkeypatch.undo()
    (folder,) = [state.parent for state in version.dataset_dir.rglob("resume.pt")]
    return folder


@pytest.mark.parametrize("names_models", [True, False])
def test_resumed_training_keeps_its_settings(
    version: Version,
    models: Any,
    interrupted: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    names_models: bool,
) -> None:
    before = settings(interrupted)
    capsys.readouterr()
    named = models if names_models else {"out": interrupted}
    train(data=str(version.path), resume=True, **named)
    assert settings(interrupted) == before
    assert f"decoder {models['decoder']}" in capsys.readouterr().err
    assert (interrupted / "metrics.json").exists()


def test_caption_notes_unfinished_training_and_refuses_empty_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner, image = str(save_captioner(tmp_path / "c")), str(tmp_path / "photo.png")
    photo(3).save(image)
    for is_unfinished in (False, True):
        if is_unfinished:
            (tmp_path / "c" / "resume.pt").write_bytes(b"state")
        caption(captioner, [image, image], as_json=True)
        printed = capsys.readouterr()
        assert [json.loads(line)["image"] for line in printed.out.splitlines()] == [image]
        note = "is not finished; `synth train --resume --out "
        assert (note in printed.err.replace("\n", " ")) == is_unfinished
    with pytest.raises(BadParameter, match="the question is empty"):
        caption(captioner, [image], question=" ")


def test_caption_json_lists_unreadable_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(3).save(tmp_path / "photo.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images, out = [str(tmp_path / "photo.png"), str(tmp_path / "bad.png")], tmp_path / "said.jsonl"
    caption(str(save_captioner(tmp_path / "c")), images, out=out, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"path": str(out), "written": 1, "unread": [images[1]]}


def test_failed_evaluation_keeps_earlier_captions(
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
    with pytest.raises(
        StoreError, match="a file exists where a folder should be"
    ):  # before anything is computed
        evaluate(captioner, str(version.path), captions=tmp_path / "c.jsonl" / "d.jsonl")


def test_evaluation_uses_beams_of_training(
    version: Version, models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_file = tmp_path / "c.json"
    settings_file.write_text(json.dumps(SMALL | {"num_beams": 2}))
    train(str(version.path), encoder=models["encoder"], steps=1, config=settings_file, out=tmp_path / "c")
    capsys.readouterr()
    for asked, beams in ((None, 2), (1, 1)):
        evaluate(str(tmp_path / "c"), str(version.path), num_beams=asked, as_json=True)
        printed = capsys.readouterr()
        assert json.loads(printed.out)["num_beams"] == beams
        assert ("written with 2 beams" if beams == 2 else "written greedily") in printed.err


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


def test_gc_removes_stored_states_except_locked_ones(
    version: Version, models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(SMALL | {"steps": 1}))
    train(str(version.path), encoder=models["encoder"], decoder="scratch", config=config, out=tmp_path / "c")
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
