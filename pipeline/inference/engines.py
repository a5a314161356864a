"""Choose the engine and its model before anything is loaded: the model's revision is part of every request id."""

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from pipeline.config import NO_MODEL, TINY, Config
from pipeline.config.sections import AT_SERVER, BoxUnit, GenerateConfig, ServerConfig, address_of, origin_of
from pipeline.digests import digest, weights_revision
from pipeline.errors import ConfigError, EngineError
from pipeline.hub_errors import translate_hub_errors
from pipeline.inference.vllm import has_gpu, model_settings, plan_servers, run_servers, vllm_python
from pipeline.install import install_command
from pipeline.progress import Progress
from pipeline.sources import find_source, holds_decks
from pipeline.types import Engine

_WEIGHTS = Path(__file__).parents[1] / "scenes" / "weights"
TINY_WEIGHTS, TINY_DECK_WEIGHTS = _WEIGHTS / "teacher", _WEIGHTS / "deck_teacher"
LAST_PORT = 65_535
NO_GPU = "; this machine has no GPU, so a server elsewhere would be much faster"
HOW_TO_CHOOSE = (
    "--model takes a folder or a Hub id of a vision-language model; --base-url a server that runs; "
    "to try the pipeline itself on any image: --engine embedded --model tiny"
)
LONGEST_SIDE_PX = 10_000  # of an image that a processor takes as it is; a larger number is an area
OUTPUT_NEUTRAL_FLAGS = frozenset(  # change the speed of replies, not their content
    f"--{name}"
    for name in (
        "api-server-count", "block-size", "data-parallel-size", "enforce-eager", "gpu-memory-utilization",
        "kv-cache-memory-bytes", "max-model-len", "max-num-batched-tokens", "max-num-seqs", "performance-mode",
        "pipeline-parallel-size", "swap-space", "tensor-parallel-size", "uvicorn-log-level",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Models of one architecture, in several sizes, which write boxes in the same coordinates."""

    name: str
    pattern: str  # matches names of its models in lower case, without an organization
    boxes: BoxUnit


FAMILIES = (  # by the cards of the models
    ModelFamily("Qwen2.5-VL", r"qwen2[._]?5[-_]?vl", "pixels"),
    ModelFamily("Qwen3-VL", r"qwen3[-_]?vl", "thousandths"),
    ModelFamily("InternVL3", r"internvl[-_]?3(?![._]?5)", "thousandths"),
)


def find_family(model: str) -> ModelFamily | None:
    """Return the family of a model by its name, such as the name at a server; None for other models."""
    name = model.casefold().rstrip("/").rpartition("/")[2]
    return next((family for family in FAMILIES if re.search(family.pattern, name)), None)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The chosen engine. `reason` explains the choice to the user; `make` is called when a request must be sent."""

    name: str
    model: str
    revision: str
    reason: str
    make: Callable[[], Engine]


def choose_engine(config: Config, log: Path = Path("vllm.log"), progress: Progress | None = None) -> EngineChoice:
    """Choose the engine. `log` receives the output of a server that is started; `progress` receives messages about servers.

    Raises EngineError if no model can answer for this source on this machine, or the servers of --base-url do not.
    """
    if not config.asks_model:
        return EngineChoice(NO_MODEL, NO_MODEL, NO_MODEL, "nothing is asked", _no_engine)
    name, reason = pick_engine(config)
    if config.server.flags and (name != "vllm" or config.base_url):
        raise EngineError("flags for vLLM were given, and no server is to be started", hint="leave out what stands after --")
    limits = config.generate.max_tokens, config.generate.max_pixels
    if name == "vllm" and config.base_url:
        from pipeline.inference.client import Client
        from pipeline.inference.probing import find_model

        served, revision = find_model(config.base_url, config.model, config.server)
        make = partial(Client, served, revision, config.server, *limits, urls=config.base_url, progress=progress)
        return EngineChoice(name, served, revision, reason, make)
    model = _model(config)
    tiny_weights = TINY_DECK_WEIGHTS if holds_decks(config) else TINY_WEIGHTS
    path = str(tiny_weights) if model == TINY else model
    revision = _revision(model, path)
    if name == "vllm":
        revision += _output_affecting_flags(config.server.flags)
        return EngineChoice(name, model, revision, reason, lambda: _managed(model, path, revision, config, log, progress))
    return EngineChoice(name, model, revision, reason, lambda: _embedded(model, path, revision, config.generate))


def choose_judge(
    config: Config, writer_revision: str, progress: Progress | None = None, writer: str | None = None
) -> EngineChoice:
    """Choose the judge of `verify.judge`, MODEL@URL: another model than the writer, on a server of its own.

    Raises ConfigError if no server is named, or the judge is the writer (by its revision, or by its name `writer`) and must not
    be; EngineError if the server does not answer, or does not serve the model.
    """
    from pipeline.inference.client import Client
    from pipeline.inference.endpoints import JUDGE_KEY
    from pipeline.inference.probing import find_model

    name, url = (config.verify.judge or "").partition(AT_SERVER)[0], config.judge_url
    if not url:
        raise ConfigError(f"the judge {name} has no server", hint=f"name it: --judge {name}@http://HOST:8000/v1")
    # A host whose servers have keys of their own gets none that is meant for others.
    described, origin = config.server.endpoints, origin_of(url)
    is_described = address_of(url) in map(address_of, described)
    is_known = origin in map(origin_of, config.base_url) and (is_described or origin not in map(origin_of, described))
    server = config.server if is_known else config.server.model_copy(update={"headers": {}, "key_env": None})
    key_name = None if is_known and JUDGE_KEY not in os.environ else JUDGE_KEY
    served, revision = find_model((url,), name, server, key_name)
    is_writer = revision == writer_revision or (writer is not None and _base_name(served) == _base_name(writer))
    if is_writer and not config.verify.judge_may_be_writer:
        hint = "name another model, or allow it: verify.judge_may_be_writer: true"
        raise ConfigError(f"the judge {name} is the model that writes, and a model likes its own texts", hint=hint)
    limits = config.generate.max_tokens, config.generate.max_pixels
    make = partial(Client, served, revision, server, *limits, urls=(url,), key_name=key_name, progress=progress)
    return EngineChoice("vllm", served, revision, "--judge names a server", make)


def _base_name(model: str) -> str:
    """Return the name of a model without its folder, and without the revision that `synth serve` appends."""
    return model.partition("@")[0].rpartition("/")[2]


def _output_affecting_flags(flags: tuple[str, ...]) -> str:
    """Return a revision suffix for flags that may change replies, such as --quantization; empty if there are none."""
    words = " ".join(flags).replace("=", " ").split()
    affecting = [
        word
        for index, word in enumerate(words)
        if (word.startswith("--") and word not in OUTPUT_NEUTRAL_FLAGS)
        or (not word.startswith("--") and words[index - 1] not in OUTPUT_NEUTRAL_FLAGS)
    ]
    return f"+{digest(affecting)[:8]}" if affecting else ""


def pick_engine(config: Config) -> tuple[str, str]:
    """Return `embedded` or `vllm`, and the reason; `auto` is vllm if a server is named, or a GPU and vLLM are present."""
    if config.engine == "embedded" and config.base_url:
        raise EngineError("--base-url names a server, and --engine embedded uses none", hint="leave one of them out")
    if config.engine != "auto":
        return config.engine, f"--engine {config.engine}"
    if config.base_url:
        return "vllm", "--base-url names a server"
    if has_gpu() and vllm_python():
        return "vllm", "a GPU and vLLM are here"
    return "embedded", "no server is named" + (", and there is no GPU" if not has_gpu() else ", and vLLM is not installed")


def max_pixels(path: str, revision: str | None = None) -> int | None:
    """Return the maximum pixels of an image for a model's processor, if it has a limit; `revision` is that of a Hub id.

    `size.longest_edge` is the longest side; processors such as that of Qwen2-VL write an area there.
    """
    names = ["preprocessor_config.json", "processor_config.json"]
    if not Path(path).is_dir():
        from huggingface_hub import snapshot_download

        with translate_hub_errors(path, "model", EngineError, "check the network, then run the same command"):
            path = snapshot_download(path, revision=revision, allow_patterns=names)
    for name in names:
        file = Path(path) / name
        if file.exists():
            settings = model_settings(file)
            settings = settings.get("image_processor", settings)
            size = settings.get("size")
            side = size.get("longest_edge") if isinstance(size, dict) else None
            is_area = str(settings.get("image_processor_type")).startswith("Qwen2VL") or (side or 0) > LONGEST_SIDE_PX
            limit = settings.get("max_pixels") or (side if is_area or not side else side * side)
            return int(limit) if limit else None
    return None


def _no_engine() -> Engine:
    raise EngineError("a run without a model has a request to send", hint="please report this bug")


def _model(config: Config) -> str:
    source_model = find_source(config.source).model
    model = config.model or source_model
    if model == TINY != source_model and config.engine != "embedded":
        raise EngineError(
            f"the tiny teacher knows drawn scenes and nothing else, and cannot describe {config.source}", hint=HOW_TO_CHOOSE
        )
    if model == TINY:
        from pipeline.scenes.text import STYLES

        if "covers" in config.verify.checks or config.verify.repair:
            hint = "leave out covers and --repair, or name a larger model: --model, --base-url"
            raise EngineError("the tiny teacher knows pictures, and can neither read nor repair a caption", hint=hint)
        unknown = [style for style in config.generate.caption_styles if style not in STYLES]
        if unknown:
            raise EngineError(
                f"the tiny teacher does not know the caption style {unknown[0]}",
                hint=f"it knows {', '.join(STYLES)}; --model takes a larger model",
            )
    return model


def _revision(model: str, path: str) -> str:
    if Path(path).is_dir():
        return weights_revision(Path(path))
    if model == TINY:
        raise EngineError(
            "the tiny teacher's weights are not installed", hint="install synth again, from a whole wheel or clone"
        )
    from huggingface_hub import HfApi

    offline = f"check the network, or name a model folder: --model FOLDER; a server: --base-url{'' if has_gpu() else NO_GPU}"
    with translate_hub_errors(model, "model", EngineError, offline, or_folder=True):
        return str(HfApi().model_info(model).sha)


def _embedded(model: str, path: str, revision: str, generate: GenerateConfig) -> Engine:
    try:
        from pipeline.inference.embedded import EmbeddedEngine
    except ModuleNotFoundError as error:
        hint = install_command("embedded")
        raise EngineError(f"the embedded engine needs the package {error.name}", hint=hint) from None
    return EmbeddedEngine(model, path, revision, generate.batch_size, generate.max_pixels)


def _managed(model: str, path: str, revision: str, config: Config, log: Path, progress: Progress | None) -> Engine:
    from pipeline.inference.client import Client

    server = config.server.model_copy(update={"enforced_schema": True})  # ours does
    pixels = config.generate.max_pixels or max_pixels(path, revision.partition("+")[0])
    launches = plan_servers(path, revision, server, log, decks=holds_decks(config))
    return Client(model, revision, server, config.generate.max_tokens, pixels, launches=launches, progress=progress)


def serve_model(
    model: str, server: ServerConfig, port: int | None, log: Path, progress: Progress, ready: Callable[[dict[str, str]], None]
) -> None:
    """Run a server on each GPU, or one on the CPU, until the process is interrupted; `ready` receives addresses and key.

    The servers listen on `port` and those after it. Raises EngineError if vLLM is not installed, cannot be started, or a
    server dies more than `max_restarts` times.
    """
    path = str(TINY_WEIGHTS) if model == TINY else model
    revision = _revision(model, path) + _output_affecting_flags(server.flags)
    launches = plan_servers(path, revision, server, log, decks=True)
    if port and port + len(launches) - 1 > LAST_PORT:
        raise EngineError(
            f"{len(launches)} servers need ports from {port} on", hint=f"ports end at {LAST_PORT}: a lower --port"
        )
    launches = [replace(launch, port=port and port + number) for number, launch in enumerate(launches)]

    async def serve() -> None:
        async with run_servers(launches, progress) as running:
            urls = [f"{one.root}/v1" for one in running]
            options = " ".join(f"--base-url {url}" for url in urls)
            progress.message(f"serving {launches[0].name}; use it with:\n  export SYNTH_API_KEY={launches[0].api_key}")
            progress.message(f"  synth generate {options} --source ...")
            ready({"url": "\n".join(urls), "key": launches[0].api_key})
            ends = [asyncio.ensure_future(one.gave_up.wait()) for one in running]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            failure = next((one.failure for one in running if one.failure), None)
            raise failure or EngineError("the server has ended", hint=f"its log: {log}")

    asyncio.run(serve())


@contextmanager
def open_engine(choose: Callable[[], EngineChoice]) -> Iterator[Callable[[], Engine]]:
    """Yield a function that returns the engine: made at the first call, and closed at the end."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(choose().make()))
