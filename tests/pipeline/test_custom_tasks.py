"""Custom tasks in settings: files are read completely, and mistakes are reported before any request."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.errors import ConfigError
from pipeline.inference.request_checks import check_requests
from pipeline.inference.requests import build_requests, find_skipped
from pipeline.types import SourceTexts
from tests.plans import request_plan

TEXT = {"name": "t", "kind": "text", "prompt": "Look."}


def need(name: str, *needs: str) -> dict[str, Any]:
    prompt = " ".join(f"{{{{ results.{other} }}}}" for other in needs) or "Look."
    return {"name": name, "kind": "text", "prompt": prompt, "needs": list(needs)}


def test_settings_include_texts_of_files_named_in_a_task_file(tmp_path: Path) -> None:
    (tmp_path / "a.j2").write_text("Say it.")
    schema = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "string"}}}
    (tmp_path / "a.json").write_text(json.dumps(schema))
    (tmp_path / "a.yaml").write_text("{name: a, kind: text, prompt: a.j2, output: a.json, field: z}")
    config = resolve(source="folder:x", custom_tasks=[tmp_path / "a.yaml"])
    (task,) = config.custom_tasks
    assert task.prompt == "Say it." and config.tasks == ("a",)
    # A model writes fields in the order of the schema.
    assert [*config.model_dump()["custom_tasks"][0]["output"]["properties"]] == ["z", "a"]
    assert resolve(**config.model_dump(mode="json")) == config


def test_custom_tasks_are_added_to_named_tasks() -> None:
    config = resolve(source="folder:x", custom_tasks=[TEXT], tasks=["qa"])
    assert config.tasks == ("qa", "t") and request_plan(config).pairs == (("qa", ""), ("t", ""))
    own = TEXT | {"name": "alt_text", "kind": "caption"}
    assert request_plan(resolve(source="folder:x", custom_tasks=[own])).pairs == (("alt_text", "alt-text"),)


def test_task_is_asked_one_round_after_the_tasks_it_needs() -> None:
    tasks = [need("c", "b", "brief"), need("b", "a"), need("a")]
    config = resolve(source="folder:x", custom_tasks=tasks, tasks=["caption"])
    plan = request_plan(config)
    rounds = [sorted(name for name, _ in part) for part in plan.rounds]
    assert rounds == [["a", "caption", "caption"], ["b"], ["c"]]
    check_requests(plan, config.verify)
    config = resolve(source="folder:x", custom_tasks=[need("b", "a") | {"prompt": "Look."}, need("a")])
    with pytest.raises(ConfigError, match="the task b needs a, which its prompt does not use"):
        check_requests(request_plan(config), config.verify)


def test_tasks_that_filter_images_are_asked_first_and_conditional_tasks_last() -> None:
    kind = TEXT | {"name": "kind", "keep_if": "results.kind != 'blank'"}
    late = TEXT | {"name": "late", "when": "'a' in results.brief"}
    when = {"qa": "results.detailed is not null"}
    verify = {"checks": ["claims"], "when": {"claims": "scores.logprob_mean < -1"}}
    asked: dict[str, Any] = {"custom_tasks": [late, kind], "tasks": ["caption", "qa"], "verify": verify}
    config = resolve(source="folder:x", generate={"when": when, "logprobs": True}, **asked)
    plan = request_plan(config)
    rounds = [[*dict.fromkeys(name for name, _ in part)] for part in plan.rounds]
    assert rounds == [["kind"], ["caption"], ["qa", "late"]]
    assert plan.needed == {"kind", "brief", "detailed"}
    check_requests(plan, config.verify)
    assert resolve(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("section", "when", "complaint"),
    [
        ("generate", {"qq": "true"}, "generate.when has qq, which is not a built-in task"),
        ("generate", {"t": "true"}, "generate.when has t, which is not a built-in task"),
        ("generate", {"brief": "row.w > 1"}, "generate.when of brief, character 1: unknown name row.w"),
        ("generate", {"brief": "results.brief != 'a'"}, "circular dependency between tasks: caption"),
        ("verify", {"covers": "true"}, "verify.when has covers, which is not a check of this run"),
        ("verify", {"claims": "scores.logprob_mean < -1"}, "unknown name scores.logprob_mean"),
        ("verify", {"claims": "scores.precision < 1"}, "unknown name scores.precision"),
        ("verify", {"round_trip": "scores.agreement < 1"}, "unknown name scores.agreement"),
        ("verify", {"judge": "scores.precision < 1 and results.brief == 1"}, "a text and a number cannot"),
    ],
)
def test_invalid_condition_in_settings_is_refused(section: str, when: dict[str, str], complaint: str) -> None:
    verify: dict[str, Any] = {"checks": ["round_trip", "claims"], "judge": "m@http://h/v1"}
    sections: dict[str, Any] = {"verify": verify, "generate": {}}
    sections[section] = sections[section] | {"when": when}
    config = resolve(source="folder:x", custom_tasks=[TEXT], tasks=["caption", "qa"], **sections)
    with pytest.raises(ConfigError) as raised:
        check_requests(request_plan(config), config.verify)
    assert complaint in str(raised.value) and raised.value.hint


def test_context_column_with_the_name_of_the_image_size_is_refused() -> None:
    config = resolve(source="folder:x", tasks=["caption"], columns={"context": "width_px"})
    with pytest.raises(ConfigError, match="cannot be named width_px") as raised:
        check_requests(request_plan(config), config.verify)
    assert "rename the column" in str(raised.value.hint)


def test_image_with_human_texts_is_asked_only_for_results_that_other_tasks_read() -> None:
    late = TEXT | {"name": "late", "when": "'a' in results.brief"}
    tasks: dict[str, Any] = {"custom_tasks": [late], "tasks": ["caption", "qa"]}
    plan = request_plan(resolve(source="folder:x", **tasks, human_texts="fill"))
    inputs = SourceTexts((), has_captions=True, has_questions=True)
    skipped = find_skipped(plan, inputs, {}, plan.rounds[0])
    assert skipped == dict.fromkeys((("caption", "detailed"), ("qa", "")), "has_human_text")
    assert not find_skipped(plan, SourceTexts(), {}, plan.rounds[0])


def text_task(prompt: str, **keys: Any) -> str:
    return json.dumps({"name": "t", "kind": "text", "prompt": prompt} | keys)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{name: t, kind: text}", "prompt is missing"),
        ("{name: t, kind: poem, prompt: a}", "bad value for kind: Input should be 'caption', "),
        ("{name: t, kind: text, prompt: a, min_word: 3}", "unknown config key: min_word"),
        ("{name: T, kind: text, prompt: a}", "'T' is not a name in lower case"),
        ("{name: t, kind: labels, prompt: a, labels: [yes, no]}", "put a string in quotes"),
        ("{name: t, kind: text, prompt: a, language: xx}", "this language cannot be detected"),
        ("[1]", "must contain keys and values"),
        (text_task("lost.j2"), "lost.j2"),
        (text_task("{{ row.title }}"), "uses row.title, which is not a context column"),
        (text_task("{{ results.ocr }}"), "uses results.ocr, which is not in `needs` of its task"),
        ("{name: t, kind: text, prompt: a, needs: [ocr]}", "t needs ocr, which this run does not have"),
        ("{name: t, kind: text, prompt: a, needs: [t]}", "circular dependency between tasks: t"),
        (text_task("a", when="results.u == 'x'"), "of the task t, character 1: unknown name results.u"),
        (text_task("a", when="'a' == )"), "`when` of the task t, character 8: unmatched ')'"),
        (text_task("a", when="results.t == 'x'"), "circular dependency between tasks: t"),
        (text_task("a", keep_if="results.plain == 'x'"), "`keep_if` of the task t, character 1: unknown"),
        (text_task("a", keep_if="results.t == 'x'", when="results.plain == 'x'"), "`when` of the task t, "),
        (text_task("a", keep_if="true", needs=["t"]), "tasks with `keep_if` are asked first"),
        (text_task("{{ row }}"), "cannot be rendered: `row` and `results` are not texts"),
        (text_task("{{ [1, 2] | random }}"), "the prompt t cannot be rendered: No filter named 'random'"),
        (text_task("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), "maximum recursion depth"),
        ("{name: alt_x, kind: caption, prompt: a}", "is the name of a built-in task or of a caption style"),
        (text_task("{{ nothing }}"), "cannot be rendered: 'nothing' is undefined"),
        (text_task("{% if %}"), "the prompt t is not a valid template"),
        ("{name: qa, kind: question, prompt: a}", "`qa` is the name of a built-in task"),
        ("{name: t, kind: text, prompt: a, show_image: false}", "the task t has no input"),
        ("{name: t, kind: record, prompt: a, output: 'no_module:X'}", "neither a JSON schema nor"),
    ],
)
def test_invalid_task_is_refused_with_hint(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        styles = {"caption_styles": ["plain", "alt-x"]}
        config = resolve(source="folder:x", custom_tasks=[tmp_path / "t.yaml"], generate=styles)
        check_requests(request_plan(config), config.verify)
    assert complaint in str(raised.value) and raised.value.hint


def test_two_tasks_with_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two custom tasks have the name t"):
        resolve(source="folder:x", custom_tasks=[TEXT, TEXT])


def test_prompt_contains_language_of_its_task() -> None:
    for language, words in (("de", "German"), ("any", ""), (None, "French")):
        task = TEXT | {"prompt": "Write in [{{ language }}].", "language": language}
        config = resolve(source="folder:x", custom_tasks=[task], filter={"language": "fr"})
        (request,) = build_requests("0" * 64, request_plan(config))
        assert request.text.startswith(f"Write in [{words}].")


def test_task_file_given_as_option_replaces_task_of_same_name_in_settings(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("{name: t, kind: text, prompt: New.}")
    settings = {"source": "folder:x", "custom_tasks": [TEXT, need("u")]}
    (tmp_path / "synth.yaml").write_text(json.dumps(settings))
    config = resolve(tmp_path / "synth.yaml", custom_tasks=[tmp_path / "t.yaml"])
    assert {task.name: task.prompt for task in config.custom_tasks} == {"t": "New.", "u": "Look."}
