"""A real vLLM server with the tiny teacher: started, used, killed and stopped by `synth`."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.dataset.directory import DatasetDir
from pipeline.digests import weights_revision
from pipeline.inference.engines import TINY_WEIGHTS
from tests.commands import require_success, run_synth
from tests.hostile import LONG
from tests.scene_data import scene_samples, scenes_by_id, score_annotations
from tests.whole.conftest import ROOT, SYNTH, descendants, is_alive, restore_sigint, wait_until

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
KEY = "test-key-of-nobody"
SERVER = "vllm.entrypoints"  # the command line of a server contains this
SCENES = 48


def missing_vllm_reason() -> str | None:
    if PYTHON.exists():
        return None
    log = ROOT / ".stamps" / "vllm.log"
    errors = [line for line in log.read_text().splitlines() if "ERROR" in line] if log.exists() else []
    return errors[0] if errors else "run `make test`, which installs it"


@pytest.fixture(scope="module", autouse=True)
def vllm() -> None:
    if reason := missing_vllm_reason():
        if os.environ.get("CI") == "true":
            pytest.fail(f"vLLM is not installed, and CI must not pass without it: {reason}")
        pytest.skip(f"NOT RUN: {reason}")


def environment(temporary: Path | None = None) -> dict[str, str]:
    folder = {"TMPDIR": str(temporary)} if temporary else {}
    return os.environ | {"SYNTH_VLLM_PYTHON": str(PYTHON), "SYNTH_API_KEY": KEY} | folder


def sockets_of(server: int) -> Path:
    variables = Path(f"/proc/{server}/environ").read_bytes().decode().split("\0")
    return Path(next(one for one in variables if one.startswith("VLLM_RPC_BASE_PATH=")).partition("=")[2])


def generate(folder: Path, *arguments: str, scenes: int = SCENES) -> list[str]:
    options = ["--source", "scenes", "--limit", str(scenes), "--json", "--out", str(folder)]
    return ["generate", *options, *arguments]


def annotations(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(DatasetDir(folder).step_file("validate")).to_pylist())


def captions_of(folder: Path) -> dict[tuple[str, str], str]:
    rows = [row for row in annotations(folder) if row["task"] == "caption"]
    return {(row["sample_id"], row["style"]): row["text"] for row in rows}


def accuracy(folder: Path) -> dict[str, float]:
    captions, answers = score_annotations(annotations(folder), scenes_by_id(scene_samples(SCENES)))
    precision = {style: score.precision for style, score in captions.items()}
    return precision | {kind: score.accuracy for kind, score in answers.items()}


def funnel_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in DatasetDir(folder).version().manifest["funnel"]}


def replies(folder: Path) -> int:
    journal = DatasetDir(folder).journal
    if not journal.exists():
        return 0
    with sqlite3.connect(journal) as db:
        try:
            return int(db.execute("SELECT COUNT(*) FROM replies").fetchone()[0])
        except sqlite3.OperationalError:
            return 0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run `synth serve` as in a second terminal. A start takes half a minute."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(SYNTH), "serve", "--model", "tiny", "--port", str(port), "--", "--max-num-seqs", "16"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment(), stdout=output, stderr=output, preexec_fn=restore_sigint
        )

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return bool(answer.status == 200)
        return False

    try:
        wait_until(is_ready, "the server")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        family = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(600)
    wait_until(lambda: not any(map(is_alive, family)), "the server is gone after Ctrl-C")
    assert f"export SYNTH_API_KEY={KEY}" in log.read_text()
    assert "max_num_seqs" in log.read_text()  # the user's flag was passed on


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "d"
    require_success(run_synth(*generate(folder, "--engine", "embedded"), cwd=folder.parent))
    return folder


def test_running_server_replies_like_embedded_engine(served: str, embedded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    require_success(run_synth(*generate(folder, "--base-url", served), cwd=tmp_path, env=environment()))
    assert DatasetDir(folder).version().manifest["model"]["revision"] == weights_revision(TINY_WEIGHTS)
    funnel = funnel_of(folder)
    assert funnel["ask"]["kept"] == SCENES * 3
    assert funnel["validate"]["rejected"] == {}
    local, remote = accuracy(embedded), accuracy(folder)
    assert all(remote[name] > local[name] - 0.15 for name in local), (local, remote)
    expected, texts = captions_of(embedded), captions_of(folder)
    # vLLM computes in bfloat16: near ties may resolve differently, but rarely.
    assert sum(texts[key] == text for key, text in expected.items()) >= 0.85 * len(texts)


def test_server_enforces_schema_of_custom_task(served: str, tmp_path: Path) -> None:
    properties = {
        "size": {"enum": ["small", "large"]},
        "parts": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"enum": ["ring", "star"]}},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    }
    output = {"type": "object", "required": ["size", "parts"], "properties": properties}
    task = tmp_path / "things.yaml"
    settings = {"name": "things", "kind": "record", "prompt": "What is there?", "output": output}
    task.write_text(json.dumps(settings))
    options = ("--task", str(task), "--base-url", served)
    require_success(run_synth(*generate(tmp_path / "d", *options, scenes=8), cwd=tmp_path, env=environment()))
    version = DatasetDir(tmp_path / "d").version()
    things = [row["things"] for _, batch in version.batches(["things"]) for row in batch.to_pylist()]
    assert len(things) == 8 and funnel_of(tmp_path / "d")["validate"]["rejected"] == {}
    for thing in things:
        assert 1 <= len(thing["parts"]) <= 2 and {*thing["parts"]} <= {"ring", "star"}
        assert thing["size"] in ("small", "large") and thing["count"] in (None, *range(10))


def test_server_requires_key_and_reads_no_other_files(served: str) -> None:
    model = f"tiny@{weights_revision(TINY_WEIGHTS)}"

    def ask(url: str, headers: dict[str, str]) -> int:
        image = {"type": "image_url", "image_url": {"url": url}}
        message = {"role": "user", "content": [image, {"type": "text", "text": "Task: caption, brief"}]}
        body = json.dumps({"model": model, "messages": [message], "max_tokens": 8}).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"{served}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert ask("file:///etc/hostname", {}) == 401
    # Without a folder of allowed files, vLLM answers with an error of its own.
    assert ask("file:///etc/hostname", {"Authorization": f"Bearer {KEY}"}) == 500


def test_run_stops_its_server_and_survives_the_death_of_the_server(tmp_path: Path) -> None:
    folder, scenes, temporary = tmp_path / "d", 160 if LONG else 8, tmp_path / "temporary"
    temporary.mkdir()
    command = [str(SYNTH), *generate(folder, "--engine", "vllm", scenes=scenes)]
    with (tmp_path / "progress.txt").open("w") as progress:
        process = subprocess.Popen(
            command, env=environment(temporary), stdout=subprocess.PIPE, stderr=progress, text=True
        )
        wait_until(lambda: replies(folder) > (30 if LONG else 0) or process.poll() is not None, "replies")
        assert process.poll() is None, (tmp_path / "progress.txt").read_text()
        (server,) = descendants(process.pid, SERVER)
        family, sockets = descendants(process.pid), sockets_of(server)
        if LONG:
            os.kill(server, signal.SIGKILL)
        stdout, _ = process.communicate(timeout=600)
    log = (tmp_path / "progress.txt").read_text()
    assert process.returncode == 0, log
    assert ("vLLM died" in log) == LONG
    assert KEY not in log + stdout + (folder / "vllm.log").read_text()
    funnel = funnel_of(folder)
    assert funnel["ask"]["kept"] == scenes * 3
    assert sum(DatasetDir(folder).version().manifest["rows"].values()) == scenes
    assert not any(map(is_alive, family))
    assert not sockets.exists() and not [path for path in temporary.rglob("*") if path.is_socket()]


def test_server_ends_after_its_run_is_killed(tmp_path: Path) -> None:
    command = [str(SYNTH), *generate(tmp_path / "d", "--engine", "vllm")]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    wait_until(lambda: descendants(process.pid, "vllm"), "a server process")
    family = descendants(process.pid)
    assert any(map(is_alive, family))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, family)), "the server is gone")
