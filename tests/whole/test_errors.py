"""Mistakes: one line with the problem and one with a hint, and no partial files."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.hub.datasets import photo
from tests.whole.conftest import SYNTH, Run, read_failure


def test_folder_name_that_is_not_utf8_is_refused_before_any_request(synth: Run, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / odd).mkdir()
    (tmp_path / odd / "a.png").write_bytes(photo(1))
    tiny = ("--engine", "embedded", "--model", "tiny")
    error, _ = read_failure(synth("generate", "--source", f"folder:{odd}", *tiny))
    assert "the path is not UTF-8: rename it" in error
    error, _ = read_failure(synth("generate", "--source", "scenes", "--limit", "1", "--out", odd, *tiny))
    assert r"the name of the folder caf\xe9 is not UTF-8" in error
    error, _ = read_failure(synth("report", odd))
    assert r"the name of the folder caf\xe9 is not UTF-8" in error


def test_unwritable_output_gives_one_error(tmp_path: Path) -> None:
    command = f"{SYNTH} doctor --sources > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    error = "cannot write to standard output: No space left on device"
    assert error in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "prepare", "problem", "advice"),
    [
        ("size=200k", "true", "the disk is full", "free some space"),
        ("size=1m", "mkdir disk/d && mount -o remount,ro disk", "read-only", "--out"),
    ],
)
def test_full_or_read_only_disk_is_an_error_with_hint(
    options: str, prepare: str, problem: str, advice: str, tmp_path: Path
) -> None:
    """Run synth in a new mount namespace, with a small file system on `disk`."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs disk && {prepare}"
    generate = f"{SYNTH} generate --source scenes --limit 300 --tasks caption --out disk/d"
    script = f"{mount} && {generate}; code=$?; ls -A disk/*; exit $code"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    error, hint = read_failure(done)
    assert problem in error and advice in hint and ".tmp" not in done.stdout
