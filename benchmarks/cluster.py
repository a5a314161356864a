"""Measure the overhead of Ray: CPU time per image with `--executor ray` and `local` on one machine.

    python benchmarks/cluster.py [--images 4000 80000] [--shards 8] [--latency 0.05]

Both executors caption the same scenes in two styles through a mock endpoint with a fixed latency, from source
to version. A control group (Linux, as root) measures the CPU time of the whole process tree, including Ray's
processes. Each executor runs at two sizes, and the difference excludes start-up. Ray always uses part of a
core, so the ratio depends on the number of images per second. Runs are sequential. Repeat them on a shared
machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mock_chat import running_mock

SYNTH = Path(sys.executable).with_name("synth")
GROUPS = next(
    (
        home
        for home in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
        if (home / "cgroup.procs").exists()
    ),
    None,
)


def run(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command in its own control group. Returns wall-clock seconds and CPU seconds of all processes."""
    if GROUPS is None:
        raise SystemExit("there are no control groups (version 2) here to count CPU seconds with")
    group = GROUPS / f"synth-benchmark-{os.getpid()}"
    group.mkdir()

    def enter() -> None:
        (group / "cgroup.procs").write_text("0")

    start = time.monotonic()
    with (folder / "log").open("ab") as log:
        done = subprocess.run(command, cwd=folder, stdout=log, stderr=log, preexec_fn=enter)
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit((folder / "log").read_text()[-2000:])
    while (group / "cgroup.procs").read_text().strip():  # the processes of a cluster take a moment to exit
        time.sleep(0.2)
    (used,) = [
        line.split()[1]
        for line in (group / "cpu.stat").read_text().splitlines()
        if line.startswith("usage_usec")
    ]
    group.rmdir()
    return {"seconds": round(seconds, 1), "cpu_seconds": round(int(used) / 1e6, 1)}


def main() -> None:
    """Measure both executors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs=2, default=[4000, 80000])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with running_mock(options.latency) as url, tempfile.TemporaryDirectory() as folder:
        for name, more in (("local", []), ("ray", ["--executor", "ray", "--shards", str(options.shards)])):
            runs = []
            for images in options.images:
                out = f"{name}-{images}"
                dataset = ["--source", "scenes", "--limit", str(images), "--tasks", "caption", "--out", out]
                command = [str(SYNTH), "generate", *dataset, "--base-url", f"{url}/v1", *more]
                runs.append(run(command, Path(folder)) | {"images": images})
                manifest = json.loads(
                    (Path(folder) / out / "versions" / "v1.0.0" / "manifest.json").read_text()
                )
                runs[-1]["digest"] = manifest["digest"][:12]
                print(name, runs[-1], flush=True)
            small, large = runs
            more_images = large["images"] - small["images"]
            cost_ms = 1000 * (large["cpu_seconds"] - small["cpu_seconds"]) / more_images
            results[name] = {"cpu_ms_an_image": cost_ms, "runs": runs}
    local, ray = (results[name]["cpu_ms_an_image"] for name in ("local", "ray"))
    print(json.dumps({**results, "ray_over_local": round(ray / local, 3)}))


if __name__ == "__main__":
    main()
