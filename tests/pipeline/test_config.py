"""Config: flags override the file, the file overrides defaults, and unknown keys are errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, current_settings, read_task, read_yaml, resolve
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


def test_keys_of_earlier_releases_are_read_under_their_new_names(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "never: [flickr30k]\ngenerate: {attempts: 2}\nverify: {clip: tiny-clip, max_luck: 0.2}\nserver: {restarts: 1}\n"
    )
    config = resolve(tmp_path / "old.yaml", source="scenes", verify={"checks": ["blind"]})
    assert (config.exclude, config.generate.max_attempts, config.server.max_restarts) == (("flickr30k",), 2, 1)
    assert config.verify.model_dump(include={"checks", "clip_model", "max_answer_frequency"}) == {
        "checks": ("blind",),
        "clip_model": "tiny-clip",
        "max_answer_frequency": 0.2,
    }
    assert resolve(tmp_path / "old.yaml", source="scenes", exclude=["vqav2"]).exclude == ("vqav2",)
    old = {"never": [], "verify": {"max_luck": 0.1}, "balance": {"tail_share": None}}
    assert current_settings(old) == {"exclude": [], "verify": {"max_answer_frequency": 0.1}, "balance": {"tail_frac": None}}


def test_a_manifest_of_a_stranger_cannot_name_a_server(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    for key, value in (("base_url", ["http://evil.example/v1"]), ("server", {"flags": ["--trust-remote-code"]})):
        file.write_text(json.dumps({"version": "v1.0.0", "config": {"source": "scenes", key: value}}))
        with pytest.raises(ConfigError, match=f"names {key}"):
            resolve(file)
    file.write_text(json.dumps({"version": "v1.0.0", "config": {"source": "scenes", "limit": 3}}))
    assert resolve(file).limit == 3


def test_a_section_without_a_line_is_that_of_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("source: scenes\nfilter:\n#  language: de\n")
    assert resolve(file) == Config(source="scenes")
    file.write_text("config: foo\nversion: 1\n")
    with pytest.raises(ConfigError, match="unknown config key: config"):
        resolve(file)


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


def manifest_with(tmp_path: Path, **settings: Any) -> Path:
    file = tmp_path / "manifest.json"
    values = {"source": "scenes", "limit": 2, "tasks": ["caption"]} | settings
    file.write_text(json.dumps({"version": "v1.0.0", "config": values}))
    return file


def test_a_manifest_of_a_stranger_cannot_name_the_server_of_a_judge(tmp_path: Path) -> None:
    for judge, accepted in (("x@http://evil.example/v1", False), ("org/x@https://evil.example/v1", False), ("org/x", True)):
        file = tmp_path / "manifest.json"
        settings = {"source": "scenes", "verify": {"judge": judge}}
        file.write_text(json.dumps({"version": "v1.0.0", "config": settings}))
        if accepted:
            assert resolve(file).verify.judge == judge  # whose server has to be named here
        else:
            with pytest.raises(ConfigError, match="judge's server"):
                resolve(file)


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


def test_a_manifest_gives_the_settings_that_decide_its_rows(tmp_path: Path) -> None:
    config = resolve(manifest_with(tmp_path, seed=7, never=["flickr30k#test"], generate={"attempts": 2}, engine="embedded"))
    assert (config.seed, config.exclude, config.generate.max_attempts, config.engine) == (7, ("flickr30k#test",), 2, "embedded")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("allow_urls", True),
        ("follow_links", True),
        ("license", "cc0-1.0"),
        ("title", "Not mine"),
        ("model", "../evil"),
        ("model", "/tmp/evil"),
        ("model", "https://evil.example/model"),
        ("exclude", ["folder:/etc", "archive:a/b", "list:a/b", "parquet:https://evil.example/x", "hub:../../etc"]),
        ("verify", {"checks": ["alignment"], "clip_model": "/tmp/evil"}),
        ("evil", {"deep": 1}),
    ],
)
def test_a_manifest_of_a_stranger_decides_nothing_about_where_and_how(key: str, value: Any, tmp_path: Path) -> None:
    config = resolve(manifest_with(tmp_path, **{key: value}))
    plain = resolve(manifest_with(tmp_path))
    assert config.model_dump(exclude={"verify"}) == plain.model_dump(exclude={"verify"})
    assert config.verify.clip_model == "auto"


@pytest.mark.parametrize(
    "source",
    [
        "folder:/etc",
        "folder",
        "archive:a/b",
        "list:a/b",
        "parquet:https://evil.example/x.parquet",
        "hub:../../etc",
        "file:///etc",
        "hub:s3://b/c",
    ],
)
def test_a_manifest_of_a_stranger_names_no_place(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no source given"):
        resolve(manifest_with(tmp_path, source=source))
    assert resolve(manifest_with(tmp_path, source=source), source="folder:photos").source == "folder:photos"


@pytest.mark.parametrize("source", ["scenes", "flickr30k", "hub:me/photos", "hub:me/photos@main", "flickr30k:me/copy"])
def test_public_sources_of_a_manifest_are_taken(source: str, tmp_path: Path) -> None:
    assert resolve(manifest_with(tmp_path, source=source)).source == source


@pytest.mark.parametrize("kept", [{"model": "tiny"}, {"model": None}, {}])
def test_a_folder_with_the_name_of_the_tiny_model_changes_nothing(
    kept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(manifest_with(tmp_path, **kept)).model == resolve(source="scenes", **kept).model


def test_a_model_of_a_manifest_that_is_a_path_here_is_given_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert resolve(manifest_with(tmp_path, model="me/model")).model == "me/model"
    monkeypatch.chdir(tmp_path)
    assert resolve(manifest_with(tmp_path, model="me/model")).model == resolve(manifest_with(tmp_path)).model


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"generate": {"prompt_dir": "prompts"}}, "generate.prompt_dir"),
        ({"generate": {"prompts": "prompts"}}, "generate.prompt_dir"),
        ({"balance": {"entries": "d" * 64}}, "balance.entries"),
        ({"split_list": "d" * 64}, "split_list"),
    ],
)
def test_files_that_rows_depended_on_are_asked_for(settings: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"a file of its maker: {key}"):
        resolve(manifest_with(tmp_path, **settings))


@pytest.mark.parametrize("odd", [[1], "x", 3])
def test_a_section_of_a_manifest_that_is_none_is_one_error(odd: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bad value for generate"):
        resolve(manifest_with(tmp_path, generate=odd))


def test_a_manifest_of_an_earlier_release_means_its_prompts(tmp_path: Path) -> None:
    generate = resolve(manifest_with(tmp_path, generate={"max_tokens": 99})).generate
    assert (generate.prompt_version, generate.max_tokens, "prompt_version" in generate.model_fields_set) == (1, 99, True)
    assert resolve(manifest_with(tmp_path, generate={"prompt_version": 2})).generate.prompt_version == 2


def test_settings_that_only_look_like_a_manifest_are_not_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"source": "scenes", "base_url": ["http://evil.example/v1"]}))
    with pytest.raises(ConfigError, match="is not a manifest of a version"):
        resolve(file)


def test_a_split_list_that_is_named_again_is_used(tmp_path: Path) -> None:
    split_list = tmp_path / "splits.json"
    assert resolve(manifest_with(tmp_path, split_list="d" * 64), split_list=split_list).split_list == split_list


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "source: scenes\nlimit: yes\n",
            "bad value for limit: True is not a number; YAML reads yes, no, on and off as true and false",
            "docs/settings.md explains limit",
        ),
        ("source: scenes\ngenerate: {max_tokens: on}\n", "generate.max_tokens: True is not a number", ""),
        ("source: scenes\nlimit: 3\nlimit: 4\n", "line 3: the key limit stands twice", ""),
        ("source: scenes\nserver: {headers: {a: b, c: d, a: e}}\n", "line 2: the key a stands twice", ""),
        ("sources: scenes\n", "unknown config key: sources", "did you mean source"),
        ("source: scenes\nfilter: {shortest: 3}\n", "unknown config key: filter.shortest", "known keys: filter."),
        (
            "source: scenes\nsplit: {validation_frac: 0.9, test_frac: 0.9}\n",
            "bad value for split",
            "docs/settings.md explains split",
        ),
        ("source: scenes\nfilter: [a]\n", "keys and values, indented below it", "known keys: filter."),
    ],
)
def test_a_slip_in_a_file_of_settings_is_named(text: str, message: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "synth.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path / "synth.yaml")
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert len(caught.value.hint) < 1000


def test_anchors_merges_and_keys_that_only_look_equal_are_read(tmp_path: Path) -> None:
    text = "b: &b {a: 1}\ns: {inner: &m {<<: *b, a: 2}}\ntop: {<<: *m}\n1: x\n'1': y\n"
    (tmp_path / "any.yaml").write_text(text)
    assert read_yaml(tmp_path / "any.yaml", "a key") == yaml.safe_load(text)


def test_a_rule_about_a_section_does_not_print_the_keys_in_it(tmp_path: Path) -> None:
    text = "source: scenes\nserver: {headers: {Authorization: Bearer sk-secret-01}, concurrency: yes, endpoints: {x: {}}}\n"
    (tmp_path / "synth.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path / "synth.yaml")
    assert "sk-secret" not in f"{caught.value} {caught.value.hint}"


def test_yes_and_no_in_a_task_of_ones_own_want_quotes(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("name: shown\nkind: labels\nlabels: [yes, no]\nprompt: Is it?\n")
    with pytest.raises(ConfigError, match="put it in quotes") as caught:
        read_task(tmp_path / "task.yaml")
    assert "docs/own-tasks.md" in caught.value.hint
