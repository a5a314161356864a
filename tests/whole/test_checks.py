"""Checks by models: claims, calibration by human captions, repair, coverage, and ratings by a judge."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.digests import hash_to_unit
from tests.chat.server import Act, ChatServer, running_chat, task_name, task_of, uuid_of
from tests.commands import Done, read_result, require_success, run_synth
from tests.whole.conftest import load_rows, read_card, read_manifest, save_photos

COLORS = ("red", "blue", "green", "black")
THINGS = ("kite", "boat", "horse", "clock")
PLACES = ("by the river", "on the bridge", "in the garden", "near the wall")
DETAILS = (COLORS, THINGS, PLACES)
QUESTIONS = ("What color is it?", "What stands there?", "Where does it stand?")
COUNT = 24
CAPTIONS = ("--source", "folder:photos", "--tasks", "caption", "--styles", "plain", "--out", "d")
UNREPAIRABLE = 1  # number of a caption that the model fails to repair


def truth_of(number: int) -> tuple[str, str, str]:
    return COLORS[number % 4], THINGS[number // 4 % 4], PLACES[number // 2 % 4]


def caption_of(number: int) -> tuple[str, str, str]:
    """Return the details in a caption. One of them is wrong in every second caption."""
    details = [*truth_of(number)]
    if number % 2:
        part = number // 2 % 3
        options = DETAILS[part]
        details[part] = options[(options.index(details[part]) + 1) % 4]
    return details[0], details[1], details[2]


def details_in(caption: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the details in a caption, each with all options of its kind."""
    return [(detail, options) for options in DETAILS for detail in options if detail in caption]


