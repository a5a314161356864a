"""Files of settings: what overrides what, and one clear error."""

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.errors import ConfigError


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("source: scenes\nlimit: 7\nseed: 3\ngenerate: {qa_temperature: 0.2}\n")
    config = resolve(file, limit=9, seed=None)
    assert (config.limit, config.seed) == (9, 3)
    assert (config.generate.qa_temperature, config.generate.caption_temperature) == (0.2, 0.0)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("source: scenes\nlimits: 7\n", "unknown config key: limits"),
        ("source: scenes\ngenerate: {temprature: 1}\n", "unknown config key: generate.temprature"),
        ("source: scenes\nlimit: 0\n", "bad value for limit"),
        ("source: scenes\ngenerate: {caption_styles: [A poem]}\n", "bad value for generate.caption_styles"),
        ("source: scenes\ntasks: []\n", "no task is asked and no text of people is kept"),
        ("source: scenes\ntasks: [caption, caption]\n", "named twice"),
        ("- a\n", "must hold keys and values"),
        ("a: [\n", "is not YAML"),
        ("limit: 3\n", "no source given"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        resolve(file)
    assert caught.value.hint


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config file"):
        resolve(tmp_path / "none.yaml")


def test_a_flag_of_a_section_leaves_the_rest_of_it_as_the_file_has_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("source: scenes\nserver: {concurrency: 8}\n")
    server = resolve(file, server={"flags": ["--x"]}).server
    assert (server.concurrency, server.flags) == (8, ("--x",))


def test_a_section_without_a_line_is_that_of_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("source: scenes\nfilter:\n#  language: de\n")
    assert resolve(file) == Config(source="scenes")
    file.write_text("config: foo\nversion: 1\n")
    with pytest.raises(ConfigError, match="unknown config key: config"):
        resolve(file)
