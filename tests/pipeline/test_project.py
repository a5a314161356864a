"""The settings file of `synth init` lists every default, and the written prompts and tasks are valid."""

import re
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.errors import ConfigError
from pipeline.inference.request_checks import check_requests
from pipeline.project import write_project
from pipeline.sources import with_source_defaults
from pipeline.tasks import TASKS
from pipeline.tasks.prompts import render
from tests.plans import request_plan


def test_settings_file_lists_all_defaults_and_is_not_overwritten(tmp_path: Path) -> None:
    settings, _, _ = write_project(tmp_path)
    uncommented = re.sub(r"^# (?=\s*[a-z_]+:)", "", settings.read_text(), flags=re.MULTILINE)
    keys = {*yaml.safe_load(uncommented)}
    assert keys == {*Config.model_fields}
    (tmp_path / "all.yaml").write_text(uncommented)
    defaults = with_source_defaults(resolve(source="folder:photos"))
    assert with_source_defaults(resolve(tmp_path / "all.yaml")) == defaults
    assert resolve(settings) == resolve(source="folder:photos")
    with pytest.raises(ConfigError, match=r"synth\.yaml already exists"):
        write_project(tmp_path)


def test_written_prompts_equal_the_built_in_prompts(tmp_path: Path) -> None:
    _, prompts, _ = write_project(tmp_path)
    ids = {render(TASKS["caption"], folders, style="plain").id for folders in ((prompts,), ())}
    assert len(ids) == 1


def test_unchanged_example_tasks_are_valid(tmp_path: Path) -> None:
    settings, _, tasks = write_project(tmp_path)
    files = sorted(tasks.glob("*.yaml"))
    config = resolve(settings, custom_tasks=files, tasks=("caption",), columns={"context": "title"})
    check_requests(request_plan(with_source_defaults(config)), config.verify)
    assert config.tasks == ("caption", *(path.stem for path in files)) and len(files) == 6
