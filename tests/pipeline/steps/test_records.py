"""A run skips the steps that an earlier run has done, and only those."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset import records
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import Review, format_lines, text_name
from pipeline.errors import ConfigError, EngineError
from pipeline.inference import requests
from pipeline.plan import Model, Plan
from pipeline.reviewing import apply_reviews
from pipeline.run import RunResult, generate_dataset, steps_of
from pipeline.steps import ask as ask_step
from pipeline.steps import base, write
from pipeline.steps.base import RowStep
from pipeline.steps.verify import VerifySettings
from pipeline.storage.files import read_table
from pipeline.tables import RUBRIC
from pipeline.tasks import prompts
from pipeline.types import DEFAULT_MODEL
from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.notes import Notes
from tests.pipeline.sources.test_read import photo

BUS = "A red bus waits at a stop."
Finished = tuple[Path, RunResult]
CAPTIONS = (BUS, "Two dogs run over wet sand.", BUS, "bad", "Boats lie in a harbour.")


def save_photos(folder: Path) -> Path:
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.jpg").write_bytes(photo(number))
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    images = save_photos(folder / "photos")
    return images, generate_dataset(settings(images), folder / "d")


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    """Copy the dataset folder of `finished` to `d`, and return `finished`."""
    shutil.copytree(finished[0].parent / "d", tmp_path / "d")
    return finished


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each step that runs adds its name."""
    names: list[str] = []

    def record(module: Any, function: str, name: str = "") -> None:
        original = getattr(module, function)

        def recorded(*arguments: Any) -> Any:
            names.append(name or arguments[0].name)
            return original(*arguments)

        monkeypatch.setattr(module, function, recorded)

    record(base, "judge_shard")
    record(write, "publish_shards", "write")
    record(ask_step, "write_annotations", "ask")
    return names


def settings(photos: Path, **more: Any) -> Config:
    return resolve(**{"source": f"folder:{photos}", "tasks": "none", "human_texts": "keep", **more})


def run(photos: Path, folder: Path, ran: list[str], **more: Any) -> RunResult:
    """Run once, with `ran` emptied."""
    ran.clear()
    return generate_dataset(settings(photos, **more), folder)


def content(result: RunResult) -> tuple[Any, ...]:
    """Return the facts that are equal for runs that make the same version."""
    return result.version.manifest["digest"], result.version.manifest["rows"], result.funnel


def all_steps(photos: Path, **more: Any) -> list[str]:
    return [step.name for step in steps_of(Plan.resolve(settings(photos, **more), DatasetDir(photos)))[1:]]


def test_run_with_equal_inputs_skips_all_steps(photos: Path, tmp_path: Path, ran: list[str]) -> None:
    first = run(photos, tmp_path / "d", ran)
    assert ran == all_steps(photos) and first.is_new
    written = {path.name for path in (tmp_path / "d" / "steps" / "write").iterdir()}
    assert written == {"rejected.parquet", "done.json"}
    second = run(photos, tmp_path / "d", ran)
    assert ran == [] and not second.is_new
    assert content(second) == content(first)
    assert {reason for summary in first.funnel for reason in summary.rejected} >= {"too_short"}


