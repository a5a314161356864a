"""Values of settings: languages, judges, and what goes together."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.run_options import OPTIONS
from pipeline.config import Config
from pipeline.config.files import keys_of, resolve
from pipeline.errors import ConfigError
from trainer.config import TrainConfig


def test_page_of_settings_lists_the_settings_and_options_that_exist() -> None:
    page = (Path(__file__).parents[3] / "docs/settings.md").read_text(encoding="utf-8")
    generate, _, train = page.partition("## `synth train`")
    for part, section in ((generate, Config), (train.partition("| preset |")[0], TrainConfig)):
        keys = [re.sub(r"\(.*?\)", "", row) for row in re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)]
        assert sorted(re.findall(r"`([\w.]+)`", "".join(keys))) == sorted(keys_of(section))
    assert [option.flag for option in OPTIONS if f"`{option.flag}" not in page] == []


@pytest.mark.parametrize(
    ("written", "read"), [("de", "de"), ("any", None), ("null", None), ("no", "no"), ("gsw", ""), ("xx", "")]
)
def test_a_language_is_one_that_can_be_recognised_or_any(written: str, read: str | None, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"source: scenes\nfilter:\n  language: {written}\n")
    if read == "":
        with pytest.raises(ConfigError, match=f"filter.language: no language in which .* with `any`.*'{written}'"):
            resolve(file)
    else:
        assert resolve(file).filter.language == read


def test_a_task_in_a_language_that_is_not_recognised_is_one_error() -> None:
    task = {"name": "notes", "kind": "text", "prompt": "Take notes."}
    assert resolve(source="scenes", own_tasks=[task | {"language": "any"}]).own_tasks[0].language == "any"
    with pytest.raises(ConfigError, match="no language in which a text can be recognised") as caught:
        resolve(source="scenes", own_tasks=[task | {"language": "xx"}])
    assert str(caught.value).count("language:") == 1


@pytest.mark.parametrize(
    "judge",
    [
        "org/model@http://host:8000/v1",
        "model@0123abcd@https://host/api/v1/",
        "model",
        "llava:7b",
        "/models/Qwen2.5-VL@http://host:8000/v1",
    ],  # the second as `synth serve` names it
)
def test_a_judge_is_a_model_and_the_address_of_its_server(judge: str) -> None:
    assert resolve(source="scenes", verify={"judge": judge}).verify.judge == judge


@pytest.mark.parametrize("judge", ["http://host/v1", "model@host:8000/v1", "a model@http://host/v1", "@http://host/v1", ""])
def test_an_address_without_a_model_is_no_judge(judge: str) -> None:
    with pytest.raises(ConfigError, match=r"verify\.judge: .* is not a model and the address of its server"):
        resolve(source="scenes", verify={"judge": judge})


def test_only_what_is_checked_can_be_repaired() -> None:
    with pytest.raises(ConfigError, match="claims"):
        resolve(source="scenes", verify={"repair": True})
    assert resolve(source="scenes", verify={"repair": True, "checks": ["claims"]}).verify.repair


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"filter": {"min_caption_words": 20, "max_caption_words": 10}}, "min_caption_words is 20, and max_caption_words 10"),
        (
            {"own_tasks": [{"name": "x", "kind": "text", "prompt": "p", "min_words": 9, "max_words": 2}]},
            "min_words is 9, and max_words 2: no text is so long",
        ),
        ({"generate": {"samples": 2}, "select": {"pairs": True}}, "so that none is better: --samples 3"),
        ({"base_url": ["http://h:1/v1", "http://H:1/v1/"]}, "twice, in two spellings"),
    ],
)
def test_settings_that_contradict_each_other_are_one_error(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        resolve(source="scenes", **settings)
    assert resolve(source="scenes", generate={"samples": 3}, select={"pairs": True}).select.pairs
