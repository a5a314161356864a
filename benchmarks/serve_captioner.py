"""Measure a served captioner under many requests at once, beside a loop in Python over the same images.

    python benchmarks/serve_captioner.py CAPTIONER FOLDER [--requests 400] [--concurrency 200] [--rounds 5]

The server runs in a process of its own, as `synth serve-captioner` starts it; requests come from this one. The loop is
`Captioner.caption` in a process of its own as well. Both in turn, after one round that does not count.
"""

import argparse
import asyncio
import base64
import statistics
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import aiohttp

KINDS = (".png", ".jpg", ".jpeg", ".webp")
LOOP = """
import sys, time
from pathlib import Path
from trainer import Captioner
captioner = Captioner.from_pretrained(sys.argv[1])
images = [Path(name).read_bytes() for name in sys.argv[3:]] * (int(sys.argv[2]) // len(sys.argv[3:]) + 1)
images = images[: int(sys.argv[2])]
captioner.caption(images[:64])
for line in sys.stdin:
    started = time.monotonic()
    captioner.caption(images)
    print(len(images) / (time.monotonic() - started), flush=True)
"""


async def burst(url: str, bodies: list[dict[str, Any]], concurrency: int) -> float:
    """Send all requests, so many at once; return answers a second. Raises AssertionError for one that is not answered."""
    slots = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(body: dict[str, Any]) -> None:
            async with slots, session.post(f"{url}/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()

        started = time.monotonic()
        await asyncio.gather(*map(ask, bodies))
        return len(bodies) / (time.monotonic() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A served captioner beside a loop.")
    parser.add_argument("captioner")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    paths = [path for path in sorted(arguments.folder.iterdir()) if path.suffix.lower() in KINDS]
    images = islice(cycle(path.read_bytes() for path in paths), arguments.requests)
    addresses = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    bodies = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]}
        for address in addresses
    ]
    serving = [sys.executable, "-m", "pipeline.cli", "serve-captioner", arguments.captioner, "--port", "0"]
    looping = [sys.executable, "-c", LOOP, arguments.captioner, str(arguments.requests), *map(str, paths)]
    with (
        subprocess.Popen(serving, stderr=subprocess.PIPE, text=True) as server,
        subprocess.Popen(looping, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as loop,
    ):
        assert server.stderr and loop.stdin and loop.stdout
        url = next(line.strip() for line in server.stderr if line.startswith("http"))
        served, looped = [], []
        for number in range(arguments.rounds + 1):
            in_server = asyncio.run(burst(url, bodies, arguments.concurrency))
            loop.stdin.write("\n")
            loop.stdin.flush()
            in_loop = float(loop.stdout.readline())
            if number:
                served.append(in_server)
                looped.append(in_loop)
        loop.stdin.close()
        server.terminate()
    ratios = [one / other for one, other in zip(served, looped, strict=True)]
    print(f"{arguments.requests} requests, {arguments.concurrency} at once; medians of {arguments.rounds} rounds:")
    print(f"  served {statistics.median(served):.1f} captions/s, loop {statistics.median(looped):.1f} captions/s")
    print(f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
