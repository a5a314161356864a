"""Choose the engine and the model before anything is loaded. Request ids depend on the model's revision."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.config import NO_MODEL, TINY, Config
from pipeline.config.sections import BoxUnit, GenerateConfig, ServerConfig
from pipeline.digests import digest, weights_revision
from pipeline.errors import ConfigError, EngineError
from pipeline.hub_errors import translate_hub_errors
from pipeline.inference.download import download_model
from pipeline.inference.requests import RequestPlan
from pipeline.inference.vllm import has_gpu, plan_servers, run_servers, vllm_python
from pipeline.install import install_command
from pipeline.progress import NullProgress, Progress
from pipeline.sources import find_source, holds_decks
from pipeline.tasks import Tasks
from pipeline.tasks.base import MAX_DETAIL_PIXELS
from pipeline.types import Engine

_WEIGHTS = Path(__file__).parents[1] / "scenes" / "weights"
TINY_WEIGHTS, TINY_DECK_WEIGHTS = _WEIGHTS / "teacher", _WEIGHTS / "deck_teacher"
MAX_PORT = 65_535
NO_GPU = "; this machine has no GPU, so a server elsewhere would be much faster"
HOW_TO_CHOOSE = (
    "pass --model with the folder or Hub id of a vision-language model, or --base-url with a running server; "
    "to try the pipeline itself on any image: --engine embedded --model tiny"
)
OUTPUT_NEUTRAL_FLAGS = frozenset(  # flags that change the speed of replies but not their content
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


def choose_engine(
    config: Config, log: Path = Path("vllm.log"), progress: Progress | None = None
) -> EngineChoice:
    """Choose the engine. `log` is the log file of a server that synth starts.

    Raises EngineError if this machine cannot run a model for the source, or if the servers of --base-url do
    not answer.
    """
    if not config.asks_model:
        return EngineChoice(NO_MODEL, NO_MODEL, NO_MODEL, _no_engine)
    name, _ = pick_engine(config)
    if config.server.flags and (name != "vllm" or config.base_url):
        problem = "there are flags for vLLM (after -- or in the settings), but synth starts no server"
        raise EngineError(problem, hint="leave out the flags")
    max_tokens = config.generate.max_tokens
    if name == "vllm" and config.base_url:
        from pipeline.inference.client import Client
        from pipeline.inference.probing import find_model

        served, revision = find_model(config.base_url, config.model, config.server)
        make = partial(
            Client, served, revision, config.server, max_tokens, urls=config.base_url,
            image_reply_tokens=_request_plan(config).largest_max_tokens,
            wants_logprobs=config.generate.wants_logprobs, progress=progress,
        )  # fmt: skip
        return EngineChoice(name, served, revision, make, config.base_url)
    model = _model(config)
    tiny_weights = TINY_DECK_WEIGHTS if holds_decks(config) else TINY_WEIGHTS
    path = str(tiny_weights) if model == TINY else model
    revision = _revision(model, path, progress)
    find_folder = _folder_finder(path, revision, progress)
    start: Callable[[], Engine]
    if name == "vllm":
        revision += _output_affecting_flags(config.server.flags)
        start = partial(_start_vllm, model, find_folder, revision, config, log, progress)
    else:
        start = partial(_embedded, model, find_folder, revision, config.generate)
    return EngineChoice(name, model, revision, start)


def _output_affecting_flags(flags: tuple[str, ...]) -> str:
    """Return a suffix for the revision if flags may change the replies, such as --quantization."""
    words = " ".join(flags).replace("=", " ").split()
    affecting = [
        word
        for index, word in enumerate(words)
        if (word.startswith("--") and word not in OUTPUT_NEUTRAL_FLAGS)
        or (not word.startswith("--") and words[index - 1] not in OUTPUT_NEUTRAL_FLAGS)
    ]
    return f"+{digest(affecting)[:8]}" if affecting else ""


def pick_engine(config: Config) -> tuple[str, str]:
    """Return the engine, `embedded` or `vllm`, and the reason for the choice."""
    if config.engine == "embedded" and config.base_url:
        raise EngineError("--base-url and --engine embedded exclude each other", hint="leave one of them out")
    if config.engine != "auto":
        return config.engine, f"--engine {config.engine}"
    if config.base_url:
        return "vllm", "--base-url names a server"
    if has_gpu() and vllm_python():
        return "vllm", "this machine has a GPU and vLLM"
    return "embedded", f"no --base-url, and {'vLLM is not installed' if has_gpu() else 'no GPU'}"


def _no_engine() -> Engine:
    raise EngineError(
        "internal error: a run without a model has a request to send", hint="please report this bug"
    )


def _model(config: Config) -> str:
    source_model = find_source(config.source).model
    model = config.model or source_model
    if model == TINY != source_model and config.engine != "embedded":
        problem = f"the tiny teacher can only describe --source scenes, not {config.source}"
        raise EngineError(problem, hint=HOW_TO_CHOOSE)
    if model == TINY:
        from pipeline.scenes.text import STYLES

        if "covers" in config.verify.checks or config.verify.repair:
            hint = "leave out covers and --repair, or pass a larger model: --model, --base-url"
            raise EngineError("the tiny teacher can neither read nor repair captions", hint=hint)
        unknown = [style for style in config.generate.caption_styles if style not in STYLES]
        if unknown:
            problem = f"the tiny teacher does not support the caption style {unknown[0]}"
            raise EngineError(problem, hint=f"use {', '.join(STYLES)}, or pass a larger model: --model")
    return model


def _revision(model: str, path: str, progress: Progress | None) -> str:
    if Path(path).is_dir():
        if model != TINY and progress:
            progress.message(f"computing the digest of {path}, which identifies the model")
        return weights_revision(Path(path))
    if model == TINY:
        hint = "install synth again from a complete wheel or clone"
        raise EngineError("the weights of the tiny teacher are missing", hint=hint)
    from huggingface_hub import HfApi

    hint = "check the network, or pass a model folder (--model FOLDER) or a server (--base-url)"
    with translate_hub_errors(
        model, "model", EngineError, hint + ("" if has_gpu() else NO_GPU), or_folder=True
    ):
        return str(HfApi().model_info(model).sha)


def _folder_finder(path: str, revision: str, progress: Progress | None) -> Callable[[], Path]:
    """Return a function that returns the folder of a model, after its download if `path` is a Hub id."""
    if Path(path).is_dir():
        return partial(Path, path)
    return partial(download_model, path, revision, progress or NullProgress())


def _embedded(model: str, find_folder: Callable[[], Path], revision: str, generate: GenerateConfig) -> Engine:
    try:
        from pipeline.inference.embedded import EmbeddedEngine
    except ModuleNotFoundError as error:
        problem = f"the embedded engine needs the package {error.name}"
        raise EngineError(problem, hint=install_command("embedded")) from None
    return EmbeddedEngine(model, find_folder, revision, generate.batch_size)


def _start_vllm(
    model: str,
    find_folder: Callable[[], Path],
    revision: str,
    config: Config,
    log: Path,
    progress: Progress | None,
) -> Engine:
    from pipeline.inference.client import Client

    server = config.server.model_copy(update={"enforced_schema": True})
    plan = _request_plan(config)
    launches = plan_servers(
        model, find_folder, revision, server, log, max_pixels=plan.largest_pixels, decks=holds_decks(config)
    )
    return Client(
        model, revision, server, config.generate.max_tokens, launches=launches,
        image_reply_tokens=plan.largest_max_tokens,
        wants_logprobs=config.generate.wants_logprobs, progress=progress,
    )  # fmt: skip


def _request_plan(config: Config) -> RequestPlan:
    return RequestPlan.of(config, Tasks(config.tasks, config.custom_tasks), "")


def serve_model(
    model: str,
    server: ServerConfig,
    port: int | None,
    log: Path,
    progress: Progress,
    ready: Callable[[dict[str, str]], None],
) -> None:
    """Run a server on each GPU, or one on the CPU, until interrupted.

    `ready` is called with the addresses and the key. The servers listen on `port` and the following ports.
    Raises EngineError if vLLM is not installed, cannot be started, or dies more than `max_restarts` times.
    """
    path = str(TINY_WEIGHTS) if model == TINY else model
    commit = _revision(model, path, progress)
    find_folder = _folder_finder(path, commit, progress)
    revision = commit + _output_affecting_flags(server.flags)
    launches = plan_servers(
        model, find_folder, revision, server, log, max_pixels=MAX_DETAIL_PIXELS, decks=True
    )
    if port and port + len(launches) - 1 > MAX_PORT:
        problem = f"{len(launches)} servers from port {port} need ports above {MAX_PORT}"
        raise ConfigError(problem, hint="pass a lower --port")
    launches = [replace(launch, port=port and port + number) for number, launch in enumerate(launches)]

    async def serve() -> None:
        async with run_servers(launches, progress) as servers:
            urls = [f"{server.root}/v1" for server in servers]
            options = " ".join(f"--base-url {url}" for url in urls)
            progress.message(
                f"serving {launches[0].name}; use it with:\n  export SYNTH_API_KEY={launches[0].api_key}"
            )
            progress.message(f"  synth generate {options} --source ...")
            ready({"url": "\n".join(urls), "key": launches[0].api_key})
            ends = [asyncio.ensure_future(server.gave_up.wait()) for server in servers]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            failure = next((server.failure for server in servers if server.failure), None)
            raise failure or EngineError("the server stopped", hint=f"see its log: {log}")

    asyncio.run(serve())


@contextmanager
def open_engines(choose: Callable[[str], EngineChoice]) -> Iterator[Callable[[str], Engine]]:
    """Yield a function that returns the engine of a model by name. The engine is created at its first call.

    Only one model runs on this machine at a time: another one is closed first, to free its memory.
    """
    with ExitStack() as remote, ExitStack() as local:
        opened: dict[str, tuple[ExitStack, Engine]] = {}

        def engine_of(name: str) -> Engine:
            if name not in opened:
                choice = choose(name)
                stack = remote if choice.urls else local
                if stack is local:
                    close(local)
                opened[name] = stack, stack.enter_context(choice.make())
            return opened[name][1]

        def close(stack: ExitStack) -> None:
            stack.close()
            for name in [name for name, (owner, _) in opened.items() if owner is stack]:
                del opened[name]

        yield engine_of
