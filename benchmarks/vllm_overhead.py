"""Measure the overhead of `synth` with a real vLLM server.

    PYTHONPATH=. SYNTH_VLLM_PYTHON=... python benchmarks/vllm_overhead.py [--pairs 10]

vLLM serves the tiny teacher. A bare aiohttp client and `synth` (with journal and validation) take
turns, and send the same kinds of requests about new scenes. The result is the ratio of synth's requests per
second to the bare client's. A second part measures how many image tokens the second task about an image
reuses from the prefix cache, with a randomly initialized model and images of 448 px (256 tokens).
"""

import argparse
import asyncio
import base64
import hashlib
import json
import os
import random
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from photos import noise_jpeg

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.inference.client import Client
from pipeline.inference.endpoints import status_of
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.inference.journal import Journal
from pipeline.inference.queue import read_annotations
from pipeline.inference.requests import build_requests, with_images
from pipeline.inference.vllm import plan_servers
from pipeline.sources.scenes import draw_sample
from pipeline.types import Request, SampleBatch, SampleInfo
from tests.plans import ask, request_plan

IMAGE_TOKENS = 256
SIDE_PX = 448
REVISION = "benchmark"
PORT = 8133

# The model has random weights, so its replies are not usable.
UNUSABLE: dict[str, Any] = {
    "generate": {"max_tokens": 16, "attempts": 1},
    "server": {"flags": ["--block-size", "32"], "max_failure_frac": 1.0},
}

Images = list[tuple[str, tuple[bytes, ...]]]


def body(request: Request, model: str) -> dict[str, object]:
    """Return the JSON body of a request, built without `synth`."""
    picture = {"url": f"data:image/png;base64,{base64.b64encode(request.images[0]).decode()}"}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": request.text}]
    schema = {"name": request.task, "schema": json.loads(request.schema), "strict": True}
    return {
        "model": model,
        "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": content}],
        "temperature": request.sampling.temperature,
        "max_tokens": request.sampling.max_tokens,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }


async def ask_bare(url: str, model: str, requests: list[Request], concurrency: int) -> None:
    """Send all requests with this concurrency, and parse the replies."""
    left = iter(requests)

    async def work(session: aiohttp.ClientSession) -> None:
        for request in left:
            async with session.post(f"{url}/chat/completions", json=body(request, model)) as answer:
                json.loads((await answer.json())["choices"][0]["message"]["content"])

    headers = {"Authorization": f"Bearer {os.environ['SYNTH_API_KEY']}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(work(session) for _ in range(concurrency)))


def ask_synth(client: Client, images: Images, config: Config, folder: Path) -> None:
    """Run the generate step of `synth generate`: journal, reply validation and annotation table."""
    with Journal(folder / f"{random.getrandbits(64):x}.sqlite") as journal:
        chunks = (SampleBatch.of(images[start : start + 64]) for start in range(0, len(images), 64))
        ask(config, chunks, lambda: client, journal)
        samples = [SampleInfo(name, 1) for name, _ in images]
        list(read_annotations([samples], request_plan(config), journal))


def scenes(seed: int, count: int) -> Images:
    """Return `count` drawn scenes. Each seed gives different scenes."""
    return [(sample.id, sample.images) for sample in (draw_sample(seed, index) for index in range(count))]


@contextmanager
def serving(model: str, config: Config, log: Path) -> Iterator[tuple[str, str]]:
    """Run a server. Yields its URL (without /v1) and model name. Sets SYNTH_API_KEY in the environment."""
    (command,) = plan_servers(model, lambda: Path(model), REVISION, config.server, log, max_pixels=None)
    os.environ["SYNTH_API_KEY"] = command.api_key
    listens = ("--host", "127.0.0.1", "--port", str(PORT))
    environment = os.environ | command.environment | {"VLLM_API_KEY": command.api_key}
    root = f"http://127.0.0.1:{PORT}"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [command.python, *command.arguments, *listens], env=environment, stdout=output, stderr=output
        ) as process,
    ):
        try:
            while asyncio.run(status_of(f"{root}/health")) != 200:
                assert process.poll() is None, f"the server stopped: see {log}"
                time.sleep(1)
            yield root, command.name
        finally:
            process.terminate()


def open_client(config: Config) -> Client:
    """Return a client for the server and model in the settings."""
    return Client(config.model or "", config.server, config.generate.max_tokens, urls=config.base_url)


