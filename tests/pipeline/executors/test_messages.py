"""Messages report lost rows with their reasons and remedies."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.config.sections import SplitConfig
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.errors import StoreError
from pipeline.executors.messages import (
    describe_empty_splits,
    describe_losses,
    describe_warnings,
)
from pipeline.inference.engines import EngineChoice
from pipeline.plan import Model, Plan, describe_requests, describe_start
from pipeline.run import STEPS, generate_dataset
from tests.chat.server import Act, ChatServer, running_chat, task_of
from tests.scene_data import make_version, scene_samples, true_captions


def test_warning_about_unanswered_requests_has_the_server_message(
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

    with running_chat(ChatServer(script)) as chat:
        server = {"max_failure_frac": 1.0}
        config = resolve(source="scenes", limit=12, base_url=[chat.url], model="model", server=server)
        result = generate_dataset(config, tmp_path)
    warnings = describe_warnings(STEPS, result.plan.config.split, result.version, result.funnel)
    assert any(text.startswith("12 requests got only errors") and "scripted 500" in text for text in warnings)
    assert any("rejected by the server" in text and "scripted 413" in text for text in warnings), warnings


def test_empty_splits_of_a_large_version_are_reported(tmp_path: Path) -> None:
    samples = scene_samples(40)
    texts = true_captions(samples)
    column = texts.schema.get_field_index("split")
    in_train = texts.set_column(column, "split", pa.array(["train"] * texts.num_rows))
    version, _ = make_version(tmp_path / "d", samples, in_train)
    (warning,) = describe_empty_splits(version, SplitConfig(group_by="folder"))
    assert warning == (
        "the validation and the test splits have no images, but `synth train` needs some: "
        "use more images or, for a source without splits, another --seed, or smaller groups (--group-by)"
    )
    (warning,) = describe_empty_splits(version, SplitConfig(test_frac=0))
    assert "the validation split" in warning
    whole, _ = make_version(tmp_path / "e", samples, texts)
    assert not list(describe_empty_splits(whole, SplitConfig()))


def test_rejection_warning_states_reason_and_remedy_and_ignores_repeated_images() -> None:
    """A table with a row for each caption repeats its images."""
    repeated = StepSummary("source", "images", 134, 20, {"duplicate_image": 114})
    assert not list(describe_losses(STEPS, [repeated]))
    damaged = StepSummary("source", "images", 134, 4, {"duplicate_image": 114, "unreadable_image": 16})
    (text,) = describe_losses(STEPS, [damaged])
    assert text.startswith("`source` rejected 16 of 20 images, 16 of them as unreadable image")
    german = StepSummary("filter", "annotations", 6, 1, {"other_language": 5})
    (text,) = describe_losses(STEPS, [german])
    problem = "`filter` rejected 5 of 6 annotations, 5 of them as other language: set the language"
    assert text == f"{problem} of the texts: --language (filter.language)"


def test_damaged_version_stops_a_run_before_the_first_request(tmp_path: Path) -> None:
    (tmp_path / "versions/v9.0.0").mkdir(parents=True)
    (tmp_path / "versions/v9.0.0/manifest.json").write_text("{")
    with running_chat(ChatServer()) as chat:
        with pytest.raises(StoreError, match=r"not a version: .*v9\.0\.0 "):
            generate_dataset(resolve(source="scenes", limit=2, base_url=[chat.url], model="model"), tmp_path)
        assert not chat.bodies


def test_start_of_a_run_states_the_tasks_of_each_model(tmp_path: Path) -> None:
    models = {name: Model(name, name) for name in ("default", "small", "large")}
    config = resolve(
        source="folder:x", tasks=["caption", "qa"], verify={"checks": ["claims"]},
        models={"small": {}, "large": {}}, task_models={"qa": "small", "checks": "large"},
    )  # fmt: skip
    engines = {name: EngineChoice("vllm", name, name, Mock()) for name in models}
    plan = replace(Plan.resolve(config, DatasetDir(tmp_path), models), engines=engines)
    line = describe_start(plan)
    texts = ("caption from default (", "; qa from small (", "; checks from large (")
    assert all(text in line for text in texts)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "; 3 requests per image"),
        ({"tasks": ["qa"]}, "; 1 request per image"),
        ({"generate": {"samples": 4}}, "; 9 requests per image"),
        # 2 captions x (1 request for claims + 24 claims x 4 questions)
        ({"verify": {"checks": ["claims"]}}, "3 requests per image, and up to 194 to check"),
        ({"verify": {"checks": ["round_trip", "covers"]}}, "and up to 24 to check"),
        ({"verify": {"judge": "j@http://h/v1"}}, "and up to 10 to check"),
    ],
)  # fmt: skip
def test_start_of_run_states_requests_per_image(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    config = resolve(source="scenes", **{"tasks": ["caption", "qa"]} | settings)
    assert text in describe_requests(Plan.resolve(config, DatasetDir(tmp_path)))
