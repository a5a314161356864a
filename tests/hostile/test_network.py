"""Network: in a namespace where every internal address answers, no URL of a stranger reaches one."""

import json
import shutil
import subprocess
import sys

import pytest


def in_a_namespace(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a network namespace of its own, which holds loopback alone."""
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is on every Linux"
    for options in (("--net",), ("--net", "--map-root-user")):
        done = subprocess.run([unshare, *options, *command], capture_output=True, text=True, timeout=600)
        if "unshare" not in done.stderr:
            return done
    pytest.skip(f"NOT RUN: this machine lets nobody make a network namespace: {done.stderr.strip()}")


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: network namespaces are of Linux")
def test_no_url_reaches_an_internal_address() -> None:
    done = in_a_namespace(sys.executable, "-m", "tests.hostile.namespace")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["came"] == []
    assert set(result["reasons"].values()) <= {"url_refused", "url_unreachable"}, result["reasons"]
    assert len(result["reasons"]) >= 39
    assert result["asked"]["rebinds.example"] == 1  # resolved once: there is no second answer to lie with
