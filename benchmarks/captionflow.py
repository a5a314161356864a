"""Measure CaptionFlow without a model: `python benchmarks/captionflow.py PYTHON [--rows 2000] [--repeat 3]`.

PYTHON is the interpreter of an environment with `pip install caption-flow`. Its workers run vLLM in their own process and ask no
endpoint, so that it cannot stand beside the clients of `client_overhead.py` at one mock. What is measured is its own mock
(`mock_results`): an orchestrator hands out images of a folder, a worker fetches and opens each and sends a made-up caption back, and
the orchestrator stores it; no prompt is sent, nothing is encoded, no reply is parsed. CPU is that of both processes, as the slope
between a short and a long run. Then both are killed half-way and started again, and the images that the worker read twice are counted.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from client_overhead import make_images

BATCH = 256
TOKEN = "benchmark"  # of a server on loopback
READ = "Processing item data"  # in the log of the worker, once for each image
WAIT_SECONDS = 300


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Cluster:
    """An orchestrator and a worker over the images of a folder."""

    def __init__(self, python: str, images: Path, out: Path, *, log_level: str = "WARNING") -> None:
        self.out, self.port = out, free_port()
        config = {
            "host": "127.0.0.1",
            "port": self.port,
            "dataset": {
                "processor_type": "local_filesystem",
                "dataset_path": str(images),
                "http_bind_address": "127.0.0.1",
                "http_port": free_port(),
            },
            "chunk_size": BATCH,
            "storage": {
                "data_dir": str(out / "data"),
                "checkpoint_dir": str(out / "checkpoints"),
                "caption_buffer_size": BATCH,
                "checkpoint_interval": 1,
            },
            "auth": {"worker_tokens": [{"name": "worker", "token": TOKEN}]},
            "vllm": {"model": "none", "mock_results": True, "batch_size": BATCH, "inference_prompts": ["Describe it."]},
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "orchestrator.yaml").write_text(json.dumps({"orchestrator": config}))
        command = str(Path(python).with_name("caption-flow"))
        env = os.environ | {"HOME": str(out), "HF_HUB_OFFLINE": "1", "CAPTIONFLOW_LOG_LEVEL": log_level}
        with (out / "log").open("a") as log:
            start = {"stdout": log, "stderr": log, "env": env, "cwd": out, "start_new_session": True}
            self.orchestrator = subprocess.Popen(
                [command, "orchestrator", "--config", "orchestrator.yaml", "--no-ssl"], **start
            )
            self._wait(self._listens, "the orchestrator listens")
            server = ["--server", f"ws://127.0.0.1:{self.port}", "--token", TOKEN, "--vllm"]
            self.worker = subprocess.Popen([command, "worker", *server], **start)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _wait(self, condition: object, what: str) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():  # type: ignore[operator]
            if time.monotonic() > end or self.orchestrator.poll() is not None:
                raise SystemExit(f"not within {WAIT_SECONDS} s: {what}\n{(self.out / 'log').read_text()[-3000:]}")
            time.sleep(0.1)

    def stored(self) -> int:
        """Return how many captions lie on the disk."""
        try:
            return int(json.loads((self.out / "data" / "storage_stats.json").read_text())["disk_rows"])
        except (OSError, ValueError, KeyError):
            return 0

    def wait_for(self, rows: int) -> None:
        """Wait until so many captions lie on the disk."""
        self._wait(lambda: self.stored() >= rows, f"{rows} captions ({self.stored()} are there)")

    def end(self, number: int = signal.SIGINT) -> tuple[float, float]:
        """End both, and return their CPU seconds and the sum of their peaks in MB."""
        seconds = peak_mb = 0.0
        for process in (self.worker, self.orchestrator):
            os.killpg(process.pid, number)
            _, _, usage = os.wait4(process.pid, 0)
            seconds += usage.ru_utime + usage.ru_stime
            peak_mb += usage.ru_maxrss / 1024
        return seconds, peak_mb


def folder_of(images: Path, rows: int, scratch: Path) -> Path:
    """Return a folder with the first images."""
    folder = scratch / f"images-{rows}"
    if not folder.exists():
        folder.mkdir()
        for path in sorted(images.iterdir())[:rows]:
            os.link(path, folder / path.name)
    return folder


def measure(python: str, folder: Path, rows: int, out: Path) -> tuple[float, float, float]:
    """Return CPU seconds, peak memory in MB, and bytes on the disk of one run."""
    shutil.rmtree(out, ignore_errors=True)
    cluster = Cluster(python, folder, out)
    cluster.wait_for(rows)
    seconds, peak_mb = cluster.end()
    return seconds, peak_mb, sum(path.stat().st_blocks * 512 for path in (out / "data").rglob("*") if path.is_file())


def count_redone(python: str, folder: Path, rows: int, out: Path) -> int:
    """Return how many images were read more than once where both were killed half-way."""
    first = Cluster(python, folder, out, log_level="DEBUG")
    first.wait_for(rows // 2)
    first.end(signal.SIGKILL)
    again = Cluster(python, folder, out, log_level="DEBUG")
    again.wait_for(rows)
    again.end()
    return (out / "log").read_text(errors="replace").count(READ) - rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    short = arguments.rows // 8
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        make_images(scratch / "images")
        folders = {rows: folder_of(scratch / "images", rows, scratch) for rows in (short, arguments.rows)}
        slopes = []
        for _ in range(arguments.repeat):
            few = measure(arguments.python, folders[short], short, scratch / "few")
            many = measure(arguments.python, folders[arguments.rows], arguments.rows, scratch / "many")
            slopes.append((many[0] - few[0]) / (arguments.rows - short) * 1000)
        _, peak_mb, used = many
        print(
            f"CPU {statistics.median(slopes):.2f} ms an image, peak {peak_mb:.0f} MB, {used / arguments.rows:.0f} B a caption on disk"
        )
        print(
            f"redone after kill -9: {count_redone(arguments.python, folders[arguments.rows], arguments.rows, scratch / 'killed')}"
        )


if __name__ == "__main__":
    sys.exit(main())
