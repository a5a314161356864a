"""Prompts: a shared system text, the task line at the end, and an id that changes with the wording."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import SCENE_PROMPTS
from pipeline.config.files import resolve
from pipeline.errors import ConfigError
from pipeline.scenes.text import STYLES as KNOWN_STYLES
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task
from pipeline.tasks.checks import BLIND, CHECKING, CLAIMS, COVERS, REPAIR
from pipeline.tasks.prompts import DRAWS, STYLES, render, template

CASES: list[tuple[str, dict[str, Any]]] = [
    ("caption", {"style": "brief"}),
    ("caption", {"style": "detailed"}),
    ("qa", {}),
    ("answer", {"question": "Why?"}),
]


@pytest.mark.parametrize("task", [TASKS["qa"], TASKS["deck_qa"], *CHECKING], ids=lambda task: task.name)
def test_reply_example_in_a_prompt_has_no_space_that_the_grammar_forbids(task: Task) -> None:
    text = render(task, caption="", question="?", answer="", claims=(), count=1).text
    (example,) = re.findall(r'Reply as (\{".*\})', text)
    assert '": ' not in example and ', "' not in example


def test_requests_without_an_image_have_a_separate_system_text() -> None:
    for task in (CLAIMS, COVERS, REPAIR, BLIND):
        system = render(task, caption="", question="?", claims=(), count=1).system
        assert system == template("system_text/v1").strip() and "Look at" not in system
        folders = (SCENE_PROMPTS,)
        scenes = render(task, folders, caption="", question="?", claims=(), count=1).system
        assert scenes == render(TASKS["qa"], folders).system


def test_tasks_share_the_system_text_and_the_image_precedes_the_task() -> None:
    for task, values in CASES:
        system, user = render(TASKS[task], **values).messages()
        assert system == {"role": "system", "content": template("system/v1").strip()}
        assert [part["type"] for part in user["content"]] == ["image", "text"]


def test_unknown_style_error_lists_built_in_styles() -> None:
    with pytest.raises(ConfigError, match="no caption style sonnet") as caught:
        render(TASKS["caption"], style="sonnet")
    assert "plain, detailed, brief, alt" in caught.value.hint


@pytest.mark.parametrize(("folders", "styles"), [((), STYLES), ((SCENE_PROMPTS,), KNOWN_STYLES)])
def test_each_style_has_a_different_wording(folders: tuple[Path, ...], styles: tuple[str, ...]) -> None:
    texts = [render(TASKS["caption"], folders, style=style).text.splitlines() for style in styles]
    assert len({lines[0] for lines in texts}) == len(texts)
    assert [lines[-1] for lines in texts] == [f"Task: caption, {style}" for style in styles]


def prompt_id(task: str, *folders: Path) -> str:
    return render(TASKS[task], folders, **dict(CASES).get(task, {})).id


def test_scene_prompt_ids_are_unchanged_since_training_of_the_tiny_model() -> None:
    digests = {"caption": "cfbdc0c86f31", "qa": "f512a8e48587", "deck_qa": "a4b79fa25464"}
    for task, digest in (digests | {"answer": "9a35f27fbcd1"}).items():
        assert prompt_id(task, SCENE_PROMPTS) == f"{task}/v1@{digest}"


@pytest.mark.parametrize(
    ("source", "model", "folders"),
    [
        ("scenes", "a/b", (SCENE_PROMPTS,)), ("scenes-deck", None, (SCENE_PROMPTS,)),
        ("folder:x", "tiny", (SCENE_PROMPTS,)), ("folder:scenes", None, ()),
    ],
)  # fmt: skip
def test_scenes_source_and_tiny_model_use_the_prompts_for_scenes(
    source: str, model: str | None, folders: tuple[Path, ...]
) -> None:
    assert resolve(source=source, model=model).prompt_dirs == folders


def test_random_number_of_a_prompt_selects_its_wording_and_question_types() -> None:
    captions = [render(TASKS["caption"], style="plain", draw=draw).text for draw in range(DRAWS)]
    questions = [render(TASKS["qa"], draw=draw).text for draw in range(DRAWS)]
    assert (len(set(captions)), len(set(questions))) == (3, 8)
    assert {text.splitlines()[-1] for text in questions} == {"Task: qa"}
    assert sum("here the answer is no" in text for text in questions) == DRAWS // 2


def test_prompts_state_length_and_language() -> None:
    for draw in range(DRAWS):
        text = render(TASKS["caption"], style="detailed", draw=draw, words=33, language="German").text
        assert "33 words" in text and "Write in German." in text
        assert "in German" in render(TASKS["qa"], draw=draw, language="German").text
    assert "Write in" not in render(TASKS["caption"], style="plain").text


def test_user_templates_replace_built_in_ones_and_change_the_id(tmp_path: Path) -> None:
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "v1.j2").write_text("Write a sonnet.\nTask: caption, {{ style }}\n")
    own = render(TASKS["caption"], (tmp_path,), style="sonnet")
    assert own.text == "Write a sonnet.\nTask: caption, sonnet"
    assert own.id != render(TASKS["caption"], style="brief").id
    assert own.text == render(TASKS["caption"], (tmp_path, SCENE_PROMPTS), style="sonnet").text
    assert render(TASKS["qa"], (tmp_path,)) == render(TASKS["qa"])
    row = (("title", "Lamp"),)
    assert render(TASKS["caption"], (tmp_path,), row=row, style="plain").text.startswith("Notes that came")
    (tmp_path / "own/caption").mkdir(parents=True)
    (tmp_path / "own/caption/v1.j2").write_text("Sold as {{ row.title }}")
    assert "Notes" not in render(TASKS["caption"], (tmp_path / "own",), row=row, style="plain").text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_untrusted_template_runs_no_code(template: str, tmp_path: Path) -> None:
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "v1.j2").write_text(template)
    with pytest.raises(ConfigError, match="cannot be rendered"):
        render(TASKS["caption"], (tmp_path,), style="brief")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("<|im_start|>system", "< |im_start|>system"),
        ("a <|image_pad|> lamp", "a < |image_pad|> lamp"),
        ("<\uff5cUser\uff5c> x", "< \uff5cUser\uff5c> x"),
        ("</s><image> <<SYS>> <start_of_turn>", "< /s>< image> << SYS>> < start_of_turn>"),
        ("[INST] x [/INST]", "[ INST] x [ /INST]"),
        ("a\u202e b\u2066 c", "a b c"),
        ("3 < 4, 5 > 2, [a], [1, 2] <3", "3 < 4, 5 > 2, [a], [1, 2] <3"),
    ],
)
def test_special_tokens_and_text_direction_marks_do_not_reach_a_prompt(value: str, shown: str) -> None:
    notes = render(TASKS["caption"], row=(("title", value),), style="plain").text
    assert f"title: {json.dumps(shown, ensure_ascii=False)}" in notes
    assert shown in render(TASKS["answer"], question=value).text
    assert shown in render(REPAIR, caption="A lamp.", claims=(value,)).text
