"""Captions that people wrote: to a version and a captioner without a model, or beside those of a model that fills the rest."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.commands import run_process, run_synth
from tests.hostile import LONG
from tests.pipeline.images.test_similarity import photo

COUNT = 16
NAMES = "amber birch cedar delta ember fjord grove heron inlet jetty knoll larch marsh north ocean pearl"
WORDS = NAMES.split()


def caption_of(number: int) -> str:
    return f"A {WORDS[number]} bowl stands beside two {WORDS[-number]} cups on a table."


class Model:
    """A model that captions and asks; it says of one image what a person says of it, too."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.images: dict[str, set[str]] = {"caption": set(), "qa": set()}

    def __call__(self, times: int, body: dict[str, Any]) -> Act:
        task = body["response_format"]["json_schema"]["name"]
        self.asked[task] += 1
        self.images[task].add(uuid_of(body))
        word = WORDS[self.asked[task] % COUNT]
        if task == "qa":
            return Act(json.dumps({"qa": [{"answer_type": "other", "question": f"Where is the {word} bowl?", "answer": word}]}))
        same = self.asked[task] <= 2 * COUNT and "plain" in str(body)
        return Act(
            json.dumps({"caption": caption_of(0) if same else f"The {word} bowl is near the window, {uuid_of(body)[:5]}."})
        )


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def server(model: Model) -> Iterator[ChatServer]:
    with running_chat(ChatServer(model)) as chat:
        yield chat


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of pictures; a file in COCO's form has two captions of each with an even number, another one a question."""
    (tmp_path / "photos").mkdir()
    images, annotations, asked = [], [], []
    for number in range(COUNT):
        photo(number).save(tmp_path / "photos" / f"{number:02}.png")
        images.append({"id": number, "file_name": f"{number:02}.png"})
        if number % 2 == 0:
            texts = (caption_of(number), f"Somebody has put a {WORDS[number]} bowl there.")
            annotations += [{"image_id": number, "id": number, "caption": text} for text in texts]
            question = f"is the {WORDS[number]} bowl full"
            asked.append({"file_name": f"{number:02}.png", "question": question, "answers": ["yes", "no", "yes"]})
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return tmp_path


