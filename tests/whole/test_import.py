"""Human captions: a version and a captioner without a model, or with a model that fills gaps."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from tests.chat.server import Act, ChatServer, task_name, uuid_of
from tests.commands import Done, read_result, run_process, run_synth
from tests.whole.conftest import save_photos

COUNT = 16
NAMES = "amber birch cedar delta ember fjord grove heron inlet jetty knoll larch marsh north ocean pearl"
WORDS = NAMES.split()


def caption_of(number: int) -> str:
    return f"A {WORDS[number]} bowl stands beside two {WORDS[-number]} cups on a table."


class Model:
    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.images: dict[str, set[str]] = {"caption": set(), "qa": set()}

    def __call__(self, times: int, body: dict[str, Any]) -> Act:
        task = task_name(body)
        self.requests[task] += 1
        self.images[task].add(uuid_of(body))
        word = WORDS[self.requests[task] % COUNT]
        if task == "qa":
            number = self.requests[task]
            pair = {"answer_type": "other", "question": f"What is beside cup {number}?", "answer": word}
            return Act(json.dumps({"qa": [pair]}))
        return Act(json.dumps({"caption": f"The {word} bowl is near the window, {uuid_of(body)[:5]}."}))


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of images: those with even numbers have two captions (COCO format) and a question."""
    save_photos(tmp_path, COUNT)
    images, annotations, asked = [], [], []
    for number in range(COUNT):
        images.append({"id": number, "file_name": f"{number:02}.png"})
        if number % 2 == 0:
            texts = (caption_of(number), f"Somebody has put a {WORDS[number]} bowl there.")
            annotations += [{"image_id": number, "id": number, "caption": text} for text in texts]
            pair = {"question": f"is the {WORDS[number]} bowl full", "answers": ["yes", "no", "yes"]}
            asked.append({"file_name": f"{number:02}.png", **pair})
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return tmp_path


