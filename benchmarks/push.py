"""Measure time, memory and traffic of a dataset push, compared with `Dataset.push_to_hub`.

    PYTHONPATH=. python benchmarks/push.py [--megabytes 2000] [--image-kilobytes 90]
        [--shard-megabytes 2]

Both commands push the same rows to the same local server with the Hub protocol, one after the other in
separate processes. Random bytes replace JPEGs, because both are incompressible. Peak memory is VmHWM of the
process minus its memory after the imports. Then 1 % of the rows change, spread over the dataset, and both
push again. Small values of --shard-megabytes show the cost of very many shards.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset import shards
from pipeline.dataset.builder import with_split
from pipeline.dataset.version import Version
from pipeline.tables import ROW
from tests.hub.server import RunningHub, running_hub
from tests.scene_data import publish_tables

CHANGED = 0.01
MEASURE = """
import json, re, sys, time
def kilobytes(what): return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
from pathlib import Path
{imports}
idle, started = kilobytes("VmRSS"), time.monotonic()
{push}
seconds = time.monotonic() - started
print(json.dumps({{"seconds": seconds, "peak_mb": (kilobytes("VmHWM") - idle) / 1000}}))
"""
OURS = {
    "imports": "from pipeline.hub.package import build_package\nfrom pipeline.hub.push import push_package\n"
    "from pipeline.dataset.version import read_version\nimport huggingface_hub.hf_api",
    "push": "with build_package(read_version(Path(sys.argv[1])), sys.argv[2]) as package:\n"
    "    push_package(package, sys.argv[2])",
}
THEIRS = {
    "imports": "import huggingface_hub.hf_api, pipeline\ndataset = pipeline.load(sys.argv[1])['train']",
    "push": "dataset.push_to_hub(sys.argv[2])",
}


def pixels(number: int, size_bytes: int) -> bytes:
    """Return random bytes that stand for an image."""
    return random.Random(number).randbytes(size_bytes)


def row(number: int, image: int, image_bytes: int, text: str) -> dict[str, Any]:
    """Return one version row with an image and a text."""
    data = pixels(image, image_bytes)
    caption = {"text": text, "style": "brief", "prompt_id": "caption/v1@test"}
    return {
        "sample_id": hashlib.sha256(data).hexdigest(),
        "image": {"bytes": data, "path": None},
        "width_px": 500,
        "height_px": 375,
        "source": "random",
        "source_row": str(number),
        "license": "cc0-1.0",
        "references": [],
        "captions": [caption],
        "qa": [],
        "split": "train",
    }


def make(
    folder: Path,
    count: int,
    image_bytes: int,
    *,
    new_texts: Set[int] = frozenset(),
    new_images: Set[int] = frozenset(),
) -> Version:
    """Write the next version of a dataset. Rows in `new_texts` and `new_images` change."""
    words = " ".join(f"word{n}" for n in range(20))

    def tables() -> Iterator[pa.Table]:
        for first in range(0, count, 100):
            batch = [
                row(
                    n,
                    n + (count if n in new_images else 0),
                    image_bytes,
                    f"{'Another' if n in new_texts else 'A'} caption {n} {words}",
                )
                for n in range(first, min(count, first + 100))
            ]
            table = pa.Table.from_pylist(batch, schema=with_split(ROW))
            yield table

    version, _ = publish_tables(folder, tables())
    return version


def push(hub: RunningHub, home: Path, code: dict[str, str], version: Version, repo: str) -> dict[str, float]:
    """Push in a new process. Returns seconds, peak memory, and the megabytes that the server received."""
    before = hub.hub.received_bytes
    command = [sys.executable, "-c", MEASURE.format(**code), str(version.path), repo]
    done = subprocess.run(command, env=hub.env(home), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured | {"sent_mb": (hub.hub.received_bytes - before) / 1e6}


def main() -> None:
    """Measure pushes by `synth` and by `Dataset.push_to_hub`, and print a table."""
    parser = argparse.ArgumentParser(description="Push a dataset of images, beside Dataset.push_to_hub.")
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--image-kilobytes", type=int, default=90)
    parser.add_argument("--shard-megabytes", type=float, help="end shards at this size")
    arguments = parser.parse_args()
    if arguments.shard_megabytes:
        shards.SHARD_BYTES = round(arguments.shard_megabytes * 1_000_000)
    image_bytes = 1000 * arguments.image_kilobytes
    count = arguments.megabytes * 1_000_000 // image_bytes
    changed_rows = set(random.Random(0).sample(range(count), max(1, int(count * CHANGED))))
    with tempfile.TemporaryDirectory() as name, running_hub(Path(name) / "hub") as hub:
        root = Path(name)
        print(f"{count} rows, {arguments.megabytes} MB; {len(changed_rows)} rows change")
        changes: dict[str, dict[str, set[int]]] = {
            "the first version": {},
            "1 % other captions": {"new_texts": changed_rows},
            "1 % other images": {"new_images": changed_rows},
        }
        for title, change in changes.items():
            version = make(root / "data", count, image_bytes, **change)
            size_mb = sum(path.stat().st_size for path in version.store.paths()) / 1e6
            print(f"{title}, {version.name}, {size_mb:.0f} MB of images")
            for client, code in (("synth", OURS), ("push_to_hub", THEIRS)):
                result = push(hub, root / client, code, version, f"me/{client}")
                print(
                    f"  {client:<12} {result['seconds']:7.1f} s   peak +{result['peak_mb']:7.0f} MB   "
                    f"sent {result['sent_mb']:8.1f} MB ({result['sent_mb'] / size_mb:6.1%})",
                    flush=True,
                )
            if version.manifest["parent"]:
                shutil.rmtree(version.path)  # the parent of the next version must be the first version


if __name__ == "__main__":
    main()
