"""Run `synth` commands in an empty folder."""

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from tests.chat.server import ChatServer, Script, running_chat
from tests.commands import SYNTH, run_synth
from tests.hub.server import RunningHub, running_hub
from tests.media import encoded
from tests.pipeline.images.test_similarity import photo

__all__ = ["SYNTH"]

ROOT = Path(__file__).parents[2]
SMALL_DECODER = {"decoder_width": 64, "decoder_depth": 1, "decoder_heads": 2}

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def synth(tmp_path: Path) -> Run:
    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return run_synth(*arguments, cwd=tmp_path, env=env)

    return run


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def server(model: Script) -> Iterator[ChatServer]:
    """Run a server whose replies are those of the module's `model`."""
    with running_chat(ChatServer(model)) as chat:
        yield chat


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project's files, because a build adds files next to them."""
    copy = tmp_path_factory.mktemp("source")
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@cache
def _photo_bytes(number: int, suffix: str) -> bytes:
    return encoded(photo(number), {"jpg": "JPEG"}.get(suffix, suffix))


def save_photos(folder: Path, count: int, suffix: str = "png") -> Path:
    """Save distinct photos as 00, 01, ... in `folder/photos`, and return `folder`."""
    (folder / "photos").mkdir()
    for number in range(count):
        (folder / "photos" / f"{number:02}.{suffix}").write_bytes(_photo_bytes(number, suffix))
    return folder


def write_metadata(folder: Path, **columns: list[str]) -> None:
    """Write `photos/metadata.csv` for the photos of `save_photos`."""
    with (folder / "photos/metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", *columns])
        rows = enumerate(zip(*columns.values(), strict=True))
        writer.writerows([f"{number:02}.png", *values] for number, values in rows)


def write_training_settings(folder: Path) -> None:
    """Write `small.yaml`: a training that takes about a second."""
    settings = SMALL_DECODER | {"steps": 2, "batch_size": 8, "evaluate_images": 4, "max_caption_tokens": 12}
    (folder / "small.yaml").write_text(json.dumps(settings))


def read_manifest(dataset: Path, version: str = "v1.0.0") -> Any:
    return json.loads((dataset / "versions" / version / "manifest.json").read_text())


def read_card(dataset: Path, version: str = "v1.0.0") -> str:
    return (dataset / "versions" / version / "README.md").read_text()


def load_rows(dataset: Path, version: str = "v1.0.0") -> Any:
    """Return the rows of all splits of a version, read by `datasets`."""
    files = [str(path) for path in sorted((dataset / "versions" / version).glob("*-*.parquet"))]
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(dataset.parent / "cache"))


def restore_sigint() -> None:
    """Restore SIGINT in a child process, in case the tests run in a background job that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignore_sigint() -> None:
    """Ignore SIGINT in a child process, like a background job of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def descendants(pid: int, word: str = "") -> list[int]:
    """Return the child processes of a process, at any depth, whose command contains `word`."""
    done = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True)
    lines = [line.split(None, 2) for line in done.stdout.splitlines()[1:]]
    parents = {int(child): (int(parent), command) for child, parent, command in lines}

    def is_below(child: int) -> bool:
        return child in parents and (parents[child][0] == pid or is_below(parents[child][0]))

    return [child for child, (_, command) in parents.items() if word in command and is_below(child)]


def is_alive(pid: int) -> bool:
    """Return whether a process runs and is not a zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 600) -> None:
    """Wait until a condition holds. Fail with `what` after a timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def read_failure(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Return error and hint of a failed command with exit code 1 and without traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("synth: ")
    assert hint.startswith("  hint: ")
    return error, hint
