"""Values of settings, contradictions between them, and their documentation."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.errors import ConfigError
from tests import settings_page


def test_settings_page_and_file_are_generated_from_the_settings() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.render_page(), "run `make docs`"
    assert settings_page.FILE.read_text(encoding="utf-8") == settings_page.render_file(), "run `make docs`"


@pytest.mark.parametrize(
    ("yaml_value", "language"),
    [("de", "de"), ("any", None), ("null", None), ("no", "no"), ("gsw", ""), ("xx", "")],
)
def test_filter_language_that_cannot_be_detected_is_refused(
    yaml_value: str, language: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"source: scenes\nfilter:\n  language: {yaml_value}\n")
    if language == "":
        with pytest.raises(
            ConfigError, match=f"filter.language: this language cannot .* `any`.*'{yaml_value}'"
        ):
            resolve(file)
    else:
        assert resolve(file).filter.language == language


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("org/model@http://host:8000/v1", ""),
        ("model@0123abcd@https://host/api/v1/", ""),
        ("model", ""),
        ("llava:7b", ""),
        ("/models/Qwen2.5-VL@http://host:8000/v1", ""),
        ("http://host/v1", "is not a model and its server"),
        ("model@host:8000/v1", "is not a model and its server"),
        ("a model@http://host/v1", "is not a model and its server"),
        ("@http://host/v1", "is not a model and its server"),
        ("", "is not a model and its server"),
        ("model@http://host:99999/v1", "Port out of range"),
    ],
)
def test_judge_is_a_model_with_an_optional_server_address(judge: str, problem: str) -> None:
    if problem:
        with pytest.raises(ConfigError, match=rf"verify\.judge: .*{problem}"):
            resolve(source="scenes", verify={"judge": judge})
    else:
        assert resolve(source="scenes", verify={"judge": judge}).verify.judge == judge


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"verify": {"repair": True}}, "`repair` needs the check `claims`"),
        ({"models": {"a": {"base_url": ["http://h"], "flags": ["--x"]}}}, "models.a: `flags` are for vLLM"),
        ({"models": {"a": {"base_url": ["http://h"], "engine": "embedded"}}}, "a: `base_url` and "),
        ({"filter": {"min_caption_words": 20, "max_caption_words": 10}}, "20, but max_caption_words is 10"),
        (
            {"custom_tasks": [{"name": "x", "kind": "text", "prompt": "p", "min_words": 9, "max_words": 2}]},
            "min_words is 9, but max_words is 2: no text has such a length",
        ),
        ({"base_url": ["http://h:1/v1", "http://H:1/v1/"]}, "twice, in two spellings"),
        ({"tasks": "none", "human_texts": "fill"}, "`human_texts: fill` needs a model for"),
        ({"tasks": ["none", "caption"]}, "`tasks: none` excludes other tasks"),
        ({"generate": {"caption_styles": ["human"]}}, "`human` is the style of human captions"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        resolve(source="scenes", **settings)
