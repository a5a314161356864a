"""How vLLM is started on this machine: its flags and its environment."""

import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Config
from pipeline.tasks import asks_about_decks
from pipeline.tasks.base import MAX_PAGES

BACKEND = {"backend": "guidance", "disable_any_whitespace": True, "disable_additional_properties": True}
MIN_TOKENS = 1024
MAX_TOKENS = 8192  # of prompt and reply, unless the model holds less; an image of 5 megapixels fits
MAX_DECK_TOKENS = 16_384  # twenty pages of 700 x 850 px fit; larger ones are scaled down, all alike


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCommand:
    """How a server is started; all that can be known before."""

    python: str
    name: str  # what the server calls the model: its base name with its revision, and no path
    arguments: tuple[str, ...]
    environment: dict[str, str]
    log: Path
    max_num_seqs: int
    max_model_len: int
    max_restarts: int
    startup_timeout_s: float
    api_key: str = field(default_factory=lambda: os.environ.get("SYNTH_API_KEY") or secrets.token_urlsafe(24), repr=False)
    port: int | None = None

    def command(self, port: int, media: Path) -> list[str]:
        """Return the command line that serves on `port` and may read images under `media`."""
        ours = ["--host", "127.0.0.1", "--port", str(port), "--allowed-local-media-path", str(media)]
        return [self.python, *self.arguments, *ours]


def plan_vllm_command(
    python: str, model: str, revision: str, config: Config, log: Path, *, gpu: bool, cores: int, memory_gib: float
) -> VllmCommand:
    """Choose flags for a model (a folder or a Hub id) on this machine; the user's own come last and win."""
    server = config.server
    decks = asks_about_decks(config.tasks)
    name = f"{Path(model).name}@{revision}"
    length = min(_context(model), MAX_DECK_TOKENS if decks else MAX_TOKENS)
    seqs = 256 if gpu else 32
    chosen: dict[str, str] = {
        "--served-model-name": name,
        "--dtype": "bfloat16",
        "--max-model-len": str(length),
        "--max-num-seqs": str(seqs),
        "--limit-mm-per-prompt": json.dumps({"image": MAX_PAGES if decks else 1, "video": 0}, separators=(",", ":")),
        "--structured-outputs-config": json.dumps(BACKEND, separators=(",", ":")),
        "--generation-config": "vllm",  # else the model's own file changes how tokens are chosen
        "--uvicorn-log-level": "warning",
    }
    switches = ["--enable-prompt-tokens-details"]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
        model = str(Path(model).absolute())
    else:
        chosen["--revision"] = revision.partition("+")[0]
    if gpu:
        # Images are prepared on one thread of each API server: that thread, not the GPU, is what a small model waits for.
        chosen |= {"--gpu-memory-utilization": "0.92", "--max-num-batched-tokens": "16384"}
        chosen["--api-server-count"] = str(max(1, min(4, cores // 4)))
        entry = ["-m", "vllm.entrypoints.cli.main", "serve", model]
    else:
        # Blocks of 32: the default of 128 tokens for CPUs would share hardly any prefix. Threads that spin cost 8 times.
        chosen["--block-size"] = "32"
        switches.append("--enforce-eager")
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, int(memory_gib // 8))),
            "OMP_NUM_THREADS": str(max(1, cores - 1)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        # The console script of vllm-cpu does not find its own version; the module does without.
        entry = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    flags = [part for pair in chosen.items() for part in pair]
    return VllmCommand(
        python=python,
        name=name,
        arguments=(*entry, *flags, *switches, *server.flags),
        environment=environment,
        log=log,
        max_num_seqs=_number(_given(server.flags, "--max-num-seqs"), seqs),
        max_model_len=_number(_given(server.flags, "--max-model-len"), length),
        max_restarts=server.max_restarts,
        startup_timeout_s=server.startup_timeout_s,
    )


def _context(model: str) -> int:
    """Return how many tokens a model folder holds; of a Hub id it is not known before it is there."""
    file = Path(model) / "config.json"
    if not file.exists():
        return MAX_DECK_TOKENS
    found = json.loads(file.read_text(encoding="utf-8"))
    found = found.get("text_config") or found
    return int(found.get("max_position_embeddings") or MIN_TOKENS)


def _given(flags: tuple[str, ...], name: str) -> str | None:
    """Return the value of a flag, written `--flag value` or `--flag=value`; the last one counts."""
    value = None
    for at, flag in enumerate(flags):
        if flag == name and at + 1 < len(flags):
            value = flags[at + 1]
        elif flag.startswith(f"{name}="):
            value = flag.partition("=")[2]
    return value


def _number(given: str | None, ours: int) -> int:
    """Return a plain number that the user gave; vLLM also takes `auto` and `8k`, which are its own business."""
    return int(given) if given and given.isdigit() else ours
