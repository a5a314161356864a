"""Prompts: one shared system text, one task line at the end, and a name that changes with the words."""

import pytest
from jinja2 import UndefinedError

from pipeline.generate import prompt
from pipeline.generate.prompt import prompt_id, render, template

CASES = [("caption", {"style": "brief"}), ("caption", {"style": "detailed"}), ("qa", {}), ("answer", {"question": "Why?"})]
LAST = ["Task: caption, brief", "Task: caption, detailed", "Task: qa", "Question: Why?"]


@pytest.mark.parametrize(("case", "last"), list(zip(CASES, LAST, strict=True)))
def test_a_prompt_ends_with_its_task_line(case: tuple[str, dict[str, str]], last: str) -> None:
    task, values = case
    assert render(task, **values).text.splitlines()[-1] == last


def test_all_tasks_share_the_system_text_so_that_a_server_can_reuse_it() -> None:
    assert {render(task, **values).system for task, values in CASES} == {template("system/v1").strip()}


def test_the_image_stands_between_the_system_text_and_the_task() -> None:
    system, user = render("qa").messages()
    assert system["role"] == "system"
    assert [part["type"] for part in user["content"]] == ["image", "text"]


def test_a_value_that_is_missing_is_an_error_and_not_an_empty_word() -> None:
    with pytest.raises(UndefinedError):
        render("answer")


def test_the_id_changes_with_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {task: prompt_id(task) for task in ("caption", "qa")}
    original = template
    monkeypatch.setattr(prompt, "template", lambda name: original(name) + (" now" if name == "qa/v1" else ""))
    assert prompt_id("qa") != before["qa"]
    assert prompt_id("caption") == before["caption"]
