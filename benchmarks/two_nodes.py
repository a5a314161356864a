"""Two nodes that share no files, and what is lost with one of them: `--executor ray --out s3://...` (Linux, as root).

    python benchmarks/two_nodes.py [--images 6000] [--shards 4] [--latency 0.5]

Each node is a network and a mount namespace with an address and a `/tmp` of its own, on which a Ray node runs; both see the
installed project, and nothing that the other one writes to `/tmp`. An S3 (moto) and a mock endpoint are at a third address. The
same scenes are captioned in one process; on both nodes; on both, of which one is cut off from all others for a minute; of which
one is killed with all that it has on its disk; and on both, which are killed with the command and started anew. Digests must be
equal; what was asked twice is told.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
NET = "10.77.0"
S3, CHAT, RAY = 5557, 8932, 6380
ENV = {
    "AWS_ACCESS_KEY_ID": "k",
    "AWS_SECRET_ACCESS_KEY": "s",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://{NET}.1:{S3}",
    "HOME": "/tmp/home",
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def ip(arguments: str, *, check: bool = True) -> None:
    """Do something to the network."""
    subprocess.run(["ip", *arguments.split()], check=check, capture_output=not check)


@contextmanager
def network() -> Iterator[None]:
    """Lay two nodes at a bridge, 2 and 3; this machine is 1."""
    take_down()
    ip("link add synth-br type bridge")
    ip(f"addr add {NET}.1/24 dev synth-br")
    ip("link set synth-br up")
    for number in (2, 3):
        ip(f"netns add synth-{number}")
        ip(f"link add synth-v{number} type veth peer name synth-e{number}")
        ip(f"link set synth-e{number} netns synth-{number}")
        ip(f"link set synth-v{number} master synth-br up")
        for line in (f"addr add {NET}.{number}/24 dev synth-e{number}", f"link set synth-e{number} up", "link set lo up"):
            ip(f"-n synth-{number} {line}")
    try:
        yield
    finally:
        take_down()


def take_down() -> None:
    """End both nodes, and take the network away."""
    for number in (2, 3):
        kill(number)
        ip(f"netns del synth-{number}", check=False)
        ip(f"link del synth-v{number}", check=False)
    ip("link del synth-br", check=False)


def start_node(number: int) -> int:
    """Start a Ray node, and return the process whose namespaces are its own; a first one is the head."""
    about = ["--num-cpus=2", "--disable-usage-stats", f"--node-ip-address={NET}.{number}", "--block"]
    about += ["--head", f"--port={RAY}", "--include-dashboard=false"] if number == 2 else [f"--address={NET}.2:{RAY}"]
    own = 'mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && mkdir /tmp/home && cd /tmp/home && exec ray start "$@"'
    command = ["ip", "netns", "exec", f"synth-{number}", "unshare", "-m", "bash", "-c", own, "bash", *about]
    node = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(12)
    if node.poll() is not None:
        raise SystemExit(f"node {number} did not start")
    return node.pid


def kill(number: int) -> None:
    """Kill all that runs on a node; what it had on its disk is gone with it."""
    found = subprocess.run(["ip", "netns", "pids", f"synth-{number}"], capture_output=True, text=True)
    for process in found.stdout.split():
        try:
            os.kill(int(process), signal.SIGKILL)
        except ProcessLookupError:
            continue


def drive(head: int, out: str, options: argparse.Namespace, log: Path) -> "subprocess.Popen[str]":
    """Give the command on the first node."""
    command = ["synth", "generate", *wanted(options), "--out", out, "--executor", "ray", "--shards", f"{options.shards}"]
    command += ["--ray-address", f"{NET}.2:{RAY}", "--workers", "2", "--json"]
    there = 'mkdir -p /tmp/given && cd /tmp/given && exec "$@"'  # a folder that the other node has not
    with log.open("w") as file:
        own = ["nsenter", "-t", f"{head}", "-m", "-n", "bash", "-c", there, "bash"]
        return subprocess.Popen([*own, *command], env=ENV, stdout=subprocess.PIPE, stderr=file, text=True)


def wanted(options: argparse.Namespace) -> list[str]:
    """Return what is to be made."""
    about = ["--source", "scenes", "--limit", f"{options.images}", "--tasks", "caption"]
    return [*about, "--base-url", f"http://{NET}.1:{CHAT}/v1"]


def stats(what: str = "stats") -> dict[str, Any]:
    """Return what the endpoint has counted, or have it forget that."""
    with urlopen(f"http://{NET}.1:{CHAT}/{what}", data=b"" if what == "reset" else None) as reply:
        found: dict[str, Any] = json.loads(reply.read() or b"{}")
        return found


def wait_for(came: int, command: "subprocess.Popen[str]", log: Path) -> None:
    """Wait until so many requests of a command have come."""
    while stats()["came"] < came:
        if command.poll() is not None:
            raise SystemExit(log.read_text()[-3000:])
        time.sleep(0.2)


def result(command: "subprocess.Popen[str]", log: Path) -> str:
    """Wait for a command, and return the digest of what it made."""
    printed, _ = command.communicate()
    if command.returncode:
        raise SystemExit(log.read_text()[-3000:])
    digest: str = json.loads(printed)["digest"]
    return digest


def main() -> None:
    """Do all five."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds")
    options = parser.parse_args()
    requests = 2 * options.images
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, start: float, digest: str) -> None:
        told = stats()
        twice = told["came"] - told["different"]
        found[name] = {"seconds": round(time.monotonic() - start, 1), "digest": digest[:12], "twice": twice}
        found[name]["by_node"] = told["clients"]
        print(name, json.dumps(found[name]), flush=True)
        stats("reset")

    with tempfile.TemporaryDirectory() as folder, network():
        log = Path(folder) / "log"
        servers: list[subprocess.Popen[bytes]] = [
            subprocess.Popen([BIN / "moto_server", "-H", f"{NET}.1", "-p", f"{S3}"], stderr=subprocess.DEVNULL),
            subprocess.Popen([sys.executable, HERE / "mock_chat.py", f"{CHAT}", f"{options.latency}", "various", f"{NET}.1"]),
        ]
        try:
            time.sleep(4)
            make = "import boto3; boto3.client('s3').create_bucket(Bucket='sets')"
            subprocess.run([sys.executable, "-c", make], env=os.environ | ENV, check=True)
            start = time.monotonic()
            alone = [f"{BIN}/synth", "generate", *wanted(options), "--out", f"{folder}/one", "--json"]
            with log.open("w") as file:
                note("one process", start, result(subprocess.Popen(alone, stdout=-1, stderr=file, text=True), log))

            head = start_node(2)
            start_node(3)
            start = time.monotonic()
            note("two nodes", start, result(drive(head, "s3://sets/both", options, log), log))

            start = time.monotonic()
            command = drive(head, "s3://sets/cut", options, log)
            wait_for(requests // 2, command, log)
            ip("link set synth-v3 down")
            time.sleep(60)
            ip("link set synth-v3 up")
            note("one node cut off", start, result(command, log))

            kill(3)  # where something of the first one may be left
            start_node(3)
            start = time.monotonic()
            command = drive(head, "s3://sets/lost", options, log)
            wait_for(requests // 2, command, log)
            kill(3)
            note("one node killed", start, result(command, log))

            start_node(3)
            start = time.monotonic()
            command = drive(head, "s3://sets/all", options, log)
            wait_for(requests // 2, command, log)
            kill(3)
            kill(2)
            command.wait()
            head = start_node(2)
            start_node(3)
            note("all killed, begun again", start, result(drive(head, "s3://sets/all", options, log), log))
        finally:
            for server in servers:
                server.kill()
    print(json.dumps(found | {"requests": requests, "equal": len({each["digest"] for each in found.values()}) == 1}))


if __name__ == "__main__":
    main()
