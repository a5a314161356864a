"""Build the commands that start vLLM on this machine: flags, environment, and the GPUs of each server."""

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import EngineError, one_line
from pipeline.sources import holds_decks
from pipeline.tasks.base import MAX_PAGES

STRUCTURED_OUTPUTS = {"backend": "guidance", "disable_any_whitespace": True, "disable_additional_properties": True}
MIN_TOKENS = 1024
MAX_TOKENS = 8192  # of prompt and reply, unless the model holds less; an image of 5 megapixels fits
MAX_DECK_TOKENS = 16_384  # twenty pages of 700 x 850 px fit; larger pages are scaled down equally
BFLOAT16_CAPABILITY = 8.0  # NVIDIA's compute capability, from Ampere on; a T4 has 7.5
_GPU = re.compile(r"\d+|(?:GPU|MIG)-\S+")  # an entry of CUDA_VISIBLE_DEVICES
_PARALLEL = {  # flags of vLLM by which one server uses several GPUs
    "--tensor-parallel-size": "tensor", "-tp": "tensor",
    "--pipeline-parallel-size": "pipeline", "-pp": "pipeline",
    "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCommand:
    """The command line, environment and limits of a server, known before it starts."""

    python: str
    name: str  # of the model at the server: base name and revision, without a path
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    max_num_seqs: int
    max_model_len: int
    max_restarts: int
    startup_timeout_s: float
    api_key: str = field(default_factory=lambda: os.environ.get("SYNTH_API_KEY") or secrets.token_urlsafe(24), repr=False)
    port: int | None = None

    def command(self, address: int | Path, media: Path) -> list[str]:
        """Return the command line that serves on a port, or a Unix socket, and may read images under `media`."""
        listens = ["--uds", str(address)] if isinstance(address, Path) else ["--host", "127.0.0.1", "--port", str(address)]
        return [self.python, *self.arguments, *listens, "--allowed-local-media-path", str(media)]


def plan_vllm_command(
    python: str,
    model: str,
    revision: str,
    config: Config,
    log: Path,
    *,
    gpus: Sequence[str],
    cores: int,
    memory_gib: float,
    dtype: str = "bfloat16",
) -> VllmCommand:
    """Choose flags for a model (a folder or a Hub id) on this machine; the user's flags come last and override these.

    `gpus` are those of this server, as CUDA_VISIBLE_DEVICES names them; none for a server on CPUs. `cores` and `memory_gib` are
    its share of the machine's. `dtype` is that of its products.
    """
    server = config.server
    decks = holds_decks(config)
    name = f"{Path(model).name}@{revision}"
    length = min(_context_length(model), MAX_DECK_TOKENS if decks else MAX_TOKENS)
    seqs = 256 if gpus else 32
    options: dict[str, str] = {
        "--served-model-name": name,
        "--dtype": dtype,
        "--max-model-len": str(length),
        "--max-num-seqs": str(seqs),
        "--limit-mm-per-prompt": json.dumps({"image": MAX_PAGES if decks else 1, "video": 0}, separators=(",", ":")),
        "--structured-outputs-config": json.dumps(STRUCTURED_OUTPUTS, separators=(",", ":")),
        "--generation-config": "vllm",  # else the model's generation_config.json changes the sampling
        "--uvicorn-log-level": "warning",
    }
    switches = ["--enable-prompt-tokens-details"]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
        model = str(Path(model).absolute())
    else:
        options["--revision"] = revision.partition("+")[0]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # Each API server prepares images on one thread, which for a small model is the bottleneck, not the GPU.
        options |= {"--gpu-memory-utilization": "0.92", "--max-num-batched-tokens": "16384"}
        options["--api-server-count"] = str(max(1, min(4, cores // 4)))
        entry = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    else:
        # Blocks of 32 tokens: the CPU default of 128 hardly shares any prefix. Spinning threads make it 8 times slower.
        options["--block-size"] = "32"
        switches.append("--enforce-eager")
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, int(memory_gib // 8))),
            "OMP_NUM_THREADS": str(max(1, cores - 1)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        # The console script of vllm-cpu fails to find its own version; the module does not need it.
        entry = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    flags = [part for pair in options.items() for part in pair]
    return VllmCommand(
        python=python,
        name=name,
        arguments=(*entry, *flags, *switches, *server.flags),
        environment=environment,
        log=log,
        max_num_seqs=_read_number(server.flags, "--max-num-seqs", seqs),
        max_model_len=_read_number(server.flags, "--max-model-len", length),
        max_restarts=server.max_restarts,
        startup_timeout_s=server.startup_timeout_s,
    )


def _context_length(model: str) -> int:
    """Return the context of a model folder in tokens; MAX_DECK_TOKENS for a Hub id, which is not downloaded yet."""
    file = Path(model) / "config.json"
    if not file.exists():
        return MAX_DECK_TOKENS
    settings = model_settings(file)
    settings = settings.get("text_config") or settings
    return int(settings.get("max_position_embeddings") or MIN_TOKENS)


def model_settings(file: Path) -> dict[str, Any]:
    """Return a file of settings of a model. Raises EngineError if it is not an object in JSON."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read {file}: {one_line(error)}", hint="copy the model again") from None
    if not isinstance(settings, dict):
        raise EngineError(f"{file} holds no settings", hint="copy the model again")
    return settings


def _read_number(flags: tuple[str, ...], name: str, default: int) -> int:
    """Return the last value of a flag if it is a plain number, else the default: vLLM also accepts `auto` and `8k`."""
    words = [word for flag in flags for word in split_flag(flag)]
    values = [value for flag, value in pairwise(words) if flag == name]
    return int(values[-1]) if values and values[-1].isdigit() else default


@cache
def visible_gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as entries of CUDA_VISIBLE_DEVICES; () without a driver.

    Entries of CUDA_VISIBLE_DEVICES, such as UUIDs of MIG instances, are returned as they are. torch is not imported for this:
    its import takes seconds.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)  # noqa: S607
    except (OSError, subprocess.SubprocessError):
        return ()
    count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not count:
        return tuple(map(str, range(count)))
    entries = (entry.strip() for entry in visible.split(","))
    return tuple(takewhile(_GPU.fullmatch, entries))  # CUDA ignores the entries after an invalid one, such as -1


@cache
def has_bfloat16() -> bool:
    """Return whether all GPUs of this machine multiply in bfloat16; vLLM refuses it on others. True where nobody can tell."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return all(float(line) >= BFLOAT16_CAPABILITY for line in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return True


def split_flag(flag: str) -> list[str]:
    """Return `--name=value` as name and value; vLLM takes underscores in names for hyphens."""
    name, equals, value = flag.partition("=")
    return [name.replace("_", "-") if name.startswith("-") else name, *([value] if equals else [])]


def group_gpus(gpus: Sequence[str], flags: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the GPUs of each server: one each, or as many as the user's flags give to one; () is a server without a GPU."""
    words = [word for flag in flags for word in split_flag(flag)]
    sizes = {_PARALLEL[word]: value for word, value in pairwise(words) if word in _PARALLEL}
    if not gpus or "data" in sizes or not all(value.isdigit() and int(value) for value in sizes.values()):
        return [tuple(gpus)]
    size = int(sizes.get("tensor", "1")) * int(sizes.get("pipeline", "1"))
    whole = [tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]
    return whole or [tuple(gpus)]
