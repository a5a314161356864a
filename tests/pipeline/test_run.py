"""A run refuses the folder of another tool."""

from pathlib import Path

import pytest

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ConfigError
from pipeline.plan import refuse_other_source


@pytest.mark.parametrize("content", ["{", "[]", '{"source": 3, "lr": 0.1}', '{"runs": []}'])
def test_run_file_of_another_tool_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="was not written by synth"):
        refuse_other_source(DatasetDir(tmp_path), resolve(source="scenes"))
