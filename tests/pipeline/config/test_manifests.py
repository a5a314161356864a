"""A manifest of a stranger decides its rows, and nothing about where and how."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config.files import MANIFEST_KEYS, OWN_KEYS, PUBLIC_SOURCE, resolve
from pipeline.errors import ConfigError


def test_a_manifest_of_a_stranger_cannot_name_a_server(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    for key, value in (("base_url", ["http://evil.example/v1"]), ("server", {"flags": ["--trust-remote-code"]})):
        file.write_text(json.dumps({"version": "v1.0.0", "config": {"source": "scenes", key: value}}))
        with pytest.raises(ConfigError, match=f"names {key}"):
            resolve(file)
    file.write_text(json.dumps({"version": "v1.0.0", "config": {"source": "scenes", "limit": 3}}))
    assert resolve(file).limit == 3


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


def test_a_manifest_gives_the_settings_that_decide_its_rows(tmp_path: Path) -> None:
    given = {"seed": 7, "exclude": ["flickr30k#test"], "generate": {"max_attempts": 2}, "engine": "embedded"}
    config = resolve(manifest_with(tmp_path, **given))
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


def test_a_model_of_a_manifest_that_is_a_path_here_is_given_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert resolve(manifest_with(tmp_path, model="me/model")).model == "me/model"
    monkeypatch.chdir(tmp_path)
    assert resolve(manifest_with(tmp_path, model="me/model")).model == resolve(manifest_with(tmp_path)).model


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"generate": {"prompt_dir": "prompts"}}, "generate.prompt_dir"),
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


def test_settings_that_only_look_like_a_manifest_are_not_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"source": "scenes", "base_url": ["http://evil.example/v1"]}))
    with pytest.raises(ConfigError, match="is not a manifest of a version"):
        resolve(file)


def test_each_setting_is_taken_from_a_manifest_or_is_the_users_own() -> None:
    assert not MANIFEST_KEYS & OWN_KEYS
    assert {*Config.model_fields} == MANIFEST_KEYS | OWN_KEYS


@pytest.mark.parametrize(("name", "is_public"), [("folder:x", False), ("list", False), ("listing", True), ("folders", True)])
def test_only_whole_names_of_local_sources_are_local(name: str, *, is_public: bool) -> None:
    assert bool(PUBLIC_SOURCE.fullmatch(name)) == is_public
