"""The plan of a run: refused folders and settings."""

import errno
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline import sources
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.manifest import StepSummary
from pipeline.errors import ConfigError, EngineError, SourceError, StoreError, SynthError
from pipeline.executors.messages import NoRowsError, require_rows
from pipeline.plan import Plan, refuse_other_source
from pipeline.progress import NullProgress
from pipeline.run import STEPS
from pipeline.storage.object_store import parse_dataset_path


@pytest.mark.parametrize("content", ["{", "[]", '{"source": 3, "lr": 0.1}', '{"runs": []}'])
def test_run_file_of_another_tool_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="was not written by synth"):
        refuse_other_source(DatasetDir(tmp_path), resolve(source="scenes"))


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        ("folder:photos", "folder:./photos/", True),
        ("folder:photos", "folder:{here}/photos", True),
        ("folder:photos", "folder:other", False),
        ("parquet:s3://a/b", "parquet:s3://a/./b", False),
    ],
)
def test_different_spelling_of_one_folder_is_the_same_source(
    before: str, now: str, *, is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(source=now.format(here=tmp_path))
    (tmp_path / "run.json").write_text(json.dumps(config.model_dump(mode="json") | {"source": before}))
    refusal = f"has data from {before}"
    with nullcontext() if is_same else pytest.raises(ConfigError, match=refusal):
        refuse_other_source(DatasetDir(tmp_path), config)


def test_object_store_without_a_cluster_is_refused() -> None:
    folder = parse_dataset_path("s3://bucket/name")
    with pytest.raises(ConfigError, match="only --executor ray can write to s3://bucket/name"):
        Plan.open(resolve(source="scenes"), folder, NullProgress())


def test_missing_vllm_is_an_error_before_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.inference.vllm.vllm_python", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda api, name: pytest.fail("asked the Hub"))
    config = resolve(source="scenes", engine="vllm", model="me/a")
    with pytest.raises(EngineError, match="vLLM is not installed here") as caught:
        Plan.open(config, tmp_path, NullProgress())
    assert caught.value.hint.startswith("pip install vllm")
    assert not [*tmp_path.iterdir()]


def test_error_names_the_condition_that_dropped_all_images(tmp_path: Path) -> None:
    plan = Plan.resolve(resolve(source="folder:x", tasks=["caption"]), DatasetDir(tmp_path))
    with pytest.raises(NoRowsError, match=r"no version was made: dropped by kind: 80 annotations$") as raised:
        require_rows(plan, STEPS, [StepSummary("validate", "annotations", 80, 0, {"dropped_by_kind": 80})])
    assert "max_attempts" not in str(raised.value.hint)


@pytest.mark.parametrize(
    ("error", "expected", "problem", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left"), StoreError, "the disk is full", "free some space"),
        (OSError("broken stream"), SourceError, "cannot read X: broken stream", "check the source"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "/a"),
            SourceError,
            "cannot read /a: No",
            "the path",
        ),
    ],
)
def test_error_of_opening_a_source_states_its_cause(
    error: OSError,
    expected: type[SynthError],
    problem: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = replace(sources.find_source("folder"), open=Mock(side_effect=error))
    monkeypatch.setattr(sources, "SOURCES", (spec,))
    with pytest.raises(expected, match=problem) as caught:
        Plan.open(resolve(source="folder:X"), tmp_path, NullProgress())
    assert hint in caught.value.hint