class Model:
    """A scripted model that knows the true details of each image, and finds claims by their words."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids, self.requests = ids, Counter[str]()
        self.refutes_colors = False
        self.wrong_share = 0.0

    def __call__(self, times: int, body: dict[str, Any]) -> Act:
        task = task_name(body)
        prompt = body["messages"][-1]["content"][-1]["text"]
        self.requests[task] += 1
        if task in ("claims", "covers", "repair"):
            assert not uuid_of(body)
            line = next(line for line in prompt.splitlines() if line.startswith("Caption: "))
            caption = line.removeprefix("Caption: ")
            return Act(json.dumps(getattr(self, task)(caption, prompt)))
        number = self.ids[uuid_of(body).split(".")[0]]
        if task == "answer":
            asked = task_of(body).removeprefix("Question: ")
            if asked.startswith("What") or asked.startswith("Where"):
                kind = ("What color", "What stands", "Where does").index(asked[:10])
                wrong = self.refutes_colors and kind == 0
                return Act(json.dumps({"answer": "purple" if wrong else truth_of(number)[kind]}))
        if task == "confirm":
            asked = task_of(body).removeprefix("Question: ")
            details = [detail for detail, _ in details_in(asked)]
            is_true = bool(details) and set(details) <= {*truth_of(number)}
            is_yes = is_true != asked.startswith(("Is it false", "Is it wrong"))
            is_yes ^= hash_to_unit(number, asked) < self.wrong_share
            return Act(json.dumps({"answer": "Yes." if is_yes else "No."}))
        if task == "qa":
            pairs = zip(QUESTIONS, truth_of(number), strict=True)
            rows = [{"answer_type": "other", "question": q, "answer": a} for q, a in pairs]
            return Act(json.dumps({"qa": rows}))
        color, thing, place = caption_of(number)
        return Act(json.dumps({"caption": f"A {color} {thing} stands {place} all day long."}))

    def claims(self, caption: str, _: str) -> dict[str, list[str]]:
        return {"claims": [f"The object is {detail}." for detail, _ in details_in(caption)]}

    def covers(self, caption: str, prompt: str) -> dict[str, str]:
        asked = next(n for n, question in enumerate(QUESTIONS) if question in prompt.splitlines()[-1])
        answers = [detail for detail, options in details_in(caption) if options is DETAILS[asked]]
        return {"answer": answers[0] if answers else "unknown"}

    def repair(self, caption: str, prompt: str) -> dict[str, str]:
        false = [line for line in prompt.splitlines() if line.startswith("False: ")]
        assert len(false) == 1, false  # the prompt lists only refuted claims
        ((wrong, _),) = details_in(false[0])
        if caption_of(UNREPAIRABLE)[0] in caption and caption_of(UNREPAIRABLE)[2] in caption:
            return {"caption": f"{caption[:-1]}!"}
        return {"caption": caption.replace(f" {wrong}", "")}


def rate(_: int, body: dict[str, Any]) -> Act:
    """A judge that dislikes red objects."""
    assert uuid_of(body)  # the judge gets the image
    text = task_of(body)
    rating = "2" if "red" in text else "5"
    ratings = {"relevance": "5", "grounding": rating, "correctness": rating, "form": "4"}
    is_wrong = "yes" if "red" in text else "no"
    return Act(json.dumps({"wrong_words": "", "is_wrong": is_wrong, **ratings}))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    paths = sorted((save_photos(tmp_path, COUNT) / "photos").iterdir())
    return Model({hashlib.sha256(path.read_bytes()).hexdigest(): number for number, path in enumerate(paths)})


@pytest.fixture
def judge() -> Iterator[ChatServer]:
    with running_chat(ChatServer(rate, "judge-7b")) as chat:
        yield chat


def run(folder: Path, server: ChatServer, *arguments: str, **environment: str) -> Done:
    command = ("generate", *arguments, "--base-url", server.url, "--json")
    return run_synth(*command, cwd=folder, env={**os.environ, **environment})


def generate(folder: Path, server: ChatServer, *arguments: str, **environment: str) -> dict[str, Any]:
    return read_result(run(folder, server, *arguments, **environment))


def captions_of(folder: Path, model: Model, out: str = "d") -> dict[int, dict[str, Any]]:
    """Return the captions of a version by image number, read by `datasets`."""
    rows = load_rows(folder / out)
    return {model.ids[row["sample_id"]]: caption for row in rows for caption in row["captions"]}


def test_captions_with_false_claim_are_rejected(tmp_path: Path, model: Model, server: ChatServer) -> None:
    steps = generate(tmp_path, server, *CAPTIONS, "--verify", "claims")["steps"]
    assert steps["verify"]["rejected"] == {"false_claim": COUNT // 2}
    kept = pq.read_table(tmp_path / "d/steps/verify/kept.parquet").to_pylist()
    assert sorted(model.ids[row["sample_id"]] for row in kept) == list(range(0, COUNT, 2))
    # Claims that both questions confirm get no further questions.
    assert {len(row["checks"]) for row in kept} == {2 * len(DETAILS)}
    assert model.requests["claims"] == len({caption_of(number) for number in range(COUNT)})
    num_requests = len(server.bodies)
    again = generate(tmp_path, server, *CAPTIONS, "--verify", "claims")
    assert (len(server.bodies), again["is_new"]) == (num_requests, False)


def checks_of(folder: Path, version: str = "v1.0.0") -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in read_manifest(folder / "d", version)["checks"]}


def test_range_of_true_claims_depends_on_refuted_references(
    tmp_path: Path, model: Model, server: ChatServer
) -> None:
    """Half of the captions have one false claim of three. The source has a true caption of each image."""
    model.wrong_share = 0.1
    names = sorted(path.stem for path in (tmp_path / "photos").glob("*.png"))
    for number, name in enumerate(names):
        (tmp_path / "photos" / f"{name}.txt").write_text(f"A {' '.join(truth_of(number))} can be seen.")
    command = ("generate", *CAPTIONS, "--verify", "claims", "--base-url", server.url)
    done = require_success(run_synth(*command, cwd=tmp_path))
    assert "verify asks at most" in done.stderr
    check = checks_of(tmp_path)["claims"]
    assert check["refuted"]["count"] == 3 * COUNT and check["judges_itself"]
    assert check["range"]["low"] < 1 - 1 / 6 < check["range"]["high"] < 1
    assert check["false_alarms"]["count"] == 3 * COUNT and check["false_alarms"]["share"] < 0.05
    for text in (done.stderr, read_card(tmp_path / "d")):
        assert (
            "if up to 2 % of the claims of human captions are false" in text
            and "checks its own texts" in text
        )
    texts = {caption["text"] for caption in captions_of(tmp_path, model).values()}
    assert texts <= {f"A {c} {t} stands {p} all day long." for c, t, p in map(caption_of, range(COUNT))}


def test_price_counts_each_request_of_a_check_once(tmp_path: Path, model: Model, server: ChatServer) -> None:
    limit = 16  # the first 16 images have different captions
    generate(tmp_path, server, *CAPTIONS, "--verify", "claims", "--limit", str(limit))
    manifest = read_manifest(tmp_path / "d")
    price = {entry["texts"]: entry["requests"] for entry in manifest["price"]}
    assert price == {"captions": limit, "": len(server.bodies) - limit}


def test_references_are_not_checked_without_calibration(
    tmp_path: Path, model: Model, server: ChatServer
) -> None:
    for path in (tmp_path / "photos").glob("*.png"):
        path.with_suffix(".txt").write_text("A red boat can be seen.")
    (tmp_path / "synth.yaml").write_text("verify: {calibration: 0}\n")
    generate(tmp_path, server, "--config", "synth.yaml", *CAPTIONS, "--verify", "claims")
    assert model.requests["confirm"] == 3 * 2 * COUNT + COUNT  # a false claim gets two more questions
    check = checks_of(tmp_path)["claims"]
    assert (check["false_alarms"], check["lost"], check["range"]) == (None, None, None)


def test_limit_on_lost_captions_without_references_is_a_warning_before_any_request(
    tmp_path: Path, model: Model, server: ChatServer
) -> None:
    done = run(tmp_path, server, *CAPTIONS, "--verify", "claims")
    before, _, after = require_success(done).stderr.partition("max_true_captions_lost cannot be enforced")
    assert "verify asks" in after and "verify asks" not in before and "ask" not in before.split()


def test_check_whose_condition_no_text_meets_is_not_calibrated(
    tmp_path: Path, model: Model, server: ChatServer, judge: ChatServer
) -> None:
    when = "{claims: row.width_px > 9999, judge: row.width_px > 9999}"
    (tmp_path / "synth.yaml").write_text(f"verify: {{when: {when}}}\n")
    settings = ("--config", "synth.yaml", "--verify", "claims", "--judge", f"judge-7b@{judge.url}")
    generate(tmp_path, server, *CAPTIONS, *settings)
    assert model.requests == {"caption": COUNT} and not judge.bodies


def test_repair_removes_false_claim_from_caption(tmp_path: Path, model: Model, server: ChatServer) -> None:
    steps = generate(tmp_path, server, *CAPTIONS, "--verify", "claims", "--repair")["steps"]
    lost = steps["verify"]["rejected"]["false_claim"]
    captions = captions_of(tmp_path, model)
    wrong = {number for number in range(1, COUNT, 2) if number in captions}
    assert len(wrong) == COUNT // 2 - lost and lost >= 1 and UNREPAIRABLE not in captions
    for number, caption in captions.items():
        details = [detail for detail, _ in details_in(caption["text"])]
        assert set(details) <= {*truth_of(number)} and caption["precision"] == 1.0, caption
        assert caption["prompt_id"].startswith("repair/v1@" if number in wrong else "caption/v1@"), caption
        assert len(details) == (2 if number in wrong else 3)
    kept = pq.read_table(tmp_path / "d/steps/verify/kept.parquet").to_pylist()
    before = {model.ids[row["sample_id"]]: row["unrepaired_text"] for row in kept}
    assert {number for number, text in before.items() if text} == wrong
    assert all(row["word_count"] == len(row["clean_text"].split()) for row in kept)  # measured again
    num_requests = len(server.bodies)
    assert not generate(tmp_path, server, *CAPTIONS, "--verify", "claims", "--repair")["is_new"]
    assert len(server.bodies) == num_requests
    manifest = read_manifest(tmp_path / "d")
    assert any(name.startswith("repair/v1@") for name in manifest["prompts"])
    assert "repair" in manifest["schemas"]
    assert manifest["measured"]["repaired_captions"] == len(wrong)
    card = read_card(tmp_path / "d")
    assert f"{len(wrong)} captions had a false claim" in card
    assert "| precision |" not in card and "- `precision`: share of the caption" in card
    check = checks_of(tmp_path)["claims"]
    assert check["refuted"]["share"] == pytest.approx(1 / 6, abs=1e-4)  # the share before the repair


def test_human_caption_is_checked_but_not_repaired(tmp_path: Path, model: Model, server: ChatServer) -> None:
    names = sorted(path.name for path in (tmp_path / "photos").glob("*.png"))
    lines = [f"{name},A {' '.join(caption_of(number))} can be seen." for number, name in enumerate(names)]
    (tmp_path / "photos/metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    options = ("--source", "folder:photos", "--out", "d", "--tasks", "none", "--verify", "claims", "--repair")
    steps = generate(tmp_path, server, *options)["steps"]
    assert model.requests["repair"] == 0 and model.requests["claims"] > 0
    assert steps["verify"]["rejected"] == {"false_claim": COUNT // 2}
    assert {caption["prompt_id"] for caption in captions_of(tmp_path, model).values()} == {"human"}


def test_coverage_is_share_of_answers_in_caption(tmp_path: Path, model: Model, server: ChatServer) -> None:
    both = ("--source", "folder:photos", "--styles", "plain", "--out", "d", "--verify", "covers")
    generate(tmp_path, server, *both)
    captions = captions_of(tmp_path, model)
    # A caption with a wrong detail contradicts one of three answers.
    assert {n: round(caption["coverage"], 3) for n, caption in captions.items()} == {
        n: 0.667 if n % 2 else 1.0 for n in captions
    }
    assert len(captions) == COUNT
    (tmp_path / "synth.yaml").write_text("verify: {min_coverage: 0.9}\n")
    steps = generate(tmp_path, server, "--config", "synth.yaml", *both)["steps"]
    assert steps["verify"]["rejected"] == {"low_coverage": COUNT // 2}
    model.requests.clear()
    model.refutes_colors = True  # refuted answers do not count for coverage
    generate(tmp_path, server, *both[:-1], "covers,round_trip", "--out", "e")
    captions = captions_of(tmp_path, model, out="e")
    right = [caption["coverage"] for n, caption in captions.items() if n % 2 == 0]
    assert len(right) == COUNT // 2 and set(right) == {1.0}
    assert model.requests["covers"] <= 2 * COUNT  # two of three questions remain


def test_judge_gets_only_its_key(tmp_path: Path, model: Model, server: ChatServer, judge: ChatServer) -> None:
    server.key, judge.key = "of-the-writer", "of-the-judge"
    rated = (*CAPTIONS, "--judge", f"judge-7b@{judge.url}")
    refused = run(tmp_path, server, *rated, SYNTH_API_KEY="of-the-writer")
    assert refused.returncode == 1 and "SYNTH_JUDGE_API_KEY" in refused.stderr, refused.stderr
    # the writer's key was not sent to the judge, and no request was paid
    assert not model.requests and judge.authorizations == {None}
    keys = {"SYNTH_API_KEY": "of-nobody", "MY_KEY": "of-the-writer", "SYNTH_JUDGE_API_KEY": "of-the-judge"}
    (tmp_path / "key.yaml").write_text("server: {key_env: MY_KEY, headers: {X-Own: $MY_KEY}}\n")
    generate(tmp_path, server, "--config", "key.yaml", *rated, **keys)
    assert judge.authorizations == {None, "Bearer of-the-judge"}
    assert not any("X-Own" in headers for headers in judge.headers)
    assert any(headers.get("X-Own") == "of-the-writer" for headers in server.headers)
    captions = captions_of(tmp_path, model)
    assert {(n, caption["grounding"]) for n, caption in captions.items()} == {
        (n, 2 if caption_of(n)[0] == "red" else 5) for n in range(COUNT)
    }
    assert {(caption["relevance"], caption["form"]) for caption in captions.values()} == {(5, 4)}
    check = checks_of(tmp_path)["judge"]
    assert check["refuted"]["count"] == COUNT and not check["judges_itself"]
    assert check["false_alarms"] is None and len(judge.bodies) <= COUNT
    manifest = read_manifest(tmp_path / "d")
    assert manifest["config"]["verify"]["judge"] == "judge-7b" and judge.url not in json.dumps(manifest)
    num_requests = len(judge.bodies)
    assert not generate(tmp_path, server, "--config", "key.yaml", *rated, **keys)["is_new"]
    assert len(judge.bodies) == num_requests
    (tmp_path / "synth.yaml").write_text("verify: {min_rating: 3}\nserver: {key_env: MY_KEY}\n")
    steps = generate(tmp_path, server, "--config", "synth.yaml", *rated, **keys)["steps"]
    red = sum(caption_of(number)[0] == "red" for number in range(COUNT))
    assert steps["verify"]["rejected"] == {"low_rating": red} and len(judge.bodies) == num_requests
