"""Which engine answers, decided before anything is loaded: the name and revision of a model are part of every request."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import EngineError
from pipeline.generate.weights import weights_revision
from pipeline.types import Engine

TINY = "tiny"
TINY_WEIGHTS = Path(__file__).parents[1] / "scenes" / "weights" / "teacher"


def choose_engine(config: Config) -> tuple[tuple[str, str], Callable[[], Engine]]:
    """Return the (model, revision) that will answer, and a function that makes the engine when it is first needed.

    Raises:
        EngineError: no model can answer for this source on this machine.
    """
    drawn = config.source == "scenes"
    model = config.model or (TINY if drawn else None)
    if model is None or (model == TINY and not drawn and config.engine != "embedded"):
        raise EngineError(
            f"no model here can describe {config.source}: the tiny teacher knows drawn scenes and nothing else",
            hint="pass --model with a Qwen2.5-VL checkpoint; or --engine embedded --model tiny, to try the pipeline itself",
        )
    path = str(TINY_WEIGHTS) if model == TINY else model
    revision = _revision(model, path)
    return (model, revision), cache(lambda: _embedded(model, path, revision))


def _revision(model: str, path: str) -> str:
    if Path(path).is_dir():
        return weights_revision(Path(path))
    if model == TINY:
        raise EngineError(
            "the tiny teacher's weights are not installed", hint="install synth again, from a whole wheel or clone"
        )
    return _hub_revision(model)


def _hub_revision(model: str) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return str(HfApi().model_info(model).sha)
    except (HfHubHTTPError, HFValidationError, OSError, httpx2.TransportError) as error:
        raise EngineError(
            f"no model {model}: {' '.join(str(error).split())[:200]}",
            hint="pass a folder, a Hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or tiny",
        ) from None


def _embedded(model: str, path: str, revision: str) -> Engine:
    try:
        from pipeline.generate.embedded import EmbeddedEngine
    except ModuleNotFoundError as error:
        raise EngineError(
            f"the embedded engine needs the package {error.name}", hint="install synth with its extra `embedded`"
        ) from None
    return EmbeddedEngine(model, path, revision)
