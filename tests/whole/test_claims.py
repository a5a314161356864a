"""Claims by the model: a caption is split without its image, and each claim asked about in both directions."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.chat.server import Act, ChatServer, running_chat, task_of, uuid_of
from tests.pipeline.images.test_similarity import photo
from tests.whole.conftest import SYNTH

COLORS = ("red", "blue", "green", "black")
THINGS = ("kite", "boat", "horse", "clock")
PLACES = ("by the river", "on the bridge", "in the garden", "near the wall")
COUNT = 24
COMMAND = ("--source", "folder:photos", "--tasks", "caption", "--styles", "plain", "--verify", "claims", "--out", "d")


def truth_of(number: int) -> tuple[str, str, str]:
    return COLORS[number % 4], THINGS[number // 4 % 4], PLACES[number // 2 % 4]


def caption_of(number: int) -> tuple[str, str, str]:
    """Return the details in the caption: of every second image one is wrong."""
    details = [*truth_of(number)]
    if number % 2:
        part = number // 2 % 3
        options = (COLORS, THINGS, PLACES)[part]
        details[part] = options[(options.index(details[part]) + 1) % 4]
    return details[0], details[1], details[2]


class Model:
    """A model that sees what is true, splits captions by words, and may say yes to everything."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids, self.says_yes, self.splits = ids, False, 0

    def __call__(self, times: int, body: dict[str, Any]) -> Act:
        task = body["response_format"]["json_schema"]["name"]
        if task == "claims":
            self.splits += 1
            assert not uuid_of(body)  # no image is sent
            return Act(json.dumps({"claims": self.probes(body["messages"][-1]["content"][-1]["text"])}))
        number = self.ids[uuid_of(body).split(".")[0]]
        if task == "answer":
            asked = task_of(body).removeprefix("Question: ")
            is_true = any(f" {part}?" in asked for part in truth_of(number))
            return Act(json.dumps({"answer": "Yes." if is_true or self.says_yes else "No."}))
        color, thing, place = caption_of(number)
        return Act(json.dumps({"caption": f"A {color} {thing} stands {place} all day long."}))

    def probes(self, prompt: str) -> list[dict[str, str]]:
        caption = next(line for line in prompt.splitlines() if line.startswith("Caption: "))
        color, thing = caption.removeprefix("Caption: A ").split()[:2]
        place = next(place for place in PLACES if place in caption)

        def probe(question: str, detail: str, options: tuple[str, ...]) -> dict[str, str]:
            other = options[(options.index(detail) + 2) % 4]
            return {"claim": detail, "question": f"{question} {detail}?", "opposite": f"{question} {other}?"}

        return [probe("Is it", color, COLORS), probe("Is it a", thing, THINGS), probe("Is it", place, PLACES)]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "photos").mkdir()
    ids = {}
    for number in range(COUNT):
        path = tmp_path / "photos" / f"{number:02}.png"
        photo(number).save(path)
        ids[hashlib.sha256(path.read_bytes()).hexdigest()] = number
    return Model(ids)


@pytest.fixture
def server(model: Model) -> Iterator[ChatServer]:
    with running_chat(ChatServer(model)) as chat:
        yield chat


def generate(folder: Path, server: ChatServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    command: list[str] = [str(SYNTH), "generate", *COMMAND, "--base-url", server.url, "--json", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_captions_with_a_wrong_detail_are_rejected_and_no_other(tmp_path: Path, model: Model, server: ChatServer) -> None:
    done = generate(tmp_path, server)
    stages = json.loads(done.stdout)["stages"]
    assert stages["verify"]["rejected"] == {"claims_not_confirmed": COUNT // 2}
    kept = pq.read_table(tmp_path / "d/stages/verify/kept.parquet").to_pylist()
    assert sorted(model.ids[row["sample_id"]] for row in kept) == list(range(0, COUNT, 2))
    expected = [check["expected"] for row in kept for check in row["checks"]]
    assert expected.count("yes") == expected.count("no") == 3 * len(kept)
    assert model.splits == len({caption_of(number) for number in range(COUNT)})
    asked = len(server.bodies)
    again = generate(tmp_path, server)
    assert (len(server.bodies), json.loads(again.stdout)["is_new"]) == (asked, False)


def test_a_model_that_says_yes_to_everything_confirms_no_caption(tmp_path: Path, model: Model, server: ChatServer) -> None:
    model.says_yes = True
    (tmp_path / "synth.yaml").write_text("verify: {min_claims_supported: 0.1}\n")
    command: list[str] = [str(SYNTH), "generate", "--config", "synth.yaml", *COMMAND, "--base-url", server.url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "claims" in done.stderr, (
        done.stderr
    )  # half of the answers are right, which was enough before
