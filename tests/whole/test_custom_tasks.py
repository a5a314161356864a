"""Custom tasks: from YAML to a pushed dataset with typed columns."""

import base64
import hashlib
import io
import json
import pickle
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import List, Value
from PIL import Image

from tests.chat.server import Act, ChatServer, running_chat, task_name, uuid_of
from tests.commands import Done, read_result, require_success, run_synth
from tests.hub.server import running_hub
from tests.whole.conftest import ROOT, load_rows, read_card, save_photos, write_metadata

COUNT = 24
EXAMPLES = ROOT / "prompts/examples"
DETAILED = "A lamp stands on a wooden desk beside a stack of books, and a window shows a garden in the rain"
LOAD = """
import datasets, pickle, sys
loaded = datasets.load_dataset("me/shop")
rows = {split: part.remove_columns(["image"]).to_list() for split, part in loaded.items()}
pickle.dump((loaded["train"].features, rows), sys.stdout.buffer)
"""
TITLE = re.compile(r'sold as "(?:Lamp|Chair) (\d+)"')


class Model:
    """A model that replies to all example tasks, depending on the image or on the prompt alone."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.prompts: dict[str, list[str]] = {}
        self.replies: dict[str, Any] = {}  # fixed replies by task, which override the methods below

    def __call__(self, times: int, body: dict[str, Any]) -> Act:
        task = task_name(body)
        prompt = body["messages"][1]["content"][-1]["text"]
        self.requests[task] += 1
        self.prompts.setdefault(task, []).append(prompt)
        reply = self.replies.get(task) or getattr(self, task)
        return Act(json.dumps(reply(prompt, uuid_of(body)) if callable(reply) else reply))

    def caption(self, prompt: str, image: str) -> Any:
        return {"caption": f"{DETAILED}, number {image[:6]}."}

    def kurz(self, prompt: str, image: str) -> Any:
        number = re.search(r"number (\w+)", prompt)
        assert not image and number
        text = f"Eine Lampe steht auf einem Tisch neben vielen alten Büchern, Nummer {number[1]}."
        return {"caption": text}

    def alt_text(self, prompt: str, image: str) -> Any:
        return {"caption": f"A brass lamp with a green shade, model {TITLE.findall(prompt)[0]}."}

    def tags(self, prompt: str, image: str) -> Any:
        return {"labels": ["indoors", "text", "indoors"] if int(image[0], 16) % 2 else []}

    def boxes(self, prompt: str, image: str) -> Any:
        boxes = (("dog", [28, 28, 84, 56]), ("car", [0, 0, 9000, 20]))
        return {"boxes": [{"bbox_2d": box, "label": label} for label, box in boxes]}

    def ocr(self, prompt: str, image: str) -> Any:
        return {"text": f"EXIT {image[:4]} / call +49 30 1234567"}

    def finding(self, prompt: str, image: str) -> Any:
        findings = [{"name": "opacity", "side": None}]
        return {"view": "frontal", "quality": "good", "findings": findings, "impression": None}

    def offer(self, prompt: str, image: str) -> Any:
        return {"color": "green", "material": "brass", "rooms": ["office"]}

    def headline(self, prompt: str, image: str) -> Any:
        assert "green" in prompt and "made of brass" in prompt
        return {"text": f"Green light for number {hashlib.sha256(prompt.encode()).hexdigest()[:3]}"}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    save_photos(tmp_path, COUNT)
    write_metadata(tmp_path, title=[f"Lamp {n}" for n in range(COUNT)])
    return tmp_path


@pytest.fixture
def model() -> Model:
    return Model()


def synth(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Done:
    return run_synth(*arguments, cwd=folder, env=env)


def generate(folder: Path, chat: ChatServer, *arguments: str) -> dict[str, Any]:
    options = ("--source", "folder:photos", "--base-url", chat.url, "--out", "d", "--json")
    done = synth(folder, "generate", *options, *arguments)
    return read_result(done) | {"stderr": done.stderr}


def tasks(*names: str) -> list[str]:
    return [part for name in names for part in ("--task", str(EXAMPLES / f"{name}.yaml"))]


def test_example_custom_tasks_become_typed_columns(shop: Path, server: ChatServer, model: Model) -> None:
    names = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    assert names == ["alt_text", "boxes", "finding", "kurz", "ocr", "tags"]
    captions = ("--tasks", "caption", "--styles", "detailed")
    generate(shop, server, "--columns", "context=title", *captions, *tasks(*names))
    assert model.requests == {"caption": COUNT} | dict.fromkeys(names, COUNT)
    assert synth(shop, "check", "d").returncode == 0
    with running_hub(shop / "hub") as hub:
        env = hub.env(shop / "home")
        require_success(synth(shop, "push", "d", "--repo", "me/shop", env=env))
        loaded = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, env=env, cwd=shop)
        assert loaded.returncode == 0, loaded.stderr
        features, splits = pickle.loads(loaded.stdout)
    assert features["tags"] == List(Value("string")) and features["ocr"] == Value("string")
    assert features["boxes"] == List({"bbox_2d": List(Value("int64")), "label": Value("string")})
    assert features["finding"]["findings"] == List({"name": Value("string"), "side": Value("string")})
    rows = [row for split in splits.values() for row in split]
    assert len(rows) == COUNT
    for row in rows:
        styles = {caption["style"]: caption["text"] for caption in row["captions"]}
        assert styles.keys() == {"detailed", "alt-text", "kurz"}
        assert styles["detailed"].split()[-1] == styles["kurz"].split()[-1] == f"{row['sample_id'][:6]}."
        assert styles["alt-text"].endswith(f"model {row['context']['title'].split()[-1]}.")
        assert row["tags"] in (["indoors", "text"], [])
        assert row["ocr"] == f"EXIT {row['sample_id'][:4]} / call [phone]"
        (box,) = row["boxes"]  # the other box is outside of the image
        assert box["label"] == "dog" and 0 < box["bbox_2d"][0] < box["bbox_2d"][2] <= row["width_px"]
        assert row["finding"]["findings"] == [{"name": "opacity", "side": None}]
        assert row["finding"]["impression"] is None
    card = read_card(shop / "d")
    assert "tags: indoors, text" in card and "| `boxes` | 24 | dog: 24 |" in card, card


def test_large_photo_is_scaled_down_and_its_boxes_are_in_original_pixels(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, size in (("large", (2400, 1200)), ("small", (1344, 1344))):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"photos/{name}.jpg")
    small = (tmp_path / "photos/small.jpg").read_bytes()
    (tmp_path / "find.yaml").write_text("{name: find, kind: boxes, prompt: 'Find dogs.'}")
    sent: list[bytes] = []

    def script(times: int, body: dict[str, Any]) -> Act:
        url = body["messages"][1]["content"][0]["image_url"]["url"]
        sent.append(base64.b64decode(url.partition(",")[2]))
        # The model receives the large photo with 1988 x 980 px.
        return Act(json.dumps({"boxes": [{"bbox_2d": [0, 0, 994, 490], "label": "dog"}]}))

    with running_chat(ChatServer(script)) as chat:
        generate(tmp_path, chat, "--task", "find.yaml")
        sizes = sorted(Image.open(io.BytesIO(data)).size for data in sent)
        assert sizes == [(1344, 1344), (1988, 980)] and small in sent
        boxes = {row["width_px"]: row["find"][0]["bbox_2d"] for row in load_rows(tmp_path / "d")}
        assert boxes == {2400: [0, 0, 1200, 600], 1344: [0, 0, 994, 490]}


def test_requests_cover_only_new_tasks_and_changed_rows(shop: Path, server: ChatServer, model: Model) -> None:
    model.replies["words"] = lambda prompt, image: {"text": f"about {prompt.splitlines()[0]}"}
    model.replies["shout"] = lambda prompt, image: {"text": prompt.splitlines()[0].upper()}
    shout = "{name: shout, kind: text, show_image: false, needs: [words], prompt: '{{ results.words }}'}"
    (shop / "words.yaml").write_text("{name: words, kind: text, prompt: '{{ row.title }}'}")
    (shop / "shout.yaml").write_text(shout)
    words = ("--columns", "context=title", "--task", "words.yaml")
    assert generate(shop, server, *words)["version"] == "v1.0.0" and model.requests == {"words": COUNT}
    both = (*words, "--task", "shout.yaml")
    assert generate(shop, server, *both)["version"] == "v2.0.0"
    assert model.requests == {"words": COUNT, "shout": COUNT}
    shouts = {row["shout"] for row in load_rows(shop / "d", "v2.0.0")}
    assert shouts == {f"ABOUT LAMP {n}" for n in range(COUNT)}
    write_metadata(shop, title=[f"{'Chair' if n < 10 else 'Lamp'} {n}" for n in range(COUNT)])
    generate(shop, server, *both)
    assert model.requests == {"words": COUNT + 10, "shout": COUNT + 10}
    assert {row["shout"] for row in load_rows(shop / "d", "v2.0.1")} >= {"ABOUT CHAIR 3", "ABOUT LAMP 20"}


def test_task_is_not_asked_if_a_result_that_it_needs_is_unusable(
    shop: Path, server: ChatServer, model: Model
) -> None:
    refusal = "I'm sorry, I can't help with that."
    model.replies["ocr"] = lambda prompt, image: {"text": "fine" if int(image[0], 16) % 2 else refusal}
    model.replies["more"] = {"text": "more"}
    more = "{name: more, kind: text, show_image: false, needs: [ocr], prompt: 'Go on: {{ results.ocr }}'}"
    (shop / "more.yaml").write_text(more)
    result = generate(shop, server, *tasks("ocr"), "--task", "more.yaml")
    rows = load_rows(shop / "d")
    assert 0 < len(rows) == model.requests["more"] < COUNT
    assert {(row["ocr"], row["more"]) for row in rows} == {("fine", "more")}
    lost = COUNT - len(rows)
    assert f"rejected: {lost} refusal, {lost} result_missing" in result["stderr"]
    output = "{type: object, required: [n], properties: {n: {type: integer}, unit: {type: string}}}"
    (shop / "size.yaml").write_text(f"{{name: size, kind: record, prompt: Guess., output: {output}}}")
    more = "{name: more, kind: text, show_image: false, needs: [size], prompt: '%s'}"
    model.replies["size"] = lambda prompt, image: {"n": int(image[0], 16) % 2, "unit": None}
    num_requests = len(server.bodies)
    (shop / "more.yaml").write_text(more % "{{ results.size.unit | upper ~ results.size.unit.lower() }}")
    both = ("--task", "size.yaml", "--task", "more.yaml")
    done = synth(shop, "generate", "--source", "folder:photos", "--base-url", server.url, *both)
    assert done.returncode == 1 and "None" in done.stderr  # an early check renders the template with null
    assert len(server.bodies) == num_requests
    (shop / "more.yaml").write_text(more % "{{ 0 if results.size.n == 0 else 10 % (results.size.n - 1) }}")
    generate(shop, server, *both, "--out", "e")
    assert {(row["size"]["n"], row["more"]) for row in load_rows(shop / "e")} == {(0, "more"), (1, None)}


def test_custom_task_values_are_shown_in_the_report_and_reviewed(shop: Path, server: ChatServer) -> None:
    generate(shop, server, *tasks("boxes", "finding"))
    assert synth(shop, "report", "d").returncode == 0
    page = (shop / "d/report.html").read_text()
    assert '"value":"view: frontal; quality: good; findings: (name: opacity)"' in page
    assert page.count('"box":[') == COUNT and '"kind":"boxes"' in page
    images = json.loads(re.search(r'add\("images", (\[.*?\])\);\n', page)[1])  # type: ignore[index]
    boxed = images[0]
    text = next(text for text in boxed["texts"] if text["kind"] == "boxes")
    review = {"sample_id": boxed["id"], "content": text["content"], "verdict": "bad", "reason": "not_true"}
    (shop / "reviews.jsonl").write_text(json.dumps(review) + "\n")
    require_success(synth(shop, "review", "apply", "d", "reviews.jsonl"))
    rows = {row["sample_id"]: row for row in load_rows(shop / "d", "v1.0.1")}
    assert not rows[boxed["id"]]["boxes"]
    assert sum(len(row["boxes"] or []) for row in rows.values()) == COUNT - 1
    edit = review | {"verdict": "edited", "text": "a dog"}
    del edit["reason"]
    (shop / "reviews.jsonl").write_text(json.dumps(edit) + "\n")
    refused = synth(shop, "review", "apply", "d", "reviews.jsonl")
    assert refused.returncode == 1 and "not edited" in refused.stderr


def test_documented_example_runs_as_written(shop: Path, server: ChatServer, model: Model) -> None:
    page = (ROOT / "docs/custom-tasks.md").read_text()
    example = page[page.index("## Define a task") : page.index("## Kinds of tasks")]
    blocks = re.findall(r"```(console|yaml)\n(.*?)```", example, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["console", "yaml", "yaml", "yaml", "yaml", "console"]
    model.replies["tags"] = {"labels": ["lamp"]}
    with running_hub(shop / "hub") as hub:
        env = hub.env(shop / "home")
        for kind, text in blocks:
            if kind == "yaml":
                name, _, content = text.removeprefix("# ").partition("\n")
                (shop / name).write_text(content.replace("http://localhost:8000/v1", server.url))
                continue
            for line in text.splitlines():
                command = shlex.split(line.removeprefix("$ ").replace("ORG/NAME", "me/shop"))
                assert command[0] == "synth"
                require_success(synth(shop, *command[1:], env=env))
    assert model.requests == {"tags": COUNT, "offer": COUNT, "headline": COUNT}
    rows = load_rows(shop / "data/folder-photos")
    assert len(rows) == COUNT and {*rows.features} >= {"tags", "offer", "headline"}
