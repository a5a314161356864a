"""An untrusted manifest decides which rows a version has, and not places, servers or permissions."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.files import MANIFEST_KEYS, PUBLIC_SOURCE, resolve
from pipeline.errors import ConfigError


def manifest_with(tmp_path: Path, **settings: Any) -> Path:
    file = tmp_path / "manifest.json"
    values = {"source": "scenes", "limit": 2, "tasks": ["caption"]} | settings
    file.write_text(json.dumps({"version": "v1.0.0", "config": values}))
    return file


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"base_url": ["http://evil.example/v1"]}, "sets base_url"),
        ({"server": {"flags": ["--trust-remote-code"]}}, "sets server"),
        ({"models": {"judge": {"base_url": ["http://evil.example/v1"]}}}, "sets models: that server"),
        ({"verify": {"judge": "x@http://evil.example/v1"}}, "sets a judge: its server"),
        ({"verify": {"judge": "org/x@https://evil.example/v1"}}, "sets a judge: its server"),
        ({"generate": {"prompt_dir": "prompts"}}, "a file that does not exist here: generate.prompt_dir"),
        ({"generate": [1]}, "bad value for generate"),
        ({"generate": "x"}, "bad value for generate"),
        ({"generate": 3}, "bad value for generate"),
    ],
)
def test_manifest_with_servers_or_files_of_another_machine_is_refused(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolve(manifest_with(tmp_path, **settings))


def test_manifest_decides_rows_and_the_name_of_the_judge(tmp_path: Path) -> None:
    settings = {"seed": 7, "exclude": ["flickr30k#test"], "engine": "embedded", "verify": {"judge": "org/x"}}
    config = resolve(manifest_with(tmp_path, generate={"max_attempts": 2}, **settings))
    assert (config.seed, config.exclude, config.generate.max_attempts) == (7, ("flickr30k#test",), 2)
    assert (config.engine, config.verify.judge, config.limit) == ("embedded", "org/x", 2)


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
        (
            "exclude",
            ["folder:/etc", "archive:a/b", "list:a/b", "parquet:https://evil.example/x", "hub:../../etc"],
        ),
        ("verify", {"checks": ["alignment"], "clip_model": "/tmp/evil"}),
        ("evil", {"deep": 1}),
    ],
)
def test_permission_or_local_path_of_a_manifest_is_ignored(key: str, value: Any, tmp_path: Path) -> None:
    config = resolve(manifest_with(tmp_path, **{key: value}))
    plain = resolve(manifest_with(tmp_path))
    assert config.model_dump(exclude={"verify"}) == plain.model_dump(exclude={"verify"})
    assert config.verify.clip_model == "auto"


@pytest.mark.parametrize(
    ("source", "is_public"),
    [
        *(
            (name, True)
            for name in ("scenes", "flickr30k", "hub:me/photos", "hub:me/photos@main", "flickr30k:me/copy")
        ),
        *(
            (name, False)
            for name in ("folder", "folder:/etc", "archive:a/b", "list:a/b", "file:///etc", "hub:s3://b/c")
        ),
        *((name, False) for name in ("parquet:https://evil.example/x.parquet", "hub:../../etc")),
    ],
)
def test_manifest_names_only_public_sources(source: str, *, is_public: bool, tmp_path: Path) -> None:
    file = manifest_with(tmp_path, source=source)
    if is_public:
        assert resolve(file).source == source
        return
    with pytest.raises(ConfigError, match="no source given"):
        resolve(file)
    assert resolve(file, source="folder:photos").source == "folder:photos"


@pytest.mark.parametrize(
    ("name", "is_public"), [("folder:x", False), ("list", False), ("listing", True), ("folders", True)]
)
def test_source_is_public_only_if_its_whole_name_matches(name: str, *, is_public: bool) -> None:
    assert bool(PUBLIC_SOURCE.fullmatch(name)) == is_public


def test_model_of_a_manifest_that_is_a_local_path_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert resolve(manifest_with(tmp_path, model="me/model")).model == "me/model"
    monkeypatch.chdir(tmp_path)
    assert resolve(manifest_with(tmp_path, model="me/model")).model == resolve(manifest_with(tmp_path)).model


def test_config_json_that_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"source": "scenes", "base_url": ["http://evil.example/v1"]}))
    with pytest.raises(ConfigError, match="is not a manifest of a version"):
        resolve(file)


def test_each_setting_comes_either_from_the_manifest_or_from_the_user() -> None:
    places = {"captions", "base_url", "server", "models", "task_models"}
    assert {*Config.model_fields} - MANIFEST_KEYS == {
        "license",
        "title",
        "allow_urls",
        "follow_links",
    } | places
    assert {*Config.model_fields} > MANIFEST_KEYS


@pytest.mark.parametrize("name", ["synth.yaml", "manifest.json"])
def test_aliases_are_refused(name: str, tmp_path: Path) -> None:
    """A file of 500 bytes may repeat a list billions of times."""
    lists = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 11))
    (tmp_path / name).write_text(f"a0: &a0 [x]\n{lists}\nversion: v1.0.0\nconfig: {{tasks: *a10}}")
    with pytest.raises(ConfigError, match=r"an alias|is not JSON"):
        resolve(tmp_path / name)


@pytest.mark.parametrize("name", ["synth.yaml", "manifest.json"])
def test_deep_or_large_settings_are_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"tasks": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match="nested too deeply"):
        resolve(tmp_path / name)
    (tmp_path / name).write_text(" " * 10_000_001)
    with pytest.raises(ConfigError, match="more than 10,000,000 characters"):
        resolve(tmp_path / name)
