"""Settings of an earlier run in the same folder."""

import json
from pathlib import Path

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ConfigError
from pipeline.run import refuse_other_settings


@pytest.mark.parametrize("content", ["[]", '{"source": 3, "lr": 0.1}', '{"runs": []}'])
def test_run_file_of_another_tool_is_one_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="is not a run of synth"):
        refuse_other_settings(DatasetDir(tmp_path), resolve(source="scenes"), "source")


def test_logins_that_differ_in_their_tokens_alone_can_be_resumed(tmp_path: Path) -> None:
    config = resolve(source="scenes", base_url=["https://one@host/v1", "https://two@host/v1"])
    (tmp_path / "run.json").write_text(json.dumps(config.recorded()))
    refuse_other_settings(DatasetDir(tmp_path), config, "filter")
    with pytest.raises(ConfigError, match="seed has changed"):
        refuse_other_settings(DatasetDir(tmp_path), config.model_copy(update={"seed": 1}), "filter")
