"""Measure the CPU time per row of caption clients.

    PYTHONPATH=. python benchmarks/client_overhead.py [--rows 2000] [--peer NAME=PYTHON ...]

A mock endpoint answers every request after 200 ms. Each client requests one caption for each of N distinct
JPEGs (85 kB) with 256 concurrent requests. The clients are a bare aiohttp loop that discards the replies,
`synth` with journal and validation, `synth` with a separate prompt per image (`context`), and peers, each in
its own environment (benchmarks/peers). CPU per row is the slope between a short and a long run, which
excludes start-up. Finally, each client is killed half-way and restarted, and repeated requests are counted.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.plans import request_plan

HERE = Path(__file__).parent
CONCURRENCY = 256
LATENCY_SECONDS = 0.2
KEPT_FILES = 2000
WITH_CONTEXT = "synth-context"
# A client hangs if half of the rows take this long.
HANGS_SECONDS = 180
PROMPT = "Write one sentence that names the main things in view."


@dataclass(frozen=True)
class Run:
    """Resources used by one run of a client."""

    cpu_seconds: float
    peak_mb: float
    disk_bytes: int


# --- images


def make_images(folder: Path) -> None:
    """Write distinct noisy JPEGs of about 85 kB."""
    # The measured clients do not need this import.
    from photos import noise_jpeg

    folder.mkdir(parents=True)
    for number in range(KEPT_FILES):
        (folder / f"{number:05d}.jpg").write_bytes(noise_jpeg(number, grain_px=4))


def read_image(folder: Path, number: int) -> bytes:
    """Return the bytes of an image. Beyond KEPT_FILES, images are copies with their number appended."""
    data = (folder / f"{number % KEPT_FILES:05d}.jpg").read_bytes()
    return data if number < KEPT_FILES else data + number.to_bytes(8, "big")


# --- the aiohttp and synth clients, which run in their own processes


def run_raw(url: str, images: Path, rows: int) -> None:
    """Send requests in a minimal aiohttp loop, and discard the replies."""
    import aiohttp

    async def work(session: aiohttp.ClientSession, numbers: Iterator[int]) -> None:
        for number in numbers:
            picture = base64.b64encode(read_image(images, number)).decode()
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
                {"type": "text", "text": PROMPT},
            ]
            body = {
                "model": "model",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 256,
                "temperature": 0,
            }
            async with session.post(f"{url}/chat/completions", json=body) as answer:
                json.loads((await answer.json())["choices"][0]["message"]["content"])["caption"]

    async def loop() -> None:
        numbers = iter(range(rows))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(work(session, numbers) for _ in range(CONCURRENCY)))

    asyncio.run(loop())


def run_synth(url: str, images: Path, rows: int, out: Path, *, with_context: bool = False) -> None:
    """Run the generate step of `synth`. With `with_context`, each image has its own prompt."""
    from contextlib import ExitStack

    from pipeline.config.files import resolve
    from pipeline.inference.client import Client
    from pipeline.inference.journal import Journal
    from pipeline.inference.queue import RequestStats, ask_in_rounds, read_annotations
    from pipeline.steps.validate import validate_annotations
    from pipeline.types import SampleBatch, SampleInfo, SourceTexts

    config = resolve(
        source="folder:bench",
        base_url=[url],
        model="model",
        tasks=["caption"],
        generate={"caption_styles": ["brief"]},
        server={"concurrency": CONCURRENCY},
    )
    ids: list[str] = []
    texts: dict[str, SourceTexts] = {}

    def chunks() -> "Iterator[SampleBatch]":
        for first in range(0, rows, 64):
            data = [read_image(images, number) for number in range(first, min(first + 64, rows))]
            chunk = [(hashlib.sha256(image).hexdigest(), (image,)) for image in data]
            ids.extend(name for name, _ in chunk)
            if with_context:
                titles = ((name, number) for number, (name, _) in enumerate(chunk, start=first))
                for name, number in titles:
                    texts[name] = SourceTexts((("title", f"Lamp {number}"), ("tags", "brass, desk, green")))
            yield SampleBatch.of(chunk)

    def text_of(sample_id: str) -> SourceTexts:
        return texts.get(sample_id, SourceTexts())

    with Journal(out / "journal.sqlite") as journal, ExitStack() as stack:
        client = Client("model", config.server, config.generate.max_tokens, urls=config.base_url)
        engine = lambda _: stack.enter_context(client)  # noqa: E731
        plan, stats = request_plan(config, "m"), RequestStats()
        for _ in ask_in_rounds(chunks, plan, config.servers, engine, journal, stats, text_of):
            pass
        samples = ([SampleInfo(name, 1) for name in ids[start : start + 64]] for start in range(0, rows, 64))
        kept = 0
        for table in read_annotations(samples, request_plan(config, "m"), journal, text_of):
            kept += validate_annotations(table)["reason"].null_count
    assert kept == rows, f"{kept} of {rows} captions are valid"


# --- measurement


def measure(command: list[str], out: Path) -> Run:
    """Run a client until it exits. CPU time and memory include its child processes."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed: {(out.parent / f'{out.name}.log').read_text()[-2000:]}")
    used = sum(path.stat().st_blocks * 512 for path in out.rglob("*") if path.is_file())
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, used)


