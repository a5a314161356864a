"""A user's mistake gives one line with the problem and one with a hint, and leaves nothing half-written."""

import json
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ConfigError
from pipeline.run import refuse_other_settings
from tests.hub.datasets import photo
from tests.whole.conftest import SYNTH, Run, read_failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--source", "moon"], "unknown source: moon"),
        (["generate"], "no source given"),
        (["generate", "--source", "folder:nowhere"], "not a folder: nowhere"),
        (["generate", "--source", "folder:empty"], "no image in empty"),
        (["generate", "--source", "scenes", "--split", "train"], "source scenes has no splits"),
        (["generate", "--source", "scenes", "--config", "bad.yaml"], "unknown config key: colour"),
        (["generate", "--source", "scenes", "--tasks", "poem"], "unknown task: poem"),
        (["generate", "--source", "scenes", "--engine", "warp"], "bad value for engine"),
        (
            ["generate", "--source", "scenes", "--config", "sonnet.yaml"],
            "cannot be rendered with style 'sonnet'",
        ),
        (["generate", "--source", "scenes", "--base-url", "http://127.0.0.1:9/v1"], "no server answers"),
        (["generate", "--source", "scenes", "--base-url", "127.0.0.1:9"], "bad value for base_url"),
        (["generate", "--source", "scenes", "--engine", "vllm", "--dry-run"], "vLLM is not installed here"),
        (["serve", "--model", "tiny"], "vLLM is not installed here"),
        (["generate", "--source", "scenes", "--from-stage", "bake"], "unknown stage: bake"),
        (["generate", "--source", "scenes", "--from-stage", "dedupe"], "is missing"),
        (["generate", "--source", "scenes", "--model", "empty"], "cannot load empty"),
        (
            ["generate", "--source", "folder:pictures", "--model", "tiny"],
            "the tiny teacher knows drawn scenes and nothing else",
        ),
        (["push", "--repo", "me/x"], "no dataset under data/"),
        (["push", "nowhere", "--repo", "me/x"], "no dataset at nowhere"),
        (["train"], "no dataset under data/"),
        (["train", "--encoder", "huge"], "no dataset under data/"),
        (["evaluate", "nowhere"], "no captioner in nowhere"),
        (["caption", "nowhere", "a.png"], "no captioner in nowhere"),
        (["report", "nowhere"], "no dataset at nowhere"),
        (["review", "apply", "a.jsonl"], "no dataset under data/"),
        (["review", "apply", "a.jsonl", "--data", "empty"], "is not a folder that synth generate has written"),
        (["versions"], "no dataset under data/"),
        (["versions", "nowhere"], "no dataset at nowhere"),
        (["generate", "--source", "folder:pictures"], "the Hub at https://huggingface.co does not answer, and Qwen/"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_a_hint(synth: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "bad.yaml").write_text("colour: red\n")
    (tmp_path / "sonnet.yaml").write_text("generate: {caption_styles: [sonnet]}\n")
    error, _ = read_failure(synth(*arguments))
    assert message in error
    assert not list(tmp_path.glob("**/versions/v*"))


@pytest.mark.parametrize(
    "arguments", [["bake"], ["generate", "--colour"], ["generate", "--limit", "0"], ["push"], ["generate", "scenes"]]
)
def test_an_unknown_command_option_or_value_exits_with_2(synth: Run, arguments: list[str]) -> None:
    assert synth(*arguments).returncode == 2


def test_another_source_in_the_same_folder_is_refused(synth: Run, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.json").write_text('{"source": "folder:x"}')
    error, _ = read_failure(synth("generate", "--source", "scenes", "--out", "d"))
    assert "holds data from folder:x, not scenes" in error


@pytest.mark.parametrize(
    ("before", "now", "is_same"),
    [
        ("folder:photos", "folder:./photos/", True),
        ("folder:photos", "folder:{here}/photos", True),
        ("folder:photos", "folder:../{name}/photos", True),
        ("folder:photos", "folder:other", False),
        ("folder:photos", "archive:photos", False),
        ("scenes", "decks", False),
        ("parquet:s3://a/b", "parquet:s3://a/./b", False),
    ],
)
def test_a_folder_that_is_spelled_in_another_way_is_the_same_source(
    before: str, now: str, *, is_same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(source=now.format(here=tmp_path, name=tmp_path.name))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.json").write_text(json.dumps({"source": before}))
    with (
        nullcontext() if is_same else pytest.raises(ConfigError, match=f"name it as before: --source {before}|holds data from")
    ):
        refuse_other_settings(DatasetDir(tmp_path / "d"), config, "source")


def test_folders_whose_names_are_no_utf_8_are_refused_before_anything_is_asked(synth: Run, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / odd).mkdir()
    (tmp_path / odd / "a.png").write_bytes(photo(1))
    tiny = ("--engine", "embedded", "--model", "tiny")
    error, _ = read_failure(synth("generate", "--source", f"folder:{odd}", *tiny))
    assert "a path that is no UTF-8 cannot be kept: rename it" in error
    error, _ = read_failure(synth("generate", "--source", "scenes", "--limit", "1", "--out", odd, *tiny))
    assert r"the name of the folder caf\xe9 is no UTF-8" in error
    error, _ = read_failure(synth("report", odd))
    assert r"the name of the folder caf\xe9 is no UTF-8" in error


@pytest.mark.parametrize("name", ["run:1/d", "what?/d", "12:30", "file:x"])
def test_a_dataset_may_have_a_name_that_looks_like_an_address(synth: Run, tmp_path: Path, name: str) -> None:
    options = ("--source", "scenes", "--limit", "3", "--engine", "embedded", "--model", "tiny", "--out", name)
    for command in (("generate", *options), ("report", name), ("check", name), ("versions", name), ("diff", name, name)):
        done = synth(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(DatasetDir(tmp_path / name).versions()) == 1


def test_an_output_that_takes_nothing_is_one_error(tmp_path: Path) -> None:
    command = f"{SYNTH} sources > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot write to the standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def run_on_mount(tmp_path: Path, options: str, prepare: str, arguments: str) -> subprocess.CompletedProcess[str]:
    """Run synth in a new mount namespace, with a small file system on `disk`."""
    (tmp_path / "disk").mkdir()
    script = f"mount -t tmpfs -o {options} tmpfs disk && {prepare} && {SYNTH} {arguments}; code=$?; ls -A disk/*; exit $code"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("size", ["64k", "400k"])
def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(tmp_path: Path, size: str) -> None:
    done = run_on_mount(tmp_path, f"size={size}", "true", "generate --source scenes --limit 300 --tasks caption --out disk/d")
    error, hint = read_failure(done)
    assert "the disk is full" in error
    assert "free some space" in hint
    assert ".tmp" not in done.stdout


def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    done = run_on_mount(
        tmp_path, "size=1m", "mkdir disk/d && mount -o remount,ro disk", "generate --source scenes --out disk/d"
    )
    error, hint = read_failure(done)
    assert "read-only" in error
    assert "--out" in hint


def test_a_file_in_the_place_of_the_folder_is_an_error(synth: Run, tmp_path: Path) -> None:
    (tmp_path / "d").write_text("")
    error, _ = read_failure(synth("generate", "--source", "scenes", "--out", "d"))
    assert "a file is where a folder should be" in error
