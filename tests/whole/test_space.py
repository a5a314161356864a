"""Space: the page of `synth push --space` runs in Gradio with the pushed captioner, without this package."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count as count_from
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from playwright.sync_api import Browser, expect

from pipeline.hub import push as pushing
from pipeline.sources.scenes import draw_sample
from tests.commands import Done, run_synth
from tests.hostile import LONG
from tests.hub.app import Fault
from tests.hub.server import RunningHub
from tests.whole.conftest import ROOT, SYNTH

GRADIO = ROOT / ".venv-gradio"
REPO_NUMBERS = count_from(1)  # a new repository for each interrupted push


@pytest.fixture(scope="module")
def home(hub: RunningHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a trained captioner in `captioner`, and a scene."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "scene.png").write_bytes(draw_sample(seed=5, index=0).images[0])
    synth(hub, folder, "generate", "--source", "scenes", "--limit", "40")
    synth(hub, folder, "train", "--steps", "2", "--out", "captioner")
    return folder


def synth(hub: RunningHub, folder: Path, *arguments: str, code: int = 0) -> Done:
    done = run_synth(*arguments, cwd=folder, env=hub.env(folder / "home"))
    assert done.returncode == code, done.stderr
    return done


def files_of(hub: RunningHub, kind: str, repo: str) -> dict[str, bytes]:
    """Return the files at the head of a repository."""
    repository = hub.hub.storage.repos[kind, repo]
    files = repository.commits[repository.branches["main"]].files
    return {name: hub.hub.storage.path(file.sha256).read_bytes() for name, file in files.items()}


@pytest.fixture(scope="module")
def space(hub: RunningHub, home: Path) -> dict[str, bytes]:
    """Return the files of the Space."""
    done = synth(hub, home, "push", "captioner", "--repo", "me/captioner", "--space", "me/page", "--json")
    assert json.loads(done.stdout)["repo"] == "me/captioner"  # one object for both pushes
    assert "page: " in done.stderr
    return files_of(hub, "space", "me/page")


def test_space_names_commit_and_requirements(space: dict[str, bytes], hub: RunningHub, home: Path) -> None:
    captioner = hub.hub.storage.repos["model", "me/captioner"]
    about = json.loads(space["space.json"])
    assert (about["model"], about["revision"]) == ("me/captioner", captioner.branches["main"])
    assert (about["styles"], about["answers"]) == (["brief", "detailed"], True)
    header = yaml.safe_load(space["README.md"].decode().split("---")[1])
    assert (header["sdk"], header["app_file"], header["models"]) == ("gradio", "app.py", ["me/captioner"])
    # the version that the test below runs
    assert (GRADIO / f"gradio-{header['sdk_version']}.dist-info").is_dir()
    assert b"transformers" in space["requirements.txt"]
    assert set(captioner.tags) == set(hub.hub.storage.repos["space", "me/page"].tags)
    again = synth(hub, home, "push", "captioner", "--repo", "me/captioner", "--space", "me/page")
    assert again.stderr.count("nothing to do") == 2


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 412}, {}, {"after": True}])
def test_push_of_space_after_fault_at_any_request_is_completed_by_next_push(
    fault: dict[str, Any],
    hub: RunningHub,
    home: Path,
    space: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pushing, "_pause_s", lambda error, number: 0.0)

    def push(number: int) -> Done:
        repos = ("--repo", f"me/captioner{number}", "--space", f"me/page{number}")
        return run_synth("push", "captioner", *repos, cwd=home, env=hub.env(home / "home"))

    hub.hub.log.clear()
    assert push(next(REPO_NUMBERS)).returncode == 0
    count = len(hub.hub.log)
    assert count > 20
    for skip in range(count) if LONG else range(len(fault), count, 14):
        number = next(REPO_NUMBERS)
        hub.hub.faults.append(Fault(".*", ".*", skip=skip, **fault))
        first = push(number)
        hub.hub.faults.clear()
        assert first.returncode == 0 or "hint" in first.stderr, (skip, first.stderr)
        assert "Traceback" not in first.stderr, (skip, first.stderr)
        assert push(number).returncode == 0
        model = hub.hub.storage.repos["model", f"me/captioner{number}"]
        page = hub.hub.storage.repos["space", f"me/page{number}"]
        assert len(model.commits) == len(page.commits) == 2  # empty, and whole
        assert model.tags.keys() == page.tags.keys()
        files = files_of(hub, "space", f"me/page{number}")
        assert json.loads(files["space.json"])["revision"] == model.branches["main"]
        assert files.keys() == space.keys()


@pytest.mark.parametrize("arguments", [("--space", "me/page"), ("captioner", "--space", "not a name")])
def test_space_without_captioner_or_name_is_refused(
    hub: RunningHub, home: Path, arguments: tuple[str, ...]
) -> None:
    done = run_synth("push", *arguments, "--repo", "me/captioner", cwd=home, env=hub.env(home / "home"))
    assert done.returncode in (1, 2)
    assert "captioner" in done.stderr or "not a repository name" in done.stderr


@contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run a command that opens the page, and yield its address."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    printed: list[str] = []
    try:
        for line in process.stdout:
            printed.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield address[0]
                return
        raise AssertionError("".join(printed))
    finally:
        process.kill()
        process.wait()


@contextmanager
def published(files: dict[str, bytes], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run the page as a Space does: isolated, without `site`, so that this project cannot be imported."""
    for name, data in files.items():
        (folder / name).write_bytes(data)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    start = "import runpy, sys; sys.path[:0] = sys.argv[1:]; runpy.run_path('app.py', run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-u", "-c", start, str(GRADIO), *packages]
    environment.pop("PYTHONPATH", None)
    with running(command, folder, environment) as address:
        yield address