def measure_throughput(pairs: int, count: int, concurrency: int, scratch: Path) -> None:
    """Print the throughput ratio of both clients over interleaved pairs."""
    with serving(str(TINY_WEIGHTS), resolve(source="scenes"), scratch / "vllm.log") as (root, name):
        config = resolve(
            source="scenes", base_url=[f"{root}/v1"], model=name, server={"concurrency": concurrency}
        )
        with open_client(config) as client:
            ratios = list(compare(pairs, count, concurrency, root, client, config, scratch))
    low, high = bootstrap(ratios)
    print(
        f"synth / bare client: median {np.median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f}, "
        f"{pairs} pairs"
    )


def compare(
    pairs: int, count: int, concurrency: int, root: str, client: Client, config: Config, scratch: Path
) -> Iterator[float]:
    """Yield one ratio per pair of runs. The first pair is a warm-up."""
    for pair in range(pairs + 1):
        rates = {}
        for client_name in ("bare", "synth") if pair % 2 else ("synth", "bare"):
            images = scenes(9000 + 2 * pair + (client_name == "synth"), count)
            plan = request_plan(config)
            requests = [one for sample_id, _ in images for one in build_requests(sample_id, plan)]
            requests = with_images(requests, SampleBatch.of(images))
            started = time.perf_counter()
            if client_name == "bare":
                asyncio.run(ask_bare(f"{root}/v1", client.model, requests, concurrency))
            else:
                ask_synth(client, images, config, scratch)
            rates[client_name] = len(requests) / (time.perf_counter() - started)
        print(f"pair {pair}: bare {rates['bare']:.1f} requests/s, synth {rates['synth']:.1f}", flush=True)
        if pair:
            yield rates["synth"] / rates["bare"]


def bootstrap(ratios: list[float]) -> tuple[float, float]:
    """Return a 95 % bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (10_000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def measure_prefix(count: int, scratch: Path) -> None:
    """Print how many tokens the second task for an image finds in the prefix cache."""
    folder = make_large_model(scratch / "model")
    hits = {
        styles: prefix_hits(folder, styles, count, scratch) for styles in (("brief",), ("brief", "detailed"))
    }
    one_task, two_tasks = hits["brief",] / count, hits["brief", "detailed"] / count
    # Subtract the start of the system prompt, which every task reuses.
    gain = two_tasks - 2 * one_task
    print(
        f"the second task of an image found {gain:.0f} tokens more in the cache than the first; an image "
        f"has {IMAGE_TOKENS}"
    )


def make_large_model(folder: Path) -> Path:
    """Write a teacher with random weights and an image size of 448 px."""
    from transformers import PreTrainedTokenizerFast

    from examples.scenes.tiny_vlm import build_model, build_processor

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_WEIGHTS)
    processor = build_processor(tokenizer)
    processor.image_processor.size = {"shortest_edge": SIDE_PX**2, "longest_edge": SIDE_PX**2}
    build_model(tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def prefix_hits(model: Path, styles: tuple[str, ...], count: int, scratch: Path) -> float:
    """Return the number of tokens that a run on `count` images finds in the prefix cache."""
    options = {**UNUSABLE, "generate": UNUSABLE["generate"] | {"caption_styles": styles}}
    config = resolve(source="scenes", engine="vllm", tasks=["caption"], **options)
    images = photos(0, count, SIDE_PX)
    with serving(str(model), config, scratch / f"prefix-{len(styles)}.log") as (root, name):
        config = config.model_copy(update={"base_url": (f"{root}/v1",), "model": name})
        with open_client(config) as client:
            ask_synth(client, images, config, scratch)
        with urllib.request.urlopen(f"{root}/metrics", timeout=10) as response:
            lines = [
                line
                for line in response.read().decode().splitlines()
                if line.startswith("vllm:prefix_cache_hits_total")
            ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def photos(seed: int, count: int, side_px: int) -> Images:
    """Return `count` noise JPEGs. Each seed gives different images."""
    jpegs = [noise_jpeg(seed * count + number, (side_px, side_px), quality=75) for number in range(count)]
    return [(hashlib.sha256(jpeg).hexdigest(), (jpeg,)) for jpeg in jpegs]


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--scenes", type=int, default=96, help="images per run; three requests each")
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--images", type=int, default=64, help="photos of 448 px")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure_throughput(arguments.pairs, arguments.scenes, arguments.concurrency, Path(scratch))
        measure_prefix(arguments.images, Path(scratch))


if __name__ == "__main__":
    main()
