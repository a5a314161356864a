"""A user is told what a run has lost, why, and what to change."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.dataset.manifest import StepSummary
from pipeline.errors import StoreError
from pipeline.executors.messages import (
    describe_empty_splits,
    describe_losses,
    describe_warnings,
)
from pipeline.run import STEPS, RunResult, generate_dataset
from tests.chat.server import Act, ChatServer, Script, running_chat, task_of
from tests.scene_data import make_version, scene_samples, true_captions

REFUSAL = Act(text=json.dumps({"caption": "I'm sorry, but I can't help with that request."}))


def run(folder: Path, script: Script) -> RunResult:
    with running_chat(ChatServer(script)) as chat:
        config = resolve(source="scenes", limit=12, base_url=[chat.url], model="model", server={"max_failure_frac": 1.0})
        return generate_dataset(config, folder)


def test_captions_of_which_none_is_left_are_told_with_the_reason(tmp_path: Path) -> None:
    result = run(tmp_path, lambda times, body: REFUSAL if task_of(body).startswith("Task: caption") else None)
    told = describe_warnings(STEPS, result.plan, result.version, result.funnel)
    assert any("none of the captions is left: validate rejected 24 for refusal" in text for text in told), told
    assert not any("questions" in text for text in told)


def test_requests_that_the_server_did_not_answer_are_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_BACKOFF_SECONDS", "LONGEST_BACKOFF_SECONDS"):
        monkeypatch.setattr(f"pipeline.inference.protocol.{name}", 0.01)
    answered: set[str] = set()

    def script(times: int, body: dict[str, object]) -> Act | None:
        if task_of(body) == "Task: qa":
            return Act(status=500)
        answered.add(str(body))
        return Act(status=413) if len(answered) > 20 else None

    result = run(tmp_path, script)
    told = [text for text in describe_warnings(STEPS, result.plan, result.version, result.funnel) if "server" in text]
    assert any(text.startswith("12 requests got nothing but errors") and "scripted 500" in text for text in told), told
    assert any("refused by the server" in text and "scripted 413" in text for text in told), told


def test_splits_without_an_image_are_told_where_there_are_enough_images_for_each(tmp_path: Path) -> None:
    samples = scene_samples(40)
    held_out = {sample.id: "train" for sample in samples}
    texts = true_captions(samples)
    in_train = texts.set_column(
        texts.schema.get_field_index("split"), "split", pa.array([held_out[i] for i in texts["sample_id"].to_pylist()])
    )
    version, _ = make_version(tmp_path / "d", samples, in_train)
    (told,) = describe_empty_splits(version, resolve(source="scenes", split={"group_by": "folder"}))
    assert told == (
        "no image is in the validation and the test split, which `synth train` needs: where the source states no splits, "
        "try another --seed, "
        "or group them by less (--group-by)"
    )
    (told,) = describe_empty_splits(version, resolve(source="scenes", split={"test_frac": 0}))
    assert "the validation split" in told
    whole, _ = make_version(tmp_path / "e", samples, texts)
    assert not list(describe_empty_splits(whole, resolve(source="scenes")))


def test_rows_about_an_image_that_is_there_are_no_losses() -> None:
    """Tables have a row for each caption: their texts are added to the image."""
    repeated = StepSummary("source", "images", 134, 20, {"duplicate_image": 114})
    assert not list(describe_losses(STEPS, [repeated]))
    damaged = StepSummary("source", "images", 134, 4, {"duplicate_image": 114, "unreadable_image": 16})
    (text,) = describe_losses(STEPS, [damaged])
    assert text.startswith("source rejected 16 of 20 images, 16 for unreadable image")


def test_a_damaged_version_ends_a_run_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "versions/v9.0.0").mkdir(parents=True)
    (tmp_path / "versions/v9.0.0/manifest.json").write_text("{")
    with running_chat(ChatServer()) as chat:
        with pytest.raises(StoreError, match=r"the version v9\.0\.0 cannot be read"):
            generate_dataset(resolve(source="scenes", limit=2, base_url=[chat.url], model="model"), tmp_path)
        assert not chat.bodies