def test_stopped_run_resumes_after_finished_steps(
    photos: Path, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_shards = base.compare_shards

    def stop(step: RowStep, *arguments: Any) -> None:
        if step.name == "balance":
            raise KeyboardInterrupt
        compare_shards(step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base, "compare_shards", stop)
        run(photos, tmp_path / "d", ran)
    resumed = run(photos, tmp_path / "d", ran)
    assert ran == ["balance", "split", "review", "write"]
    assert content(resumed) == content(run(photos, tmp_path / "whole", ran))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


# Changes, each with the step that runs again.
CHANGES: dict[str, tuple[Callable[[DatasetDir], object], str]] = {
    "a damaged file of kept rows": (lambda d: damage(d.step_file("filter")), "filter"),
    "a missing file": (lambda d: d.step_file("split").unlink(), "split"),
    "a missing version": (lambda d: (d.path / "versions" / "v1.0.0").rename(d.path / "elsewhere"), "write"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_file_reruns_its_step(name: str, copied: Finished, tmp_path: Path, ran: list[str]) -> None:
    photos, first = copied
    change, step = CHANGES[name]
    change(DatasetDir(tmp_path / "d"))
    again = run(photos, tmp_path / "d", ran)
    assert ran == [step]  # the step writes the same rows, so later steps are skipped
    assert content(again) == content(first)
    assert run(photos, tmp_path / "d", ran).version.name == "v1.0.0" and ran == []


def asking(photos: Path, chat: ChatServer, **more: Any) -> Config:
    asked: dict[str, Any] = {"tasks": ("caption",), "human_texts": "compare", "model": "model"}
    return settings(photos, **asked, base_url=[chat.url], **more)


def ask(photos: Path, folder: Path, chat: ChatServer, **more: Any) -> RunResult:
    return generate_dataset(asking(photos, chat, **more), folder)


def test_lost_annotations_and_cost_are_written_again(photos: Path, tmp_path: Path, ran: list[str]) -> None:
    dataset = DatasetDir(tmp_path / "d")
    with running_chat(ChatServer()) as server:
        first = ask(photos, dataset.path, server)
        asked = len(server.bodies)
        ran.clear()
        assert content(ask(photos, dataset.path, server)) == content(first) and ran == []
        dataset.cost.write_text("{")
        dataset.step_file("ask").unlink()
        assert content(ask(photos, dataset.path, server)) == content(first) and ran == ["ask"]
        assert len(server.bodies) == asked and dataset.read_cost()["asked"] == first.stats.asked


def test_run_without_missing_replies_needs_no_server(photos: Path, tmp_path: Path) -> None:
    with running_chat(ChatServer()) as server:
        first = ask(photos, tmp_path / "d", server)
    notes = Notes()
    config = asking(photos, server, title="New")
    again = generate_dataset(config, tmp_path / "d", notes)
    assert again.version.manifest["digest"] == first.version.manifest["digest"]
    assert any("the run uses the stored replies" in text for text in notes.texts)
    with running_chat(ChatServer(lambda times, body: Act(status=401), model="other")) as other:
        changed = config.model_copy(update={"model": "other", "base_url": (other.url,)})
        with pytest.raises(EngineError, match="401"):
            generate_dataset(changed, tmp_path / "d")
    # The interrupted run received no reply from the other model.
    with pytest.raises(EngineError, match="no server answers"):
        generate_dataset(changed, tmp_path / "d")
    (photos / "new.jpg").write_bytes(photo(77))
    with pytest.raises(EngineError):
        generate_dataset(config, tmp_path / "d")


RATING = {"wrong_words": "", "is_wrong": "no", **dict.fromkeys(RUBRIC, "5")}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, ""),
        ({"engine": "vllm"}, "model is down"),
        ({"server": {"flags": ["--quantization=fp8"]}}, "model is down"),
        ({"verify": {"judge": "rater@http://localhost:1/v1"}}, "rater is down"),
    ],
)
def test_stored_replies_replace_unreachable_models_only_if_settings_are_unchanged(
    changed: dict[str, Any], problem: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, *_: Any) -> None:
        raise EngineError(f"{config.model} is down")

    notes, rate = Notes(), Act(json.dumps(RATING))
    with running_chat(ChatServer()) as server, running_chat(ChatServer(lambda *_: rate, "rater")) as rater:
        judged = {"verify": {"judge": f"rater@{rater.url}"}}
        first = ask(photos, tmp_path / "d", server, **judged)
    monkeypatch.setattr("pipeline.plan.choose_engine", fail)
    with pytest.raises(EngineError, match=problem) if problem else nullcontext():
        again = generate_dataset(asking(photos, server, **judged | changed), tmp_path / "d", notes)
        assert content(again) == content(first)
        warned = [text.split(": ")[1] for text in notes.texts if "stored replies" in text]
        assert warned == ["model is down", "rater is down"]


def test_unanswered_requests_are_sent_again(photos: Path, tmp_path: Path) -> None:
    down = True

    def script(times: int, body: dict[str, Any]) -> Act | None:
        return Act(status=413) if down and int(uuid_of(body)[0], 16) < 4 else None

    settings = {"server": {"max_failure_frac": 1.0}}
    with running_chat(ChatServer(script)) as server:
        first = ask(photos, tmp_path / "d", server, **settings)
        assert first.stats.unanswered
        down = False
        again = ask(photos, tmp_path / "d", server, **settings)
        assert again.stats.asked == first.stats.unanswered and not again.stats.unanswered
        assert ask(photos, tmp_path / "d", server, **settings).stats.asked == 0


