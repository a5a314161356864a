"""Before a run: `preview` shows replies, and `estimate` predicts costs and rejections."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.model_licenses import UNKNOWN_LICENSE
from tests.chat.server import Act, ChatServer, running_chat, task_name, task_of
from tests.commands import Done, require_success, run_synth
from tests.media import write_pdf
from tests.whole.conftest import save_photos

IMAGES = "images: at most 1,003,520 px, about 1,280 tokens"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """Return a server whose every fourth caption is too short, and whose first reply is invalid JSON."""
    numbers = count()

    def script(times: int, body: dict[str, Any]) -> Act | None:
        name, number = task_name(body), next(numbers)
        if number == 0:
            return Act('{"caption"')
        if name == "caption":
            view = "<b>view</b>" if number % 4 == 1 else "view"
            text = f"A {view} of place number {number} with trees near a lake."
            return Act(json.dumps({"caption": text if number % 4 else "A dog."}))
        answer = {"answer": "no" if "star" in task_of(body) else "yes"}
        return Act(json.dumps(answer)) if name == "answer" else None

    with running_chat(ChatServer(script)) as chat:
        yield chat


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    save_photos(tmp_path, 12, "jpg")
    (tmp_path / "photos" / "05b.jpg").write_bytes(b"no photo")
    return tmp_path


def run(folder: Path, *arguments: str) -> Done:
    return require_success(run_synth(*arguments, cwd=folder))


def test_preview_shows_texts_prompts_and_rejections(photos: Path, server: ChatServer) -> None:
    source = ("--source", "folder:photos", "--base-url", server.url, "--tasks", "caption")
    command = ("preview", *source, "-n", "7")
    described = json.loads(run(photos, *command, "--json").stdout)
    images = described["images"]
    assert {*images} == {"05b.jpg", *(f"{number:02}.jpg" for number in range(7))}
    assert images["05b.jpg"] == [["unknown image format", "read: unreadable image", ""]]
    texts = [text for name, texts in images.items() if name != "05b.jpg" for text in texts]
    assert len(texts) == 14
    assert {kind for _, reason, kind in texts if reason is None} == {"plain", "detailed"}
    assert {reason for _, reason, _ in texts} == {
        None,
        "filter: too few words",
        "filter: markup, code or coordinates in the text",
    }
    assert {*described["prompts"]} == {"caption plain", "caption detailed"}
    num_requests = len(server.bodies)
    done = run(photos, *command)
    assert len(server.bodies) == num_requests  # the replies are reused
    assert "rejected by filter: too few words" in done.stderr and " (detailed)\n" in done.stderr
    asks = f"requests caption from model ({server.url}; {UNKNOWN_LICENSE}; {IMAGES}); 2 requests per image"
    assert asks in done.stderr
    assert done.stdout.strip() == "data/folder-photos/preview.html"
    assert not (photos / "data/folder-photos/.trial").exists()
    page = (photos / "data/folder-photos/preview.html").read_text()
    assert "<title>photos preview</title>" in page
    assert ".trial" not in page and str(photos) not in page
    done = run(photos, "generate", *source, "--json")
    assert "next: synth report data/folder-photos" in done.stderr
    made = json.loads(done.stdout)
    assert made["version"] == "v1.0.0"
    assert made["requests"]["total"] == 24
    assert made["requests"]["asked"] == 10  # requests for the five other images


def test_preview_without_a_usable_text_states_each_reason(photos: Path, server: ChatServer) -> None:
    server.script = lambda times, body: Act(json.dumps({"caption": "A dog."}))
    source = ("--source", "folder:photos", "--base-url", server.url, "--tasks", "caption")
    done = run(photos, "preview", *source, "-n", "1")
    assert done.stderr.count("rejected by filter: too few words") == 2
    assert done.stdout.strip() == "" and not (photos / "data/folder-photos/preview.html").exists()


def test_estimate_counts_verification_retries_rejections_and_cost(photos: Path, server: ChatServer) -> None:
    data = ("--source", "folder:photos", "--base-url", server.url, "--tasks", "caption")
    options = (*data, "--verify", "claims", "--price-in", "2", "--price-out", "4")
    done = run(photos, "estimate", *options, "--json")
    predicted = json.loads(done.stdout)
    assert (predicted["sampled_images"], predicted["images"], predicted["remaining_images"]) == (12, 12, 0)
    assert predicted["requests"] == 24
    assert predicted["retries"] == 1
    assert predicted["verify_requests"] > 0
    assert predicted["asked"] == 25 + predicted["verify_requests"]
    totals = (predicted["total_hours"] * 3600, predicted["total_cost"])
    assert totals == pytest.approx((predicted["sampled_seconds"], predicted["sampled_cost"]), abs=0.01)
    total = f", {predicted['total_tokens']:,} tokens, cost {predicted['total_cost']:,.4g}"
    assert any(
        line.startswith("whole run: 12 images") and line.endswith(total) for line in done.stderr.splitlines()
    )
    assert predicted["sampled_cost"] > 2 * 40 * predicted["asked"] / 1e6 and predicted["cost"] == 0
    assert predicted["lost_by"]["filter: too_short"] == 6
    assert "6 too short" in done.stderr or "6 filter: too short" in done.stderr
    assert not (photos / "data/folder-photos/.trial").exists()
    num_requests = len(server.bodies)
    made = json.loads(run(photos, "generate", *options, "--json").stdout)
    assert len(server.bodies) == num_requests
    assert made["requests"]["asked"] == 0
    kept = made["steps"]
    assert predicted["annotations"] == kept["validate"]["input"]
    assert predicted["kept_annotations"] == kept["review"]["kept"]
    assert predicted["kept_images"] == kept["write"]["kept"]
    again = json.loads(run(photos, "estimate", *options, "--json").stdout)
    assert (again["asked"], again["remaining_images"], again["cost"]) == (0, 0, 0)
    assert again["kept_images"] == kept["write"]["kept"]
    shown = run(photos, "estimate", *options).stdout.splitlines()
    assert shown[0].startswith("sample: 12 images, 0 requests")
    assert shown[1].startswith("still to do: 0 images, about 0 requests, 0 s, cost 0 (")
    assert shown[2].startswith("whole run: 12 images, about 24 requests and ") and "cost" not in shown[2]


@pytest.mark.parametrize(("options", "warns"), [((), True), (("--limit", "33"), False)])
def test_estimate_warns_if_the_number_of_images_is_unknown(
    options: tuple[str, ...], server: ChatServer, tmp_path: Path, *, warns: bool
) -> None:
    write_pdf(tmp_path / "long.pdf", 33)
    source = ("--source", "pdf-pages:long.pdf", "--tasks", "caption", "--base-url", server.url)
    done = run(tmp_path, "estimate", *source, *options)
    assert ("the number of images is unknown" in done.stderr) == warns
