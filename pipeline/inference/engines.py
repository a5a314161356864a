"""Choose the engine and the model before anything is loaded. Request ids depend on the model's revision."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import NO_MODEL, TINY, Config
from pipeline.config.sections import BoxUnit, ServerConfig
from pipeline.digests import digest, weights_revision
from pipeline.errors import ConfigError, EngineError
from pipeline.hub_errors import translate_hub_errors
from pipeline.inference.requests import RequestPlan
from pipeline.inference.vllm import VllmCommand, has_gpu, parse_flags, plan_servers, require_vllm, vllm_python
from pipeline.install import install_command
from pipeline.progress import Progress
from pipeline.sources import find_source
from pipeline.tasks.base import MAX_DETAIL_PIXELS
from pipeline.types import Engine

_WEIGHTS = Path(__file__).parents[1] / "scenes" / "weights"
TINY_WEIGHTS, TINY_DECK_WEIGHTS = _WEIGHTS / "teacher", _WEIGHTS / "deck_teacher"
HOW_TO_CHOOSE = (
    "pass --base-url with a running server (vLLM, Ollama, llama.cpp), or --engine vllm if vLLM is installed "
    "here; to try the pipeline on any image, pass --engine embedded --model tiny"
)
# Formats other than safetensors. Such files are most often copies of the same weights.
IGNORED_FILES = ["*.gguf", "*.bin", "*.pt*", "*.h5", "*.msgpack", "*.onnx*", "original/*", "consolidated*"]
OUTPUT_NEUTRAL_FLAGS = frozenset(
    f"--{name}"
    for name in (
        "api-server-count", "block-size", "enforce-eager", "gpu-memory-utilization", "kv-cache-memory-bytes",
        "max-model-len", "max-num-batched-tokens", "max-num-seqs", "performance-mode",
        "pipeline-parallel-size", "swap-space", "tensor-parallel-size", "uvicorn-log-level",
    )
)  # fmt: skip

# The unit of bounding boxes by a regular expression for lower-case model names. Source: model cards.
BOX_UNITS: dict[str, BoxUnit] = {
    r"qwen2[._]?5[-_]?vl|caprl-3b": "pixels",
    r"qwen3[-_]?vl|internvl[-_]?3(?![._]?5)": "thousandths",
}


def box_unit_of(model: str) -> BoxUnit | None:
    """Return the unit in which a model writes bounding boxes, or None if it is unknown."""
    name = model.casefold().rstrip("/").rpartition("/")[2]
    return next((unit for pattern, unit in BOX_UNITS.items() if re.search(pattern, name)), None)


class EngineChoice(NamedTuple):
    """The chosen engine, which `make` creates. Without `urls` of servers, the model runs on this machine."""

    name: str
    model: str
    revision: str
    make: Callable[[], Engine]
    urls: tuple[str, ...] = ()


def choose_engine(config: Config, requests: RequestPlan, log: Path, progress: Progress) -> EngineChoice:
    """Choose the engine that answers requests. `log` is the log file of a server that synth starts.

    Raises ConfigError if settings cannot be combined, and EngineError if this machine cannot run the
    model, or if the servers of --base-url do not answer.
    """
    if not config.asks_model:
        return EngineChoice(NO_MODEL, NO_MODEL, NO_MODEL, _no_engine)
    name, reason = pick_engine(config)
    if config.server.flags and (name != "vllm" or config.base_url):
        problem = "there are flags for vLLM (after -- or in the settings), but synth starts no server"
        raise ConfigError(problem, hint="leave out the flags")
    if name == "vllm" and config.base_url:
        from pipeline.inference.probing import find_model

        served, revision = find_model(config.base_url, config.model, config.server)
        make = partial(_make_client, served, config.server, requests, progress, urls=config.base_url)
        return EngineChoice(name, served, revision, make, config.base_url)
    model = config.model or find_source(config.source).model
    if model == TINY:
        _require_drawn_images(config)
    if name == "embedded":
        if model != TINY:
            why = "--engine embedded runs only the tiny model" if config.engine == "embedded" else reason
            raise EngineError(f"{model} needs a server: {why}", hint=HOW_TO_CHOOSE)
        folder = TINY_DECK_WEIGHTS if requests.has_decks else TINY_WEIGHTS
        return EngineChoice(name, model, weights_revision(folder), partial(_embedded, folder))
    revision, find_folder = _find_weights(model, progress, decks=requests.has_decks)
    revision += _output_affecting_flags(config.server.flags)
    start = partial(_start_vllm, model, find_folder, revision, config.server, requests, log, progress)
    return EngineChoice(name, model, revision, start)


def _output_affecting_flags(flags: tuple[str, ...]) -> str:
    """Return a suffix for the revision if flags may change the replies, such as --quantization."""
    words_by_flag = parse_flags(flags).items()
    affecting = [word for name, words in words_by_flag if name not in OUTPUT_NEUTRAL_FLAGS for word in words]
    return f"+{digest(affecting)[:8]}" if affecting else ""


def pick_engine(config: Config) -> tuple[str, str]:
    """Return the engine, `embedded` or `vllm`, and the reason for the choice."""
    if config.engine == "embedded" and config.base_url:
        raise ConfigError("--base-url and --engine embedded cannot be combined", hint="leave one of them out")
    if config.engine != "auto":
        return config.engine, f"--engine {config.engine}"
    if config.base_url:
        return "vllm", "--base-url names a server"
    if has_gpu() and vllm_python():
        return "vllm", "this machine has a GPU and vLLM"
    return "embedded", f"no --base-url, and {'vLLM is not installed' if has_gpu() else 'no GPU'}"


def _no_engine() -> Engine:
    raise EngineError("internal error: a run without a model sends a request", hint="please report this bug")


def _require_drawn_images(config: Config) -> None:
    """Raise ConfigError if the tiny model does not support the source or a setting."""
    if find_source(config.source).model != TINY and config.engine != "embedded":
        problem = f"the model `tiny` can only describe --source scenes, not {config.source}"
        raise ConfigError(problem, hint=HOW_TO_CHOOSE)
    from pipeline.scenes.text import STYLES

    if "covers" in config.verify.checks or config.verify.repair:
        hint = "leave out the check `covers` and --repair, or pass a larger model: --model, --base-url"
        raise ConfigError("the model `tiny` can neither read nor repair captions", hint=hint)
    unknown = [style for style in config.generate.caption_styles if style not in STYLES]
    if unknown:
        problem = f"the model `tiny` does not support the caption style {unknown[0]}"
        raise ConfigError(problem, hint=f"use {', '.join(STYLES)}, or pass a larger model: --model")


def _find_weights(model: str, progress: Progress, *, decks: bool = False) -> tuple[str, Callable[[], Path]]:
    """Return the revision of a model, and a function that returns its folder after a download."""
    tiny = TINY_DECK_WEIGHTS if decks else TINY_WEIGHTS
    folder = tiny if model == TINY else Path(model)
    if model == TINY or folder.is_dir():
        if model != TINY:
            progress.message(f"computing the digest of {folder}, which identifies the model")
        return weights_revision(folder), lambda: folder
    from huggingface_hub import HfApi

    hint = "check the network, or pass a model folder (--model FOLDER) or a server (--base-url)"
    with translate_hub_errors(model, "model", EngineError, hint, or_folder=True):
        commit = str(HfApi().model_info(model).sha)
    return commit, partial(download_model, model, commit, progress)


def download_model(model: str, commit: str, progress: Progress) -> Path:
    """Return the folder of a Hub model in the local cache. An interrupted download resumes.

    Call this before starting a server, because the start of a server has a time limit. Raises EngineError if
    the Hub does not answer, the model has no safetensors, or the disk is too small.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    hint = "run the same command again: the download resumes"
    with translate_hub_errors(model, "model", EngineError, hint, or_folder=True):
        files = snapshot_download(model, revision=commit, ignore_patterns=IGNORED_FILES, dry_run=True)
        if not any(file.filename.endswith(".safetensors") for file in files):
            problem = f"{model} has no weights in safetensors files, which synth needs"
            raise EngineError(problem, hint="convert its weights, or choose another model: --model")
        missing = [file.file_size or 0 for file in files if file.will_download]
        if missing:
            cache = Path(HF_HUB_CACHE)
            disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
            free_gb, size_gb = shutil.disk_usage(disk).free / 1e9, sum(missing) / 1e9
            if free_gb < size_gb:
                problem = f"{model} needs {size_gb:.1f} GB in {cache}, but the disk has {free_gb:.1f} GB free"
                raise EngineError(problem, hint="free some space, or set HF_HOME to a folder on another disk")
            progress.message(f"downloading {model}: {len(missing)} files, {size_gb:.1f} GB, to {cache}")
        return Path(snapshot_download(model, revision=commit, ignore_patterns=IGNORED_FILES))


