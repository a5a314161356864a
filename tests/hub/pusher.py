"""Push with the real client in processes that can be killed.

The client reads the address of the Hub at import, so one process imports it and forks for each push.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.dataset.version import Version
from tests.hub.app import TOKEN
from tests.hub.server import RunningHub

PARENT = """
import json, os, sys, traceback
from pathlib import Path
from pipeline.errors import SynthError
from pipeline.dataset.version import read_version
from pipeline.hub.package import build_package
from pipeline.hub.push import push_package

if os.environ.get("HASTY"):
    import time
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.02))

def push(version, repo, images=None, acknowledged=(), private=False, stated=None):
    options = {"images": images, "acknowledged": acknowledged, "stated": stated}
    with build_package(read_version(Path(version)), repo, **options) as package:
        pushed = push_package(package, repo, private=private)
    fields = ("commit", "tag", "is_new", "url", "repo", "warning")
    return {name: getattr(pushed, name) for name in fields}

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps(push(**json.loads(line))), flush=True)
        except SynthError as error:
            print(json.dumps({"error": str(error), "hint": error.hint}), flush=True)
        except BaseException:
            print(json.dumps({"crash": traceback.format_exc()}), flush=True)
        os._exit(0)
    print(json.dumps({"pid": child}), flush=True)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"status": status}), flush=True)
"""


@dataclass
class Pusher:
    """A client of one Hub. `pid` is the process of the running push."""

    hub: RunningHub
    home: Path
    xet: bool = False
    token: str = TOKEN
    debug: bool = False
    hasty: bool = False  # shorten the waits between retries
    pid: int = 0

    def __enter__(self) -> "Pusher":
        env = self.hub.env(self.home, xet=self.xet) | {"HF_TOKEN": self.token} | ({"HF_DEBUG": "1"} if self.debug else {})
        env |= {"HASTY": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"} if self.hasty else {}
        self.log = (self.home.parent / f"{self.home.name}.stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def push(self, version: Version | Path, repo: str = "me/scenes", **options: Any) -> dict[str, Any]:
        """Push and return commit and tag, an error with its hint, or {} if the process was killed."""
        self.start(version, repo, **options)
        return self.finish()

    def start(self, version: Version | Path, repo: str = "me/scenes", **options: Any) -> None:
        """Start a push. `finish` returns its result."""
        assert self.process.stdin
        assert self.process.stdout
        path = version.path if isinstance(version, Version) else version
        self.process.stdin.write(json.dumps({"version": str(path), "repo": repo, **options}) + "\n")
        self.process.stdin.flush()
        self.answers: dict[str, Any] = {}
        while "pid" not in self.answers:
            self.answers |= json.loads(self.process.stdout.readline())
        self.pid = self.answers.pop("pid")

    def finish(self) -> dict[str, Any]:
        """Wait for the started push and return its result."""
        assert self.process.stdout
        while "status" not in self.answers:
            self.answers |= json.loads(self.process.stdout.readline())
        del self.answers["status"]
        assert "crash" not in self.answers, self.answers["crash"]
        return self.answers

    def kill(self) -> None:
        os.kill(self.pid, 9)
