"""`synth doctor`: check what this machine can run, and what is missing. Nothing is changed."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.config import LARGE, TINY, Config
from pipeline.errors import ConfigError, SynthError
from pipeline.hub_errors import translate_hub_errors
from pipeline.inference.engines import TINY_WEIGHTS, pick_engine
from pipeline.inference.vllm import VLLM_PYTHON, has_gpu, vllm_python
from pipeline.install import DISTRIBUTION, install_command, installed_version
from pipeline.sources import find_source

LARGE_GIB = 8  # of GPU memory: 7.5 GiB of bfloat16 weights leave room for hardly anything else below this
MEMORY_FOR_WEIGHTS = 1.2  # times the weights: the rest is for what a model keeps of its requests
DISK_GIB = 20  # the 3B model, a dataset of some ten thousand photos, its version
EXTRAS = {
    "embedded": ("torch", "transformers", "llguidance", "torchvision"),
    "train": ("torch", "transformers", "tokenizers", "safetensors"),
}
_VERSION = "import vllm, torch; print(vllm.__version__, 'on torch', torch.__version__)"
_VLLM_SECONDS = 120  # importing it takes half of that on a busy machine


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    ok: bool
    found: str
    hint: str = ""


def examine(model: str | None = None) -> list[Finding]:
    """Run all checks, and return the findings in the order in which to fix them; with a `model`, also whether it fits here."""
    return [
        *([_model(model)] if model else []),
        Finding("synth", True, f"{DISTRIBUTION} {installed_version()} on Python {platform.python_version()}"),
        *(_extra(name) for name in EXTRAS),
        _vllm(),
        _gpu(),
        _engine("scenes"),
        _engine("folder:PATH"),
        _hub(),
        _disk(),
    ]


def _extra(name: str) -> Finding:
    installed, missing = [], []
    for package in EXTRAS[name]:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    hint = install_command(name) if missing else ""
    lack = f"missing: {', '.join(missing)}; " if missing else ""
    return Finding(name, not missing, lack + ", ".join(installed), hint)


def _vllm() -> Finding:
    python = vllm_python()
    if python is None:
        return Finding("vllm", False, "not installed", f"pip install vllm, or name an interpreter that has it: {VLLM_PYTHON}")
    try:
        done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, timeout=_VLLM_SECONDS)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("vllm", False, f"{python} cannot be run: {error}", f"check {VLLM_PYTHON}")
    output = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["nothing was said"]
    return Finding("vllm", done.returncode == 0, output[-1], "" if done.returncode == 0 else f"{python} cannot import vLLM")


def _gpu() -> Finding:
    if not has_gpu():
        return Finding("gpu", False, "none", "the 3B model needs one, or a server elsewhere: --base-url")
    try:
        return judge_gpus(_nvidia_smi())
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", False, f"nvidia-smi does not answer: {error}", "check the driver")


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout  # noqa: S603


def _cards(listed: str) -> list[list[str]]:
    """Return name, total and free MiB of each card, of the lines of nvidia-smi."""
    lines = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    return [card for card in lines if len(card) == 3 and card[1].isdigit() and card[2].isdigit()]


def _model(name: str) -> Finding:
    """Return whether the weights of a model fit into the memory of the roomiest GPU, or of this machine if there is none."""
    path = str(TINY_WEIGHTS) if name == TINY else name
    try:
        weights_gib = weights_bytes(path) / 2**30
        free_gib, where = _free_memory_gib()
    except (OSError, SynthError, subprocess.TimeoutExpired) as error:
        return Finding("model", False, f"{name}: {error}", "check the name, the network, and HF_TOKEN if it is gated")
    if not weights_gib:
        return Finding("model", False, f"{name} has no weights", "a model has *.safetensors or *.bin files")
    needed_gib = weights_gib * MEMORY_FOR_WEIGHTS
    found = f"{name}: {weights_gib:.1f} GiB of weights, {free_gib:.1f} GiB free in {where}"
    hint = f"it wants {needed_gib:.1f} GiB: a smaller model, several GPUs (-- --tensor-parallel-size), or a server elsewhere"
    return Finding("model", free_gib >= needed_gib, found, "" if free_gib >= needed_gib else hint)


def weights_bytes(name: str) -> int:
    """Return how large the weights of a model are, in a folder or on the Hub. Raises ConfigError if it is not there."""
    folder = Path(name)
    if folder.is_dir():
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    else:
        from huggingface_hub import HfApi

        with translate_hub_errors(name, "model", ConfigError, "check the network", or_folder=True):
            files = HfApi().model_info(name, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}
    for suffix in (".safetensors", ".bin"):  # a repository may hold the same weights as both
        if of_kind := [size for file, size in sizes.items() if file.endswith(suffix)]:
            return sum(of_kind)
    return 0


def _free_memory_gib() -> tuple[float, str]:
    cards = _cards(_nvidia_smi()) if has_gpu() else []
    if cards:
        return max(int(card[2]) for card in cards) / 1024, "the GPU"
    lines = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    if available := re.search(r"^MemAvailable:\s*(\d+) kB", lines, re.MULTILINE):
        return int(available[1]) / 2**20, "memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, "memory in all"


def judge_gpus(listed: str) -> Finding:
    """Judge the lines of nvidia-smi: `name, total MiB, free MiB` each."""
    cards = _cards(listed)
    if not cards:
        return Finding("gpu", False, "nvidia-smi lists none", "check the driver")
    name, total, free = max(cards, key=lambda card: int(card[2]))
    summary = f"{len(cards)} x {name}, {int(free) / 1024:.0f} of {int(total) / 1024:.0f} GiB free"
    enough = int(free) >= LARGE_GIB * 1024
    return Finding("gpu", enough, summary, "" if enough else f"{LARGE} needs {LARGE_GIB} GiB: end what else uses the GPU")


def _engine(source: str) -> Finding:
    """Return which engine `--engine auto` would use, without a request to the Hub."""
    config = Config(source=source)
    name, why = pick_engine(config)
    if (model := find_source(source).model) != LARGE:
        return Finding("auto", True, f"{source}: {name} with {model}, because {why}")
    hint = "" if name == "vllm" else "slow without a GPU: name a server with --base-url, or a smaller model with --model"
    return Finding("auto", name == "vllm", f"{source}: {name} with {LARGE}, because {why}", hint)


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return Finding("hub", False, "HF_HUB_OFFLINE is set", "unset it to push, or to load a model or dataset by name")
    if get_token() is None:
        return Finding("hub", False, f"no token for {ENDPOINT}", "hf auth login; only `synth push` and gated data need one")
    return Finding("hub", True, f"a token for {ENDPOINT} is here; whether it may write is seen at the first push")


def _disk() -> Finding:
    try:
        free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    except OSError as error:
        return Finding("disk", False, f"this folder cannot be read: {error}", "go to another folder")
    writable = os.access(Path.cwd(), os.W_OK)
    space = f"{free_gib:.0f} GiB free here" + ("" if writable else ", but this folder cannot be written to")
    enough = free_gib >= DISK_GIB
    hint = "" if enough else f"the 3B model and a dataset of photos want {DISK_GIB} GiB"
    return Finding("disk", enough and writable, space, hint or ("" if writable else "go to another folder, or pass --out DIR"))