def _embedded(folder: Path) -> Engine:
    try:
        from pipeline.inference.embedded import EmbeddedEngine
    except ModuleNotFoundError as error:
        problem = f"the embedded engine needs the package {error.name}"
        raise EngineError(problem, hint=install_command("embedded")) from None
    return EmbeddedEngine(folder)


def _start_vllm(
    model: str, find_folder: Callable[[], Path], revision: str, server: ServerConfig, requests: RequestPlan,
    log: Path, progress: Progress,
) -> Engine:  # fmt: skip
    server, pixels = server.model_copy(update={"enforced_schema": True}), requests.largest_pixels
    decks = requests.has_decks
    launches = plan_servers(model, find_folder, revision, server, log, max_pixels=pixels, decks=decks)
    return _make_client(model, server, requests, progress, launches=launches)


def _make_client(
    model: str, server: ServerConfig, requests: RequestPlan, progress: Progress, **servers: Any
) -> Engine:
    from pipeline.inference.client import Client

    settings = requests.generate
    logprobs = settings.wants_logprobs or settings.samples > 1
    max_tokens = requests.largest_max_tokens
    return Client(model, server, max_tokens, progress=progress, wants_logprobs=logprobs, **servers)


def plan_server(model: str, server: ServerConfig, progress: Progress) -> VllmCommand:
    """Return the command of `synth serve`, for the first GPU or group of GPUs."""
    require_vllm()  # fail before any request to the Hub
    revision, find_folder = _find_weights(model, progress)
    revision += _output_affecting_flags(server.flags)
    command, *others = plan_servers(
        model, find_folder, revision, server, Path("vllm.log"), max_pixels=MAX_DETAIL_PIXELS, decks=True
    )
    if others:
        used = command.environment["CUDA_VISIBLE_DEVICES"]
        progress.warn(f"this server uses only GPU {used}: start more with CUDA_VISIBLE_DEVICES and --port")
    return command


@contextmanager
def open_engines(choose: Callable[[str], EngineChoice]) -> Iterator[Callable[[str], Engine]]:
    """Yield a function that returns the engine of a model by name. The engine is created at its first call.

    Only one model runs on this machine at a time: the previous one is closed first, to free its memory.
    """
    with ExitStack() as remote, ExitStack() as local:
        opened: dict[str, Engine] = {}
        loaded = ""

        def engine_of(name: str) -> Engine:
            nonlocal loaded
            if name not in opened:
                choice = choose(name)
                if not choice.urls:
                    local.close()
                    opened.pop(loaded, None)
                    loaded = name
                opened[name] = (remote if choice.urls else local).enter_context(choice.make())
            return opened[name]

        yield engine_of
