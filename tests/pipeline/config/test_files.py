"""Files of settings: precedence of options and files, and errors with a hint."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.errors import ConfigError

SOURCE = "source: scenes\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "synth.yaml"


def test_options_override_the_file_and_the_file_overrides_defaults(file: Path) -> None:
    file.write_text(SOURCE + "limit: 7\nseed: 3\ngenerate: {qa_temperature: 0.2}\nserver: {concurrency: 8}\n")
    config = resolve(file, limit=9, seed=None, server={"flags": ["--x"]})
    assert (config.limit, config.seed) == (9, 3)
    assert (config.generate.qa_temperature, config.generate.caption_temperature) == (0.2, 0.0)
    assert (config.server.concurrency, config.server.flags) == (8, ("--x",))


def test_section_with_only_comments_has_the_defaults(file: Path) -> None:
    file.write_text("source: scenes\nfilter:\n#  language: de\n")
    assert resolve(file) == Config(source="scenes")


@pytest.mark.parametrize(
    ("lines", "problem", "hint"),
    [
        ("limits: 7", "unknown config key: limits", "did you mean limit"),
        ("generate: {temprature: 1}", "unknown config key: generate.temprature", "temperature"),
        ("filter: {unknown: 3}", "unknown config key: filter.unknown", "known keys: filter."),
        ("limit: 0", "bad value for limit: Input should be greater than or equal to 1 (0)", "settings.md"),
        ("limit: true", "bad value for limit: Input should be a number (True;", "explains limit"),
        ("split: {test_frac: no}", "bad value for split.test_frac: Input should be a number", "settings.md"),
        ("generate: {caption_styles: [A b]}", "bad value for generate.caption_styles", "docs"),
        ("captions: a.csv", "bad value for captions: Input should be a list ('a.csv')", "explains captions"),
        ("filter: [a]", "bad value for filter: Input should be a valid dictionary", "explains filter"),
        ("split: {validation_frac: 0.5, test_frac: 0.5}", "must add up to less than 1", "explains split"),
        ("tasks: []", "no texts would be made", "docs/settings.md"),
        ("tasks: [caption, caption]", "named twice", "docs/settings.md explains tasks"),
        ("limit: 3\nlimit: 4", "line 3: the key limit appears twice", "remove one"),
        ("server: {headers: {a: b, a: e}}", "line 2: the key a appears twice", "remove one"),
    ],
)
def test_bad_setting_error_names_problem_and_hint(lines: str, problem: str, hint: str, file: Path) -> None:
    file.write_text(f"{SOURCE}{lines}\n")
    with pytest.raises(ConfigError) as caught:
        resolve(file)
    assert problem in str(caught.value) and hint in caught.value.hint
    assert len(caught.value.hint) < 1000


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("sources: scenes\n", "unknown config key: sources", "did you mean source"),
        ("- a\n", "must contain keys and values", "limit: 100"),
        ("a: [\n", "is not YAML", "limit: 100"),
        ("limit: 3\n", "no source given", "--source folder:PATH"),
        (None, "cannot read config file", "pass a YAML file"),
    ],
)
def test_bad_file_error_names_problem_and_hint(text: str | None, problem: str, hint: str, file: Path) -> None:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve(file)
    assert hint in caught.value.hint


SERVERS = (
    {"key_env": "sk-SECRET-123456"},
    {"key_env": "hf_SECRET123456"},
    {"headers": {"X-Key": "SECRET\nX-Other: b"}},
    {"headers": {"Authorization": "Bearer SECRET"}, "concurrency": "fast"},
    {"headers": "SECRET"},
)


@pytest.mark.parametrize(
    "settings",
    [
        *({"server": server} for server in SERVERS),
        *({"models": {"small": server}} for server in SERVERS),
        {"base_url": ["http://me:SECRET@h/v1"]},
    ],
)
def test_error_does_not_show_a_key_or_password(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"key_env|headers|concurrency|base_url") as caught:
        resolve(source="scenes", **settings)
    assert "SECRET" not in f"{caught.value} {caught.value.hint}"
