"""Runs CaptionFlow: an orchestrator for a folder of images, and one worker for an OpenAI-compatible endpoint.

Measured with version 0.5.7 on Python 3.12, the oldest that newer releases support. CaptionFlow decodes,
re-encodes and captions all images of a batch before the next batch. Replies are stored without a schema, in
Lance files below `--out`. A second run requests missing captions. CaptionFlow adapts its concurrency to
the endpoint, and this script starts it at the maximum.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "Write one sentence that names the main things in view."
CONCURRENCY = 256
TOKEN = "benchmark"  # token for the local server
CHUNK = 500  # images per chunk of work


def free_port() -> int:
    """Return a port that is currently free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def configure(url: str, images: Path, out: Path) -> int:
    """Write the settings of both processes. Returns the port of the orchestrator."""
    port = free_port()
    orchestrator = {
        "host": "127.0.0.1",
        "port": port,
        "dataset": {
            "processor_type": "local_filesystem",
            "dataset_path": str(images),
            "http_bind_address": "127.0.0.1",
            "http_port": free_port(),
        },
        "chunk_size": CHUNK,
        "storage": {
            "data_dir": str(out / "data"),
            "checkpoint_dir": str(out / "checkpoints"),
            "caption_buffer_size": 100,
            "checkpoint_interval": 1,
        },
        "auth": {"worker_tokens": [{"name": "worker", "token": TOKEN}]},
        "vllm": {
            "model": "model",
            "batch_size": CONCURRENCY,
            "inference_prompts": [PROMPT],
            "sampling": {"max_tokens": 256},
        },
    }
    endpoint = {
        "base_url": url,
        "model": "model",
        "initial_concurrency": CONCURRENCY,
        "max_concurrency": CONCURRENCY,
    }
    worker = {"server": f"ws://127.0.0.1:{port}", "token": TOKEN, "openai_compatible": endpoint}
    (out / "orchestrator.yaml").write_text(json.dumps({"orchestrator": orchestrator}))
    (out / "worker.yaml").write_text(json.dumps({"worker": worker}))
    return port


def stored(out: Path) -> int:
    """Return the number of captions on disk."""
    try:
        return int(json.loads((out / "data" / "storage_stats.json").read_text())["disk_rows"])
    except (OSError, ValueError, KeyError):
        return 0


def caption(url: str, images: Path, rows: int, out: Path) -> None:
    """Request one caption per image."""
    port = configure(url, images, out)
    command = str(Path(sys.executable).with_name("caption-flow"))
    env = os.environ | {
        "HOME": str(out),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "CAPTIONFLOW_LOG_LEVEL": "WARNING",
    }
    orchestrator = subprocess.Popen(
        [command, "orchestrator", "--config", "orchestrator.yaml", "--no-ssl"], cwd=out, env=env
    )
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            if orchestrator.poll() is not None:
                raise SystemExit("the orchestrator has ended")
            time.sleep(0.1)
    worker = subprocess.Popen(
        [command, "worker", "--config", "worker.yaml", "--openai-compatible"], cwd=out, env=env
    )
    while stored(out) < rows:
        if worker.poll() is not None or orchestrator.poll() is not None:
            raise SystemExit("one of both has ended")
        time.sleep(0.1)
    for process in (worker, orchestrator):
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    """Parse the arguments and run CaptionFlow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    folder = out.with_name(
        f"{out.name}-images-{arguments.rows}"
    )  # CaptionFlow reads all images in this folder
    folder.mkdir(exist_ok=True)
    for path in sorted(arguments.images.glob("*.jpg"))[: arguments.rows]:
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
    caption(arguments.url, folder, arguments.rows, out)


if __name__ == "__main__":
    main()