def count_repeated_requests(command: list[str], out: Path, root: str, rows: int) -> str:
    """Kill a client half-way and restart it. Returns the number of repeated requests, or "hangs"."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    urllib.request.urlopen(urllib.request.Request(f"{root}/reset", b""), timeout=10).close()
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with (out.parent / f"{out.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        while stats(root)["answered"] < rows // 2:
            if process.poll() is not None:
                raise SystemExit(f"{command} ended before it could be killed")
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        again = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            again.wait(HANGS_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(again.pid, signal.SIGKILL)
            again.wait()
            return "hangs"
    after = stats(root)
    if again.returncode or after["different"] != rows:
        raise SystemExit(f"{command} left rows out: {after}")
    return str(after["answered"] - rows)


def stats(root: str) -> dict[str, int]:
    """Return the request counts of the endpoint."""
    with urllib.request.urlopen(f"{root}/stats", timeout=10) as response:
        counts: dict[str, int] = json.load(response)
    return counts


def commands(url: str, images: Path, peers: dict[str, str]) -> dict[str, list[str]]:
    """Return the command of each client, without the options for rows and output."""
    options = ["--url", url, "--images", str(images)]
    own_clients = {
        name: [sys.executable, __file__, "--worker", name, *options]
        for name in ("raw", "synth", WITH_CONTEXT)
    }
    return own_clients | {
        name: [python, str(HERE / "peers" / f"{name}.py"), *options] for name, python in peers.items()
    }


def main() -> None:
    """Run one client, or measure all clients."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--long-rows", type=int, default=20_000, help="of synth alone, for its memory")
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON, see benchmarks/peers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--worker")
    parser.add_argument("--url")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker == "raw":
        return run_raw(arguments.url, arguments.images, arguments.rows)
    if arguments.worker:
        with_context = arguments.worker == WITH_CONTEXT
        return run_synth(
            arguments.url, arguments.images, arguments.rows, arguments.out, with_context=with_context
        )
    from mock_chat import running_mock

    with running_mock(LATENCY_SECONDS, various=False) as root, tempfile.TemporaryDirectory() as temporary:
        compare(arguments, root, Path(temporary))
    return None


def compare(arguments: argparse.Namespace, root: str, scratch: Path) -> None:
    """Measure every client, and print one line for each."""
    images = scratch / "images"
    make_images(images)
    sizes = [path.stat().st_size for path in images.iterdir()]
    print(
        f"{arguments.rows} rows, images of {sum(sizes) / len(sizes) / 1000:.0f} kB, "
        f"{len(os.sched_getaffinity(0))} cores"
    )
    print(f"{'client':<16} {'CPU ms/row':>10} {'of raw':>7} {'peak MB':>8} {'disk B/row':>10} {'redone':>7}")
    peers = dict(pair.split("=", 1) for pair in arguments.peer)
    short = max(arguments.rows // 8, 64)
    slopes: dict[str, list[float]] = {}
    clients = commands(f"{root}/v1", images, peers)
    runs: dict[str, Run] = {}
    for _ in range(arguments.repeat):
        # The clients take turns, so that other load affects all of them.
        for name, command in clients.items():
            out = scratch / name
            few = measure([*command, "--rows", str(short), "--out", str(out)], out)
            runs[name] = many = measure([*command, "--rows", str(arguments.rows), "--out", str(out)], out)
            slopes.setdefault(name, []).append(
                (many.cpu_seconds - few.cpu_seconds) / (arguments.rows - short) * 1000
            )
    middle = {name: sorted(values)[len(values) // 2] for name, values in slopes.items()}
    for name, command in clients.items():
        again = ""
        if name != "raw":
            out = scratch / name
            again = count_repeated_requests(
                [*command, "--rows", str(arguments.rows), "--out", str(out)], out, root, arguments.rows
            )
        run = runs[name]
        print(
            f"{name:<16} {middle[name]:>10.2f} {middle[name] / middle['raw']:>7.2f} {run.peak_mb:>8.0f} "
            f"{run.disk_bytes / arguments.rows:>10.0f} {again:>7}",
            flush=True,
        )
    if arguments.long_rows:
        out = scratch / "long"
        run = measure([*clients["synth"], "--rows", str(arguments.long_rows), "--out", str(out)], out)
        disk = run.disk_bytes / arguments.long_rows
        print(f"synth, {arguments.long_rows} rows: peak {run.peak_mb:.0f} MB, {disk:.0f} B/row on disk")


if __name__ == "__main__":
    main()
