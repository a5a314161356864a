"""Run two nodes that share no files, and lose one of them: `--executor ray --out s3://...` (Linux, as root).

    python benchmarks/two_nodes.py [--images 6000] [--shards 4] [--latency 0.5]

Each node is a network and a mount namespace with its own address and `/tmp`, on which a Ray node runs; both see the installed
project, but not each other's `/tmp`. An S3 server (moto) and a mock endpoint have a third address. The same scenes are
captioned in one process; on both nodes; on both with one node cut off for a minute; on both with one node killed and its disk
lost; and on both after the nodes and the command were killed and restarted. Digests must be equal; repeated requests are
printed.
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
    """Run an `ip` command."""
    subprocess.run(["ip", *arguments.split()], check=check, capture_output=not check)


@contextmanager
def network() -> Iterator[None]:
    """Connect nodes 2 and 3 by a bridge; this machine is 1."""
    remove_network()
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
        remove_network()


def remove_network() -> None:
    """Kill both nodes, and remove the network."""
    for number in (2, 3):
        kill(number)
        ip(f"netns del synth-{number}", check=False)
        ip(f"link del synth-v{number}", check=False)
    ip("link del synth-br", check=False)


def start_node(number: int) -> int:
    """Start a Ray node in its own namespaces, and return its process id; node 2 is the head."""
    options = ["--num-cpus=2", "--disable-usage-stats", f"--node-ip-address={NET}.{number}", "--block"]
    options += ["--head", f"--port={RAY}", "--include-dashboard=false"] if number == 2 else [f"--address={NET}.2:{RAY}"]
    script = 'mount --make-rprivate / && mount -t tmpfs tmpfs /tmp && mkdir /tmp/home && cd /tmp/home && exec ray start "$@"'
    command = ["ip", "netns", "exec", f"synth-{number}", "unshare", "-m", "bash", "-c", script, "bash", *options]
    node = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(12)
    if node.poll() is not None:
        raise SystemExit(f"node {number} did not start")
    return node.pid


def kill(number: int) -> None:
    """Kill all processes of a node; its `/tmp` is lost with them."""
    listing = subprocess.run(["ip", "netns", "pids", f"synth-{number}"], capture_output=True, text=True)
    for process in listing.stdout.split():
        try:
            os.kill(int(process), signal.SIGKILL)
        except ProcessLookupError:
            continue


def start_command(head: int, out: str, options: argparse.Namespace, log: Path) -> "subprocess.Popen[str]":
    """Start the command on the head node."""
    command = [
        "synth",
        "generate",
        *dataset_options(options),
        "--out",
        out,
        "--executor",
        "ray",
        "--shards",
        f"{options.shards}",
    ]
    command += ["--ray-address", f"{NET}.2:{RAY}", "--workers", "2", "--json"]
    script = 'mkdir -p /tmp/given && cd /tmp/given && exec "$@"'  # a folder that the other node lacks
    with log.open("w") as file:
        enter = ["nsenter", "-t", f"{head}", "-m", "-n", "bash", "-c", script, "bash"]
        return subprocess.Popen([*enter, *command], env=ENV, stdout=subprocess.PIPE, stderr=file, text=True)


def dataset_options(options: argparse.Namespace) -> list[str]:
    """Return the options of the dataset and of the endpoint."""
    dataset = ["--source", "scenes", "--limit", f"{options.images}", "--tasks", "caption"]
    return [*dataset, "--base-url", f"http://{NET}.1:{CHAT}/v1"]


def stats(what: str = "stats") -> dict[str, Any]:
    """Return the counts of the endpoint, or reset them if `what` is "reset"."""
    with urlopen(f"http://{NET}.1:{CHAT}/{what}", data=b"" if what == "reset" else None) as reply:
        counts: dict[str, Any] = json.loads(reply.read() or b"{}")
        return counts


def wait_for(came: int, command: "subprocess.Popen[str]", log: Path) -> None:
    """Wait until the endpoint has received `came` requests."""
    while stats()["came"] < came:
        if command.poll() is not None:
            raise SystemExit(log.read_text()[-3000:])
        time.sleep(0.2)


def result(command: "subprocess.Popen[str]", log: Path) -> str:
    """Wait for a command, and return the digest of its version."""
    printed, _ = command.communicate()
    if command.returncode:
        raise SystemExit(log.read_text()[-3000:])
    digest: str = json.loads(printed)["digest"]
    return digest


def main() -> None:
    """Run all five cases, and print whether the digests are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.5, help="seconds")
    options = parser.parse_args()
    requests = 2 * options.images
    cases: dict[str, dict[str, Any]] = {}

    def note(name: str, start: float, digest: str) -> None:
        counts = stats()
        repeated = counts["came"] - counts["different"]
        cases[name] = {"seconds": round(time.monotonic() - start, 1), "digest": digest[:12], "twice": repeated}
        cases[name]["by_node"] = counts["clients"]
        print(name, json.dumps(cases[name]), flush=True)
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
            alone = [f"{BIN}/synth", "generate", *dataset_options(options), "--out", f"{folder}/one", "--json"]
            with log.open("w") as file:
                note("one process", start, result(subprocess.Popen(alone, stdout=-1, stderr=file, text=True), log))

            head = start_node(2)
            start_node(3)
            start = time.monotonic()
            note("two nodes", start, result(start_command(head, "s3://sets/both", options, log), log))

            start = time.monotonic()
            command = start_command(head, "s3://sets/cut", options, log)
            wait_for(requests // 2, command, log)
            ip("link set synth-v3 down")
            time.sleep(60)
            ip("link set synth-v3 up")
            note("one node cut off", start, result(command, log))

            kill(3)  # discard leftovers of the runs before
            start_node(3)
            start = time.monotonic()
            command = start_command(head, "s3://sets/lost", options, log)
            wait_for(requests // 2, command, log)
            kill(3)
            note("one node killed", start, result(command, log))

            start_node(3)
            start = time.monotonic()
            command = start_command(head, "s3://sets/all", options, log)
            wait_for(requests // 2, command, log)
            kill(3)
            kill(2)
            command.wait()
            head = start_node(2)
            start_node(3)
            note("all killed, begun again", start, result(start_command(head, "s3://sets/all", options, log), log))
        finally:
            for server in servers:
                server.kill()
    print(json.dumps(cases | {"requests": requests, "equal": len({case["digest"] for case in cases.values()}) == 1}))


if __name__ == "__main__":
    main()
