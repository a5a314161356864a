"""Push with the real client in processes that can be killed."""

import atexit
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset.version import Version
from tests.hub.server import RunningHub

PARENT = """
import importlib, json, os, sys, time, traceback
from pathlib import Path
# imported before the forks, because pyarrow and the client import them late
import _strptime, pandas, pyarrow.dataset, pyarrow.pandas_compat, stringprep, tarfile
import huggingface_hub.constants
from huggingface_hub.utils import logging
from pipeline.errors import SynthError
from pipeline.dataset.card import _template
from pipeline.dataset.version import read_version
from pipeline.hub.package import build_package
from pipeline.hub.push import push_package

def push(version, repo, images=None, acknowledged=(), private=False, stated=None):
    options = {"images": images, "acknowledged": acknowledged, "stated": stated}
    with build_package(read_version(Path(version)), repo, **options) as package:
        pushed = push_package(package, repo, private=private)
    fields = ("commit", "tag", "is_new", "url", "repo", "warning")
    return {name: getattr(pushed, name) for name in fields}

def prepare(env, log, hasty):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.clear()
    os.environ.update(env)
    importlib.reload(huggingface_hub.constants)
    if "HF_DEBUG" in env:
        logging.set_verbosity_debug()
    if hasty:
        wait = time.sleep
        time.sleep = lambda seconds: wait(min(seconds, 0.02))

_template("dataset.md.j2")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            process, options = json.loads(line)
            prepare(**process)
            print(json.dumps(push(**options)), flush=True)
        except SynthError as error:
            print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
        except BaseException:
            print(json.dumps({"crash": traceback.format_exc()}), flush=True)
        os._exit(0)
    print(json.dumps({"pid": child}), flush=True)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"status": status}), flush=True)
"""
_idle: list["subprocess.Popen[str]"] = []


@atexit.register
def _end_idle() -> None:
    for process in _idle:
        process.communicate()


@dataclass
class Pusher:
    """A client of one Hub. `pid` is the process of the running push."""

    hub: RunningHub
    home: Path
    debug: bool = False
    hasty: bool = False  # shorten the waits between retries
    pid: int = 0

    def __enter__(self) -> "Pusher":
        env = self.hub.env(self.home) | ({"HF_DEBUG": "1"} if self.debug else {})
        log = self.home.with_name(f"{self.home.name}.stderr")
        self._settings = {"env": env, "log": str(log.absolute()), "hasty": self.hasty}
        self._process = _idle.pop() if _idle else _start_parent(env)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            _idle.append(self._process)
        else:
            self._process.kill()

    def push(self, version: Version | Path, repo: str = "me/scenes", **options: Any) -> dict[str, Any]:
        """Push, and return the commit and tag, or the error. A killed process returns {}."""
        assert self._process.stdin
        path = version.path if isinstance(version, Version) else version
        request = [self._settings, {"version": str(path), "repo": repo, **options}]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.answers: dict[str, Any] = {}
        self._read_until("pid")
        self.pid = self.answers.pop("pid")
        self._read_until("status")
        del self.answers["status"]
        assert "crash" not in self.answers, self.answers["crash"]
        return self.answers

    def kill(self) -> None:
        os.kill(self.pid, 9)

    def _read_until(self, key: str) -> None:
        assert self._process.stdout
        while key not in self.answers:
            self.answers |= json.loads(self._process.stdout.readline())


def _start_parent(env: dict[str, str]) -> "subprocess.Popen[str]":
    """Start a process that imports the client, and exits when its stdin is closed."""
    command = [sys.executable, "-c", PARENT]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
