"""Privacy: no metadata of photos is in any byte that is sent, from a folder to the Hub and back."""

import base64
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipeline.images.decode import image_id, prepare_image
from tests.chat.server import Act, ChatServer, running_chat, task_name
from tests.commands import Done, require_success, run_python, run_synth
from tests.hub.server import RunningHub
from tests.hub.storage import File
from tests.pipeline.images.test_metadata import gif, jpeg, leaked, png, tiff, webp
from tests.pipeline.images.test_similarity import photo

PHOTOS = {  # no near-duplicates
    "upright.jpg": jpeg(),
    "turned.jpg": jpeg(6, image=photo(4)),
    "screen.png": png(3, image=photo(5)),
    "web.webp": webp(image=photo(6), lossless=True),
    "moving.gif": gif(photo(7)),
    "scan.tif": tiff(8, image=photo(8)),
}
LOAD = """
import json, sys
from datasets import load_dataset
rows = [row for split in load_dataset(sys.argv[1], revision="v1.0.0").values() for row in split]
images = {row["sample_id"]: row["image"] for row in rows}
print(json.dumps([
    [name, image.size, len(image.getexif()), image.convert("RGB").tobytes().hex()[:300]]
    for name, image in images.items()
]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    numbers = count()

    def script(times: int, body: dict[str, Any]) -> Act | None:
        is_caption = task_name(body) == "caption"
        text = f"A view of place number {next(numbers)} with trees near a lake."
        return Act(json.dumps({"caption": text})) if is_caption else None

    with running_chat(ChatServer(script)) as running:
        yield running


@pytest.fixture(scope="module")
def home(hub: RunningHub, server: ChatServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "photos").mkdir()
    for name, data in PHOTOS.items():
        (folder / "photos" / name).write_bytes(data)
    run(hub, folder, "generate", "--source", "folder:photos", "--base-url", server.url)
    return folder


def run(hub: RunningHub, folder: Path, *arguments: str) -> Done:
    env = hub.env(folder / "home")
    return require_success(run_synth(*arguments, cwd=folder, env=env))


def read(hub: RunningHub, file: File) -> bytes:
    return hub.hub.storage.path(file.sha256).read_bytes()


def test_model_receives_images_without_metadata(home: Path, server: ChatServer) -> None:
    contents = [message["content"] for body in server.bodies for message in body["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert len(urls) >= len(PHOTOS)
    assert [leaked(base64.b64decode(url.partition(",")[2])) for url in urls] == [[]] * len(urls)


def test_pushed_images_are_upright_and_without_metadata(home: Path, hub: RunningHub) -> None:
    message = run(hub, home, "push", "--repo", "me/photos").stderr
    reason = "the license of the images is unknown, or the Hub does not list it (state it: --license)"
    assert f"repository: me/photos, private: {reason}" in message
    assert "dataset: data/folder-photos\n" in message
    assert "license of the images: unknown" in message
    repo = hub.hub.storage.repos["dataset", "me/photos"]
    assert repo.private
    sent = [read(hub, file) for file in repo.commits[repo.tags["v1.0.0"]].files.values()]
    assert [leaked(data) for data in sent] == [[]] * len(sent)
    loaded = run_python("-c", LOAD, "me/photos", cwd=home, env=hub.env(home / "reader"))
    rows = {row[0]: row[1:] for row in json.loads(loaded.stdout)}
    assert set(rows) == {image_id(data) for data in PHOTOS.values()}
    for data in PHOTOS.values():
        upright = prepare_image(data)
        size, tags, start = rows[image_id(data)]
        assert tuple(size) == upright.size
        assert start == upright.tobytes().hex()[:300]
        assert tags == 0


def test_stated_license_title_and_language_are_used(home: Path, hub: RunningHub, server: ChatServer) -> None:
    stated = ("--license", "cc-by-4.0", "--title", "My lakes", "--language", "de")
    assert "me/lakes, public" in run(hub, home, "push", "--repo", "me/lakes", *stated).stderr
    repo = hub.hub.storage.repos["dataset", "me/lakes"]
    assert not repo.private
    run(hub, home, "push", "--repo", "me/closed", "--private")
    again = run(hub, home, "push", "--repo", "me/closed", "--public").stderr
    assert "the existing repository is private, and stays private" in again
    files = repo.commits[repo.tags["v1.0.0"]].files
    card, manifest = (read(hub, files[name]).decode() for name in ("README.md", "manifest.json"))
    for line in ("license: cc-by-4.0", "- de", "# My lakes", "pretty_name: My lakes"):
        assert line in card
    expected = {"license": "cc-by-4.0", "title": "My lakes", "language": "de"}
    assert expected.items() <= json.loads(manifest).items()
    link = "javascript:alert(1)"
    for option, value in (("license", "mine\nall mine"), ("language", "German"), ("license-link", link)):
        push = ("push", "--repo", "me/odd", f"--{option}", value)
        done = run_synth(*push, cwd=home, env=hub.env(home / "home"))
        assert (done.returncode, f"--{option}" in done.stderr) == (2, True), done.stderr
    assert ("dataset", "me/odd") not in hub.hub.storage.repos
    num_requests = len(server.bodies)
    data = ("--source", "folder:photos", "--base-url", server.url)
    known = ("--license", "cc-by-4.0", "--title", "Lakes")
    made = json.loads(run(hub, home, "generate", *data, *known, "--json").stdout)
    assert len(server.bodies) == num_requests
    version = json.loads((home / made["path"] / "manifest.json").read_text())
    assert (version["licenses"], version["title"]) == (["cc-by-4.0"], "Lakes")
    assert "# Lakes" in (home / made["path"] / "README.md").read_text()