@pytest.mark.parametrize("where", ["space", "demo"])
def test_visitor_uploads_photo_and_gets_caption_answer_or_error(
    request: pytest.FixtureRequest, hub: RunningHub, home: Path, tmp_path: Path, browser: Browser, where: str
) -> None:
    environment = hub.env(tmp_path / "home") | {"GRADIO_ANALYTICS_ENABLED": "False"}
    captioned = synth(hub, home, "caption", "captioner", "scene.png", "--json")
    expected: str = json.loads(captioned.stdout)["caption"]
    if where == "space":
        opened = published(request.getfixturevalue("space"), tmp_path, environment)
    else:
        command = [str(SYNTH), "serve-captioner", "captioner", "--demo", "--port", "0"]
        opened = running(command, home, environment | {"PYTHONPATH": str(GRADIO)})
    with opened as address:
        if where == "demo":
            with pytest.raises(HTTPError, match="400"):  # a page whose name resolves to this machine
                urlopen(Request(address, headers={"Host": "evil.example"}), timeout=60)
        page = browser.new_page()
        # fonts, scripts
        page.route(lambda url: not url.startswith((address, "blob:", "data:")), lambda route: route.abort())
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(home / "scene.png")
        written = page.locator("#written textarea")
        expect(written).to_have_value(expected, timeout=60_000)
        page.get_by_label("Question").fill("How many?")
        page.get_by_role("button", name="Write").click()
        expect(written).not_to_have_value(expected, timeout=60_000)
        page.reload()
        (tmp_path / "broken.png").write_bytes(b"not an image")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
        expect(page.get_by_text("This file is not an image that can be read.")).to_be_visible(timeout=60_000)
        page.close()


@pytest.mark.parametrize(("host", "hint"), [("127.0.0.1", "pip install gradio"), ("0.0.0.0", "--space")])
def test_page_without_gradio_or_for_other_machines_is_one_error(
    hub: RunningHub, home: Path, host: str, hint: str
) -> None:
    done = synth(hub, home, "serve-captioner", "captioner", "--demo", "--host", host, code=1)
    assert hint in done.stderr and "Traceback" not in done.stderr