def test_changed_prompt_rewrites_annotations(photos: Path, tmp_path: Path, ran: list[str]) -> None:
    prompt = tmp_path / "prompts" / "caption" / "v1.j2"
    prompt.parent.mkdir(parents=True)
    prompt_ids = []
    with running_chat(ChatServer()) as server:
        for text in ("Write a caption.", "Write another caption.", "Write a caption."):
            prompt.write_text(f'{text} Reply as {{"caption": "..."}}.\nTask: caption\n')
            # Clear caches, as in a new process.
            for cached in (*vars(prompts).values(), *vars(requests).values()):
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
            ask(photos, tmp_path / "d", server, generate={"prompt_dir": str(prompt.parents[1])})
            annotations = read_table(DatasetDir(tmp_path / "d").step_file("ask"), ["prompt_id"])
            prompt_ids.append(set(annotations["prompt_id"].to_pylist()))
    assert ran.count("ask") == 3
    assert prompt_ids[0] == prompt_ids[2] != prompt_ids[1]


FROM_DEDUPE = ["dedupe", "balance", "split", "review", "write"]
# Changed settings, each with the steps that run again.
STEPS_OF_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"balance": {"max_answer_frac": 0.9}}, ["balance", "write"]),  # balance keeps the same rows
    ({"dedupe": {"max_images_per_caption": 1}}, FROM_DEDUPE),
    ({"split": {"test_frac": 0.6}}, ["split", "review", "write"]),
    ({"filter": {"min_caption_words": 1}}, ["filter", "verify", *FROM_DEDUPE]),
    ({"filter": {"max_duplicate_trigram_frac": 0.9}}, ["filter", "write"]),
    ({"title": "Photos"}, ["write"]),
    ({"server": {"request_timeout_s": 99.0}}, []),
]


@pytest.mark.parametrize(("more", "steps"), STEPS_OF_SETTINGS)
def test_changed_setting_reruns_only_affected_steps(
    more: dict[str, Any], steps: list[str], copied: Finished, tmp_path: Path, ran: list[str]
) -> None:
    photos, _ = copied
    result = run(photos, tmp_path / "d", ran, **more)
    assert ran == steps
    assert content(result) == content(run(photos, tmp_path / "alone", ran, **more))


def test_changed_code_reruns_all_steps(
    copied: Finished, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, _ = copied
    monkeypatch.setattr(records, "code_digest", lambda: "other")
    assert not run(photos, tmp_path / "d", ran).is_new
    assert ran == [*all_steps(photos)]


def test_run_with_added_near_duplicates_equals_new_run(photos: Path, tmp_path: Path, ran: list[str]) -> None:
    kept = {"filter": {"min_caption_words": 1}}
    run(photos, tmp_path / "d", ran, **kept)
    for path in sorted(photos.glob("*.jpg")):
        with Image.open(path) as image:
            image.resize((144, 108)).save(photos / f"near-{path.stem}.png")
    again = run(photos, tmp_path / "d", ran, **kept)
    alone = run(photos, tmp_path / "alone", ran, **kept)
    assert content(again) == content(alone)
    assert again.funnel[0].rejected["near_duplicate_image"] == 10


def test_change_of_clip_weights_or_judge_reruns_the_verify_step(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "model.safetensors").write_bytes(b"one")
    verify = {"checks": ["alignment"], "clip_model": str(clip), "judge": "rater@http://localhost:1/v1"}
    keys = []
    for revision in ("first", "second"):
        models = {DEFAULT_MODEL: Model("m", "r"), "judge": Model("rater", revision)}
        plan = Plan.resolve(settings(tmp_path, verify=verify), DatasetDir(tmp_path), models)
        keys.append(records.step_key("verify", VerifySettings.of(plan), (), ()))
    (clip / "model.safetensors").write_bytes(b"two")
    keys.append(records.step_key("verify", VerifySettings.of(plan), (), ()))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("step", ["read", "ask", "split"])
def test_only_finished_runs_accept_reviews(
    step: str, copied: Finished, tmp_path: Path, ran: list[str]
) -> None:
    photos, _ = copied
    dataset = DatasetDir(tmp_path / "d")
    reviews = tmp_path / "reviews.jsonl"
    sample_id, first = text_name(read_table(dataset.step_file("split")).to_pylist()[0])
    review = Review(sample_id=sample_id, content=first, verdict="bad", reason="not_true")
    reviews.write_text(format_lines([review]))
    (dataset.path / "steps" / step / "done.json").unlink()
    with pytest.raises(ConfigError, match="has no finished run to review"):
        apply_reviews(dataset, [reviews])
    assert not dataset.reviews.exists() or dataset.reviews.read_text() == ""
    run(photos, dataset.path, ran)
    ran.clear()
    applied = apply_reviews(dataset, [reviews])
    assert ran == ["review", "write"] and applied.is_new
    assert applied.funnel[-2].rejected == {"reviewed_not_true": 1}
    assert run(photos, dataset.path, ran).version.name == applied.version.name and ran == []
