"""`synth doctor`: report what this machine can run, and which parts are missing. Nothing is changed."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.config import CONTEXT, LARGE, TINY, Config
from pipeline.config.files import read_task, resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import ConfigError, SynthError
from pipeline.hub_errors import translate_hub_errors
from pipeline.inference.engines import TINY_WEIGHTS, choose_engine, pick_engine
from pipeline.inference.memory import GIB, QWEN_3B, ModelShape, find_shape, memory_table, needed_gib
from pipeline.inference.model_licenses import license_of
from pipeline.inference.requests import check_prompts
from pipeline.inference.vllm import MAX_TOKENS, VLLM_PYTHON, has_gpu, vllm_python
from pipeline.install import DISTRIBUTION, install_command, installed_version
from pipeline.plan import Plan
from pipeline.sources import find_source
from pipeline.tasks.base import MAX_PIXELS
from pipeline.tasks.prompts import STYLES, names_in
from pipeline.text.escape import without_passwords

# Free GPU memory that the default model needs.
LARGE_GIB = needed_gib(QWEN_3B, MAX_PIXELS)
# Memory that a model needs, relative to the size of its weights. The part above 1 is for requests.
MEMORY_PER_WEIGHTS = 1.2
# Disk space for the default model, a dataset of some ten thousand photos, and one version of it.
DISK_GIB = 20
GPU = "the GPU"
EXTRAS = {
    "embedded": ("torch", "transformers", "llguidance", "torchvision"),
    "train": ("torch", "transformers", "tokenizers", "safetensors"),
}
_VLLM_VERSION = "import vllm, torch; print(vllm.__version__, 'on torch', torch.__version__)"
_VLLM_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    is_ok: bool
    result: str
    hint: str = ""


def examine(model: str | None = None) -> list[Finding]:
    """Run all checks, in the order in which to fix failures. With `model`, also check whether it fits."""
    return [
        *(_model(model) if model else []),
        Finding("synth", True, f"{DISTRIBUTION} {installed_version()} on Python {platform.python_version()}"),
        *(_extra(name) for name in EXTRAS),
        _vllm(),
        _gpu(),
        *([] if model else [_memory(QWEN_3B)]),
        _engine("scenes"),
        _engine("folder:PATH"),
        _hub(),
        _disk(),
    ]


def check_server(urls: Sequence[str], model: str | None = None) -> Finding:
    """Ask servers for their models, as a run does before its first request."""
    try:
        choice = choose_engine(resolve(source="folder:.", base_url=urls, model=model))
    except SynthError as error:
        return Finding("server", False, str(error), error.hint)
    shown = ", ".join(map(without_passwords, urls))
    return Finding("server", True, f"{shown}: {choice.model} ({license_of(choice.model)})")


def check_tasks(paths: Sequence[Path]) -> Finding:
    """Check custom tasks and their prompts without a source. All columns that they use count as mapped."""
    try:
        tasks = [read_task(path) for path in paths]
        columns = ",".join(sorted({name for task in tasks for name in _columns_of(task)}))
        config = resolve(
            source="folder:.",
            columns={CONTEXT: columns},
            tasks=["caption", "qa"],
            custom_tasks=tasks,
            generate={"caption_styles": STYLES},
        )
        check_prompts(Plan.resolve(config, DatasetDir(Path())).requests, has_checks=False)
    except SynthError as error:
        return Finding("tasks", False, str(error), error.hint)
    names = ", ".join(f"{task['name']} ({task['kind']})" for task in tasks)
    return Finding("tasks", True, names + (f"; needs --columns context={columns}" if columns else ""))


def _columns_of(task: dict[str, Any]) -> set[str]:
    """Return the columns that a task uses. check_prompts reports an invalid template."""
    try:
        return {*names_in(task["prompt"], "row"), *task.get("require", ())}
    except TemplateError:
        return set()


def _extra(name: str) -> Finding:
    installed, missing = [], []
    for package in EXTRAS[name]:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    problem = f"missing: {', '.join(missing)}; " if missing else ""
    return Finding(
        name, not missing, problem + ", ".join(installed), install_command(name) if missing else ""
    )


def _vllm() -> Finding:
    python = vllm_python()
    if python is None:
        return Finding("vllm", False, "not installed", f"pip install vllm, or set {VLLM_PYTHON}")
    command = [python, "-c", _VLLM_VERSION]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_VLLM_TIMEOUT_S)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("vllm", False, f"cannot run {python}: {error}", f"check {VLLM_PYTHON}")
    if done.returncode == 0:
        return Finding("vllm", True, done.stdout.strip())
    output = done.stderr.strip().splitlines() or ["no output"]
    return Finding("vllm", False, output[-1], f"{python} cannot import vLLM")


def _gpu() -> Finding:
    if not has_gpu():
        return Finding("gpu", False, "none", "the default model needs a GPU, or a server: --base-url")
    try:
        return judge_gpus(_nvidia_smi())
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", False, f"nvidia-smi failed: {error}", "check the NVIDIA driver")


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout  # noqa: S603


def judge_gpus(listed: str) -> Finding:
    """Return a finding about the output lines of nvidia-smi: `name, total MiB, free MiB`."""
    cards = _parse_cards(listed)
    if not cards:
        return Finding("gpu", False, "nvidia-smi lists no GPU", "check the NVIDIA driver")
    name, total_mib, free_mib = max(cards, key=lambda card: card[2])
    summary = f"{len(cards)} x {name}, {free_mib / 1024:.0f} of {total_mib / 1024:.0f} GiB free"
    is_enough = free_mib >= LARGE_GIB * 1024
    hint = f"{LARGE} needs {LARGE_GIB:g} GiB of free GPU memory: end other programs that use the GPU"
    return Finding("gpu", is_enough, summary, "" if is_enough else hint)


def _parse_cards(listed: str) -> list[tuple[str, int, int]]:
    """Return the name, total MiB and free MiB of each GPU."""
    lines = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    valid = [line for line in lines if len(line) == 3 and line[1].isdigit() and line[2].isdigit()]
    return [(name, int(total), int(free)) for name, total, free in valid]


def _model(name: str) -> list[Finding]:
    """Check whether a model fits on the GPU with the most free memory, or in main memory without a GPU."""
    model = f"{name} ({license_of(name)})"
    try:
        folder = str(TINY_WEIGHTS) if name == TINY else name
        size_bytes = weights_bytes(folder)
        shape = find_shape(folder, size_bytes)
        free_gib, place = _free_memory_gib()
    except (OSError, SynthError, subprocess.TimeoutExpired) as error:
        hint = "check the name, the network, and HF_TOKEN if it is gated"
        return [Finding("model", False, f"{model}: {error}", hint)]
    if not size_bytes:
        hint = "choose a model with *.safetensors files"
        return [Finding("model", False, f"{model} has no weight files", hint)]
    weights_gib = size_bytes / GIB
    least_gib = needed_gib(shape, MAX_PIXELS) if shape and place == GPU else weights_gib * MEMORY_PER_WEIGHTS
    fits = free_gib >= least_gib
    summary = f"{model}: {weights_gib:.1f} GiB of weights, {free_gib:.1f} GiB free in {place}"
    choices = "a smaller model, several GPUs (-- --tensor-parallel-size), or a server elsewhere"
    finding = Finding("model", fits, summary, "" if fits else f"it needs {least_gib:.1f} GiB: use {choices}")
    return [finding, *([_memory(shape)] if shape else [])]


def _memory(shape: ModelShape) -> Finding:
    """Return the memory that a model takes on GPUs of several sizes."""
    title = "GiB on GPUs of several sizes, estimated from the shape of the model"
    lines = [title, *memory_table(shape, MAX_PIXELS, MAX_TOKENS)]
    return Finding("memory", True, f"\n{' ' * 18}".join(lines))


def weights_bytes(name: str) -> int:
    """Return the byte size of the weights in a folder or Hub model. Raises ConfigError if it is missing."""
    folder = Path(name)
    if folder.is_dir():
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    else:
        from huggingface_hub import HfApi

        with translate_hub_errors(name, "model", ConfigError, "check the network", or_folder=True):
            files = HfApi().model_info(name, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in files if "/" not in file.rfilename}
    # A repository may hold the same weights in both formats, so count only one.
    by_suffix = [
        sum(size for file, size in sizes.items() if file.endswith(end)) for end in (".safetensors", ".bin")
    ]
    return by_suffix[0] or by_suffix[1]


def _free_memory_gib() -> tuple[float, str]:
    cards = _parse_cards(_nvidia_smi()) if has_gpu() else []
    if cards:
        return max(free_mib for _, _, free_mib in cards) / 1024, GPU
    lines = Path("/proc/meminfo").read_text()
    available = re.search(r"^MemAvailable:\s*(\d+) kB", lines, re.MULTILINE)
    return (int(available[1]) / 2**20 if available else 0.0), "memory"


def _engine(source: str) -> Finding:
    """Report which engine `--engine auto` would use. No request is sent to the Hub."""
    name, reason = pick_engine(Config(source=source))
    model = find_source(source).model
    is_fast = name == "vllm" or model != LARGE
    hint = "" if is_fast else "slow without a GPU: use a server (--base-url), or a smaller model (--model)"
    choice = f"{source}: {name} with {model} ({license_of(model)}), because {reason}"
    return Finding("auto", is_fast, choice, hint)


def _hub() -> Finding:
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        hint = "unset it to push, or to load models or datasets from the Hub"
        return Finding("hub", False, "HF_HUB_OFFLINE is set", hint)
    if get_token() is None:
        hint = "run `hf auth login`; only `synth push` and gated data need a token"
        return Finding("hub", False, f"no token for {ENDPOINT}", hint)
    return Finding(
        "hub", True, f"a token for {ENDPOINT} is set; the first push shows whether it has write access"
    )


def _disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / GIB
    space = f"{free_gib:.0f} GiB free here"
    if not os.access(Path.cwd(), os.W_OK):
        hint = "go to another folder, or pass --out DIR"
        return Finding("disk", False, f"{space}, but this folder cannot be written to", hint)
    is_enough = free_gib >= DISK_GIB
    hint = f"the default model and a dataset of photos need {DISK_GIB} GiB"
    return Finding("disk", is_enough, space, "" if is_enough else hint)
