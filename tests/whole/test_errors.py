"""Mistakes: one line with the problem and one with a hint, and no partial files."""

import os
import subprocess
from pathlib import Path

from tests.commands import Done
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


def test_unwritable_output_is_one_error(tmp_path: Path) -> None:
    command = f"{SYNTH} doctor --sources > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "cannot write to standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def run_on_mount(tmp_path: Path, options: str, prepare: str, arguments: str) -> Done:
    """Run synth in a new mount namespace, with a small file system on `disk`."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o {options} tmpfs disk && {prepare}"
    script = f"{mount} && {SYNTH} {arguments}; code=$?; ls -A disk/*; exit $code"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)


def test_full_disk_is_an_error_without_partial_files(tmp_path: Path) -> None:
    generate = "generate --source scenes --limit 300 --tasks caption --out disk/d"
    done = run_on_mount(tmp_path, "size=200k", "true", generate)
    error, hint = read_failure(done)
    assert "the disk is full" in error
    assert "free some space" in hint
    assert ".tmp" not in done.stdout


def test_read_only_folder_is_an_error(tmp_path: Path) -> None:
    prepare = "mkdir disk/d && mount -o remount,ro disk"
    done = run_on_mount(tmp_path, "size=1m", prepare, "generate --source scenes --out disk/d")
    error, hint = read_failure(done)
    assert "read-only" in error
    assert "--out" in hint