def synth(folder: Path, *arguments: str, code: int = 0) -> Done:
    run = run_process if "ray" in arguments else run_synth
    done = run(*arguments, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr
    return done


def generate_json(folder: Path, command: str, *arguments: str, captions: str = "coco.json") -> dict[str, Any]:
    options = ("--source", "folder:photos", "--captions", captions, "--out", "d", "--json")
    return read_result(synth(folder, command, *options, *arguments))


def rows_of(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    loaded = load_dataset(str(folder / result["path"]))
    return {row["source_row"]: row for part in loaded.values() for row in part}


def test_human_captions_and_questions_become_version_and_captioner_without_model(photos: Path) -> None:
    result = generate_json(photos, "generate", "--no-model", "--captions", "vqa.jsonl")
    assert result["requests"] == {"asked": 0, "total": 0, "flaws": {}}
    assert result["steps"]["validate"]["input"] == 3 * COUNT // 2
    assert result["steps"]["write"]["rejected"] == {"no_annotation_left": COUNT // 2}
    rows = rows_of(photos, result)
    assert [*rows] and {int(name[:2]) % 2 for name in rows} == {0} and len(rows) == COUNT // 2
    texts = [caption["text"] for caption in rows["02.png"]["captions"]]
    assert sorted(texts) == sorted(rows["02.png"]["references"]) and len(texts) == 2
    captions = [caption for row in rows.values() for caption in row["captions"]]
    assert {(caption["style"], caption["prompt_id"]) for caption in captions} == {("human", "human")}
    ((asked,),) = [row["qa"] for name, row in rows.items() if name == "04.png"]
    pair = {"question": "is the ember bowl full?", "answer": "yes", "answer_type": "yes/no"}
    assert pair.items() <= asked.items()
    manifest = json.loads((photos / result["path"] / "manifest.json").read_text())
    assert manifest["model"] == {"name": "none", "revision": "none"} and not manifest["prompts"]
    measured = manifest["measured"]
    assert (measured["human_captions"], measured["human_questions"]) == (COUNT, COUNT // 2)
    card = (photos / result["path"] / "README.md").read_text()
    assert "were written by humans" in card and "machine-generated" not in card
    assert "- visual-question-answering" in card and "- image-to-text" in card
    again = generate_json(photos, "generate", "--tasks", "none", "--captions", "vqa.jsonl")
    assert (again["is_new"], again["digest"]) == (False, result["digest"])
    training = ("--encoder", "tiny-vit", "--steps", "2", "--out", "captioner")
    trained = synth(photos, "train", "d", *training)
    assert "human texts" in trained.stderr
    metrics = json.loads((photos / "captioner/metrics.json").read_text())
    assert metrics["data"]["texts"] == "human" and metrics["against"] == "references of the source"
    printed = synth(photos, "push", "captioner", "--repo", "me/captioner", "--dry-run").stderr
    reason = "the license of the images is unknown, or the Hub does not list it (to override: --public)"
    assert f"me/captioner, private: {reason}" in printed


def test_tokenized_texts_are_joined_and_counted(photos: Path) -> None:
    pairs = [(0, "A man 's bowl stands on a table ."), (1, "A cup on a table.")]
    lines = [json.dumps({"file_name": f"{number:02}.png", "caption": text}) for number, text in pairs]
    question = {"question": "Is n't the cup full ?", "answers": ["yes"]}
    lines.append(json.dumps({"file_name": "02.png", **question}))
    (photos / "tokenized.jsonl").write_text("\n".join(lines))
    result = generate_json(photos, "generate", "--no-model", captions="tokenized.jsonl")
    rows = rows_of(photos, result)
    assert [rows[f"{number:02}.png"]["references"] for number, _ in pairs] == [
        ["A man's bowl stands on a table."],
        ["A cup on a table."],
    ]
    assert rows["02.png"]["reference_qa"][0]["question"] == "Isn't the cup full?"
    manifest = json.loads((photos / result["path"] / "manifest.json").read_text())
    assert manifest["source"]["joined_texts"] == 2
    card = (photos / result["path"] / "README.md").read_text()
    assert "words and punctuation of 2 tokenized human texts were joined" in card


def test_only_images_without_captions_are_sent_to_the_model(
    photos: Path, server: ChatServer, model: Model
) -> None:
    options = ("--base-url", server.url, "--styles", "detailed", "--captions", "vqa.jsonl")
    imported = generate_json(photos, "generate", "--no-model", "--captions", "vqa.jsonl")
    result = generate_json(photos, "generate", *options, "--only-missing")
    rows = rows_of(photos, result)
    without = {row["sample_id"] for name, row in rows.items() if int(name[:2]) % 2}
    assert len(without) == COUNT // 2
    assert model.images == {"caption": without, "qa": without}
    assert model.requests == {"caption": COUNT // 2, "qa": COUNT // 2}
    assert result["steps"]["ask"]["kept"] == COUNT
    for name, row in rows.items():
        is_human = {text["prompt_id"] for text in (*row["captions"], *row["qa"])} == {"human"}
        assert is_human == (int(name[:2]) % 2 == 0)
    before = rows_of(photos, imported)
    assert {name: rows[name] for name in before} == before
    card = (photos / result["path"] / "README.md").read_text()
    assert f"**{COUNT} captions and {COUNT // 2} questions were written by humans**" in card
    assert "All other texts are machine-generated" in card
    generate_json(photos, "generate", *options, "--only-missing")
    assert model.requests.total() == COUNT
    both = generate_json(photos, "generate", *options, "--keep-human")
    assert model.requests.total() == 2 * COUNT  # existing replies are reused
    rows = rows_of(photos, both)
    prompts = [{caption["prompt_id"] for caption in row["captions"]} for row in rows.values()]
    assert {*map(len, prompts)} == {1, 2}


def test_only_missing_captions_or_questions_are_requested(
    photos: Path, server: ChatServer, model: Model
) -> None:
    options = ("--base-url", server.url, "--styles", "detailed", "--only-missing")
    predicted = generate_json(photos, "estimate", "--tasks", "caption", *options)
    expected = {"images": COUNT, "requests": COUNT // 2, "sampled_images": COUNT}
    assert expected.items() <= predicted.items()
    model.requests.clear()
    generate_json(photos, "generate", *options, "--out", "questions", captions="vqa.jsonl")
    assert model.requests == {"caption": COUNT, "qa": COUNT // 2}
    captions = {f"{number:02}.png": [caption_of(number), "Bowl."] for number in range(COUNT)}
    lines = [{"file_name": name, "captions": texts} for name, texts in captions.items()]
    (photos / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    to_all = ("--tasks", "caption", "--out", "all")
    result = generate_json(photos, "generate", *options, *to_all, captions="all.jsonl")
    assert model.requests["caption"] == COUNT
    assert result["steps"]["filter"]["rejected"] == {"too_short": COUNT}


def test_missing_captions_and_contradicting_options_each_give_one_error(photos: Path) -> None:
    folder = ("--source", "folder:photos", "--out", "d")
    done = synth(photos, "generate", "--no-model", *folder, code=1)
    assert "folder:photos has no human captions and no human questions" in done.stderr
    assert "--captions FILE" in done.stderr
    source = ("--source", "scenes", "--captions", "coco.json", "--out", "e")
    done = synth(photos, "generate", "--no-model", *source, code=1)
    assert "source scenes does not support --captions" in done.stderr
    (photos / "s.yaml").write_text("captions: [coco.json]\nverify: {checks: [claims]}")
    done = synth(photos, "generate", "--no-model", "--config", "s.yaml", *folder, code=1)
    assert "--no-model excludes models, but " in done.stderr
