"""`synth doctor`: report what this machine can run, and which parts are missing. Nothing is changed."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path

from pipeline.config import LARGE, TINY, Config
from pipeline.inference.engines import HOW_TO_CHOOSE, pick_engine
from pipeline.inference.memory import GIB, QWEN_3B, needed_gib
from pipeline.inference.model_licenses import license_of
from pipeline.inference.vllm import VLLM_PYTHON, gpu_memory_gib, visible_gpus, vllm_python
from pipeline.install import DISTRIBUTION, install_command, installed_version
from pipeline.sources import find_source
from pipeline.tasks.base import MAX_PIXELS

# Free GPU memory that the default model needs.
LARGE_GIB = needed_gib(QWEN_3B, MAX_PIXELS)
# Disk space for the default model, a dataset of about 10,000 photos, and one version of it.
DISK_GIB = 20
EXTRAS = {
    "embedded": ("torch", "transformers", "llguidance", "torchvision"),
    "train": ("torch", "transformers", "tokenizers", "safetensors", "torchvision"),
}
_VLLM_VERSION = "import vllm, torch; print(vllm.__version__, 'on torch', torch.__version__)"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    is_ok: bool
    result: str
    hint: str = ""


def examine() -> list[Finding]:
    """Run all checks. Failures should be fixed in the order of the returned findings."""
    return [
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
    problem = f"missing: {', '.join(missing)}; " if missing else ""
    hint = install_command(name) if missing else ""
    return Finding(name, not missing, problem + ", ".join(installed), hint)


def _vllm() -> Finding:
    python = vllm_python()
    if python is None:
        return Finding("vllm", False, "not installed", f"pip install vllm, or set {VLLM_PYTHON}")
    command = [python, "-c", _VLLM_VERSION]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("vllm", False, f"cannot run {python}: {error}", f"check {VLLM_PYTHON}")
    if done.returncode == 0:
        return Finding("vllm", True, done.stdout.strip())
    output = done.stderr.strip().splitlines() or ["no output"]
    return Finding("vllm", False, output[-1], f"{python} cannot import vLLM")


def _gpu() -> Finding:
    gpus = visible_gpus()
    if not gpus:
        return Finding("gpu", False, "none", "the default model needs a GPU, or a server (--base-url)")
    sizes = [size for gpu in gpus if (size := gpu_memory_gib((gpu,)))]
    if not sizes:
        return Finding("gpu", False, "nvidia-smi reports no GPU memory", "check the NVIDIA driver")
    total_gib, free_gib = max(sizes, key=itemgetter(1))
    summary = f"{len(gpus)} visible; the best has {free_gib:.0f} of {total_gib:.0f} GiB free"
    is_enough = free_gib >= LARGE_GIB
    hint = f"{LARGE} needs {LARGE_GIB:g} GiB of free GPU memory: end other programs, or use AWQ weights"
    return Finding("gpu", is_enough, summary, "" if is_enough else hint)


def _engine(source: str) -> Finding:
    """Report which engine `--engine auto` would use. No request is sent to the Hub."""
    name, reason = pick_engine(Config(source=source))
    model = find_source(source).model
    is_possible = name == "vllm" or model == TINY
    engine = name if is_possible else "no engine"
    choice = f"{source}: {engine} with {model} ({license_of(model)}), because {reason}"
    return Finding("auto", is_possible, choice, "" if is_possible else HOW_TO_CHOOSE)


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        hint = "unset it to push, or to load models or datasets from the Hub"
        return Finding("hub", False, "HF_HUB_OFFLINE is set", hint)
    if get_token() is None:
        hint = "run `hf auth login`; only `synth push` and gated data need a token"
        return Finding("hub", False, f"no token for {ENDPOINT}", hint)
    result = f"a token for {ENDPOINT} is set; the first push shows whether it has write access"
    return Finding("hub", True, result)


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / GIB
    space = f"{free_gib:.0f} GiB free here"
    if not os.access(Path.cwd(), os.W_OK):
        hint = "go to another folder, or pass --out DIR"
        return Finding("disk", False, f"{space}, but this folder cannot be written to", hint)
    is_enough = free_gib >= DISK_GIB
    hint = f"the default model and a dataset of photos need {DISK_GIB} GiB"
    return Finding("disk", is_enough, space, "" if is_enough else hint)