def synth(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    run = run_process if "ray" in arguments else run_synth
    done = run(*arguments, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == code, done.stderr
    return done


def made(folder: Path, command: str, *arguments: str, captions: str = "coco.json") -> dict[str, Any]:
    options = ("--source", "folder:photos", "--captions", captions, "--out", "d", "--json")
    result: dict[str, Any] = json.loads(synth(folder, command, *options, *arguments).stdout)
    return result


def rows_of(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    loaded = load_dataset(str(folder / result["path"]))
    return {row["source_row"]: row for part in loaded.values() for row in part.remove_columns(["image"])}


def test_captions_and_questions_of_people_become_a_version_and_a_captioner_without_a_model(photos: Path) -> None:
    result = made(photos, "generate", "--no-model", "--captions", "vqa.jsonl")
    assert result["requests"] == {"asked": 0, "total": 0, "flaws": {}}
    assert result["steps"]["validate"]["input"] == 3 * COUNT // 2
    assert result["steps"]["write"]["rejected"] == {"no_annotation_left": COUNT // 2}
    rows = rows_of(photos, result)
    assert [*rows] and {int(name[:2]) % 2 for name in rows} == {0} and len(rows) == COUNT // 2
    texts = [caption["text"] for caption in rows["02.png"]["captions"]]
    assert sorted(texts) == sorted(rows["02.png"]["references"]) and len(texts) == 2
    assert {(one["style"], one["prompt_id"]) for row in rows.values() for one in row["captions"]} == {("human", "human")}
    ((asked,),) = [row["qa"] for name, row in rows.items() if name == "04.png"]
    assert (asked["question"], asked["answer"], asked["answer_type"]) == ("is the ember bowl full?", "yes", "yes/no")
    manifest = json.loads((photos / result["path"] / "manifest.json").read_text())
    assert manifest["model"] == {"name": "none", "revision": "none"} and not manifest["prompts"]
    assert (manifest["measured"]["human_captions"], manifest["measured"]["human_questions"]) == (COUNT, COUNT // 2)
    card = (photos / result["path"] / "README.md").read_text()
    assert "were written by humans" in card and "machine-generated" not in card
    assert "- visual-question-answering" in card and "- image-to-text" in card
    again = made(photos, "generate", "--tasks", "none", "--captions", "vqa.jsonl")
    assert (again["is_new"], again["digest"]) == (False, result["digest"])
    config = ("--config", f"{result['path']}/manifest.json", "--out", "e", "--source", "folder:photos", "--json")
    refused = synth(photos, "generate", *config, code=1)
    assert "needs a file that you do not have: captions" in refused.stderr
    repeated = synth(photos, "generate", *config, "--captions", "coco.json", "--captions", "vqa.jsonl")
    assert json.loads(repeated.stdout)["digest"] == result["digest"]
    trained = synth(photos, "train", "--data", "d", "--encoder", "tiny-vit", "--steps", "2", "--out", "captioner")
    assert "human texts" in trained.stderr
    metrics = json.loads((photos / "captioner/metrics.json").read_text())
    assert metrics["data"]["texts"] == "human" and metrics["against"] == "references of the source"
    said = synth(photos, "push", "captioner", "--repo", "me/captioner", "--dry-run").stderr
    assert "me/captioner, private: the license of the images is unknown, or the Hub does not list it (--public)" in said


def test_a_model_is_asked_about_exactly_the_images_without_captions(photos: Path, server: ChatServer, model: Model) -> None:
    options = ("--base-url", server.url, "--styles", "detailed", "--captions", "vqa.jsonl")
    imported = made(photos, "generate", "--no-model", "--captions", "vqa.jsonl")
    result = made(photos, "generate", *options, "--only-missing")
    rows = rows_of(photos, result)
    without = {row["sample_id"] for name, row in rows.items() if int(name[:2]) % 2}
    assert len(without) == COUNT // 2
    assert model.images == {"caption": without, "qa": without} and model.asked == {"caption": COUNT // 2, "qa": COUNT // 2}
    assert result["steps"]["ask"]["kept"] == COUNT
    for name, row in rows.items():
        by_people = {one["prompt_id"] for one in (*row["captions"], *row["qa"])} == {"human"}
        assert by_people == (int(name[:2]) % 2 == 0)
    before = rows_of(photos, imported)
    assert {name: rows[name] for name in before} == before  # what people wrote is as it was
    card = (photos / result["path"] / "README.md").read_text()
    assert f"**{COUNT} captions and {COUNT // 2} questions were written by humans**" in card
    assert "All others are machine-generated" in card
    made(photos, "generate", *options, "--only-missing")
    assert model.asked.total() == COUNT  # nothing is asked twice
    both = made(photos, "generate", *options, "--keep-human")
    assert model.asked.total() == 2 * COUNT  # the replies that are there are used
    assert {len({one["prompt_id"] for one in row["captions"]}) for row in rows_of(photos, both).values()} == {1, 2}


def test_only_captions_or_questions_that_people_left_out_are_asked(photos: Path, server: ChatServer, model: Model) -> None:
    options = ("--base-url", server.url, "--styles", "detailed", "--only-missing")
    described = ("generate", "--source", "folder:photos", "--captions", "coco.json", "--tasks", "caption", *options)
    predicted = json.loads(synth(photos, *described, "--estimate", "--json", "--out", "d").stdout)
    assert (predicted["images"], predicted["requests"], predicted["sampled_images"]) == (COUNT, COUNT // 2, COUNT)
    model.asked.clear()
    made(photos, "generate", *options, "--out", "questions", captions="vqa.jsonl")
    assert model.asked == {"caption": COUNT, "qa": COUNT // 2}
    lines = [{"file_name": f"{number:02}.png", "captions": [caption_of(number), "Bowl."]} for number in range(COUNT)]
    (photos / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = made(photos, "generate", *options, "--tasks", "caption", "--out", "all", captions="all.jsonl")
    assert model.asked["caption"] == COUNT and result["steps"]["filter"]["rejected"] == {"too_short": COUNT}
    assert not [text for text in result["warnings"] if "no captions are left" in text]


def test_a_caption_that_a_person_wrote_stays_where_the_model_writes_the_same(photos: Path, server: ChatServer) -> None:
    (photos / "one.jsonl").write_text(json.dumps({"file_name": "03.png", "caption": caption_of(0)}))
    options = ("--base-url", server.url, "--styles", "plain", "--tasks", "caption", "--keep-human")
    result = made(photos, "generate", *options, captions="one.jsonl")
    assert result["steps"]["dedupe"]["rejected"]["duplicate"] == 1
    (kept,) = rows_of(photos, result)["03.png"]["captions"]
    assert (kept["text"], kept["prompt_id"]) == (caption_of(0), "human")


def test_captions_that_are_missing_or_contradict_the_settings_are_one_clear_error(photos: Path) -> None:
    folder = ("--source", "folder:photos", "--out", "d")
    done = synth(photos, "generate", "--no-model", *folder, code=1)
    assert "folder:photos has no human caption and no human question" in done.stderr
    assert "--captions FILE" in done.stderr
    done = synth(photos, "generate", "--no-model", "--source", "scenes", "--captions", "coco.json", "--out", "e", code=1)
    assert "source scenes has its own captions, but --captions was given" in done.stderr
    done = synth(photos, "generate", *folder, "--captions", "gone.json", "--tasks", "none", code=1)
    assert "cannot read gone.json" in done.stderr and "Traceback" not in done.stderr
    for option, text, problem in (
        ("--no-model", "captions: [coco.json]\nverify: {checks: [claims]}", "--no-model excludes a model, and the"),
        ("--json", "tasks: none\nhuman_texts: fill\n", "human_texts: fill asks for missing texts"),
        ("--json", "tasks: [none, caption]\n", "tasks: none excludes other tasks"),
        ("--json", "generate: {style_prompts: {human: Say it.}}\n", "human is the style of human captions"),
    ):
        (photos / "s.yaml").write_text(text)
        assert problem in synth(photos, "generate", option, "--config", "s.yaml", *folder, code=1).stderr


def test_questions_of_a_table_keep_their_answers_and_decks_their_questions(photos: Path) -> None:
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted((photos / "photos").iterdir())[:3]]
    asked = [["is it red", "how many are there"], ["is it a bowl"], ["where is it"]]
    answers = [["yes", "two"], ["yes", "no"], ["here"]]
    rows = [{"image": image, "q": q, "a": a} for image, q, a in zip(images, asked, answers, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), photos / "t.parquet")
    decks = [{"pages": [image] * 2, "q": f"Who wrote page {n}?", "a": "Ada"} for n, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(decks), photos / "decks.parquet")
    columns = ("generate", "--no-model", "--json", "--columns", "question=q,answer=a")
    done = json.loads(synth(photos, *columns, "--source", "parquet:t.parquet", "--out", "t").stdout)
    assert done["steps"]["read"]["rejected"] == {"unpaired_answers": 1}
    pairs = sorted((one["question"], one["answer"]) for row in rows_of(photos, done).values() for one in row["qa"])
    assert pairs == [("how many are there?", "two"), ("is it red?", "yes"), ("where is it?", "here")]
    columns = (*columns[:-1], f"{columns[-1]},pages=pages")
    done = json.loads(synth(photos, *columns, "--source", "parquet:decks.parquet", "--out", "k").stdout)
    assert done["steps"]["validate"] == {"input": 3, "kept": 3, "rejected": {}}


def test_a_table_with_a_row_for_each_question_keeps_them_all(photos: Path) -> None:
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted((photos / "photos").iterdir())[:2]]
    asked = [
        (0, "Is it a red bowl?", "no"),
        (1, "Is it a cup?", "yes"),
        (0, "Is it a green bowl?", "yes"),
        (0, "Is it a red bowl?", "no"),
    ]
    rows = [
        {"image": images[n], "q": question, "a": answer, "caption": "A bowl stands on a table."}
        for n, question, answer in asked
    ]
    pq.write_table(pa.Table.from_pylist(rows), photos / "t.parquet")
    columns = ("--columns", "question=q,answer=a")
    for executor in ((), ("--executor", "ray", "--shards", "2")) if LONG else ((),):
        command = ("generate", "--no-model", "--source", "parquet:t.parquet", *columns, "--json", *executor)
        done = json.loads(synth(photos, *command, "--out", f"t{len(executor)}").stdout)
        found = [*rows_of(photos, done).values()]
        assert sorted(len(row["qa"]) for row in found) == [1, 2]
        assert [row["references"] for row in found] == [["A bowl stands on a table."]] * 2
        assert done["steps"]["read"]["rejected"] == {"duplicate_image": 2}
    digests = {json.loads(path.read_text())["digest"] for path in photos.glob("t*/versions/v1.0.0/manifest.json")}
    assert len(digests) == 1
