"""Prompts: one shared system text, one task line at the end, and an id that changes with the wording."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.tasks import prompts
from pipeline.tasks.prompts import STYLES, prompt_id, render, template

CASES: list[tuple[str, dict[str, Any]]] = [
    ("caption", {"style": "brief"}),
    ("caption", {"style": "detailed"}),
    ("qa", {}),
    ("answer", {"question": "Why?"}),
]
LAST = ["Task: caption, brief", "Task: caption, detailed", "Task: qa", "Question: Why?"]


@pytest.mark.parametrize(("case", "last"), list(zip(CASES, LAST, strict=True)))
def test_a_prompt_ends_with_its_task_line(case: tuple[str, dict[str, Any]], last: str) -> None:
    task, values = case
    assert render(task, **values).text.splitlines()[-1] == last


def test_all_tasks_share_the_system_text_so_that_a_server_can_reuse_it() -> None:
    assert {render(task, **values).system for task, values in CASES} == {template("system/v1").strip()}


def test_the_image_stands_between_the_system_text_and_the_task() -> None:
    system, user = render("qa").messages()
    assert system["role"] == "system"
    assert [part["type"] for part in user["content"]] == ["image", "text"]


def test_a_value_that_is_missing_is_an_error_and_not_an_empty_word() -> None:
    with pytest.raises(ConfigError, match="'question' is undefined"):
        render("answer")


def test_a_style_that_the_prompt_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="style 'sonnet'") as caught:
        render("caption", style="sonnet")
    assert "brief, detailed, plain, alt" in caught.value.hint


@pytest.mark.parametrize("style", STYLES)
def test_every_style_has_its_own_wording(style: str) -> None:
    assert len({render("caption", style=name).text.splitlines()[0] for name in STYLES}) == len(STYLES)
    assert render("caption", style=style).text.splitlines()[-1] == f"Task: caption, {style}"


def test_a_users_own_templates_win_and_change_the_id(tmp_path: Path) -> None:
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "v1.j2").write_text("Write a sonnet.\nTask: caption, {{ style }}\n")
    own = render("caption", tmp_path, style="sonnet")
    assert own.text == "Write a sonnet.\nTask: caption, sonnet"
    assert own.id != render("caption", style="brief").id
    assert render("qa", tmp_path) == render("qa")


def test_a_template_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa" / "v1.j2").write_text("{% if %}")
    with pytest.raises(ConfigError, match="cannot be rendered"):
        render("qa", tmp_path)


def test_the_id_changes_with_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {task: prompt_id(task) for task in ("caption", "qa")}
    original = template
    monkeypatch.setattr(prompts, "template", lambda name, folder=None: original(name) + (" now" if name == "qa/v1" else ""))
    assert prompt_id("qa") != before["qa"]
    assert prompt_id("caption") == before["caption"]


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"],
)
def test_a_template_of_a_stranger_runs_no_code(template: str, tmp_path: Path) -> None:
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption" / "v1.j2").write_text(template)
    with pytest.raises(ConfigError, match="cannot be rendered"):
        render("caption", tmp_path, style="brief")
