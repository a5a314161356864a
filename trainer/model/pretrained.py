"""Pretrained models of transformers: load them whole or report why not, and store their configs as plain JSON.

Nothing in a model is run, and no weight is made up. A checkpoint may be untrusted: none of its settings names code or another
repository, or takes the place of a method, and numbers that repeat a layer are bounded.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

NOT_OF_THE_MODEL = ("architectures", "dtype", "id2label", "label2id", "transformers_version")
NAMES_CODE = frozenset(  # settings by which transformers would fetch or run something
    ("attn_implementation", "auto_map", "backbone", "backbone_config", "backbone_kwargs", "custom_pipelines",
     "quantization_config", "trust_remote_code", "use_kernels", "use_pretrained_backbone", "use_timm_backbone")
)  # fmt: skip
REPEATED = re.compile(r"layers|depth|blocks|stages|experts")
MAX_REPEATS = 1024  # of a layer
FETCHES = re.compile("timm|edgetam")  # models whose configs ask the Hub for others
# As models call it, and the layers that have it.
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention")
LIMITED = re.compile(r"sliding|local|chunk|window")
MAX_PATCH = 64
MAX_SHOWN = 100
SIDES = ("height", "width", "shortest_edge", "longest_edge")
MAX_SIDE_PX, MAX_PROCESSED_PIXELS = 4096, 20_000_000  # of an image for an encoder


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that `AutoConfig.for_model` needs to rebuild a config, without paths and classifier labels."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in NOT_OF_THE_MODEL}


def config_of(settings: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of these settings, without those that name code. Raises ValueError for an unknown or a giant model."""
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or FETCHES.search(model_type):
        raise ValueError(f"{model_type!r} is not a model of transformers")
    methods = {name for name in dir(CONFIG_MAPPING[model_type]) if callable(getattr(CONFIG_MAPPING[model_type], name, None))}
    config: PreTrainedConfig = AutoConfig.for_model(**_harmless({n: v for n, v in settings.items() if n not in methods}))
    return config


def attention_window(config: PreTrainedConfig) -> float:
    """Return how many tokens a token sees in the layers that limit it, by any of the names of this setting; else infinite."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds and not any(LIMITED.search(str(kind)) for kind in kinds):
        return math.inf
    sizes = (getattr(config, name, None) for name in WINDOWS)
    return min((size for size in sizes if isinstance(size, int) and size > 1), default=math.inf)


def processor_settings(kind: type[BaseImageProcessor], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that an image processor knows. Raises ValueError for a size that no encoder has."""
    known = kind().to_dict().keys() | getattr(kind.valid_kwargs, "__annotations__", {}).keys()
    known -= {name for name in known if name.endswith("_type") or name.startswith("_")}
    chosen: dict[str, Any] = _harmless({name: value for name, value in settings.items() if name in known})
    for name, number in _numbers(chosen):
        most = MAX_PROCESSED_PIXELS if "pixels" in name or "edge" in name else MAX_SIDE_PX
        most = MAX_PATCH if "patch" in name or "frames" in name else most
        if number > most or (number < 1 and name in SIDES):
            raise ValueError(f"{name} is {number}")
    return chosen


def require_few_layers(settings: dict[str, Any]) -> None:
    """Raise ValueError if a layer is repeated more than MAX_REPEATS times."""
    for name, value in settings.items():
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > MAX_REPEATS and all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"{name} has {len(numbers)} values")
        if REPEATED.search(name) and sum(number for number in numbers if isinstance(number, int | float)) > MAX_REPEATS:
            raise ValueError(f"{name} is {value}"[:MAX_SHOWN])


def _harmless(value: Any) -> Any:
    """Return settings without those that name code or remove the names of outputs, at any depth.

    Raises ValueError for too many layers.
    """
    if isinstance(value, list):
        return [_harmless(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    require_few_layers(value)
    return {
        name: _harmless(inner)
        for name, inner in value.items()
        if name not in NAMES_CODE and name != "return_dict" and not name.startswith("_") and not name.startswith("base_model_")
    }


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of settings with the key that it stands under."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float):
        yield name, value


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence progress bars and reports while loading, such as those about an unused pooling layer."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


# Of files that are missing, damaged or of another kind; ImportError where a model wants a package of its own.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
MAX_REASON_CHARACTERS = 200


def load_config(model_id: str) -> PreTrainedConfig:
    """Return the config in a folder or on the Hub. Raises ValueError for quantized weights, and any of LOAD_ERRORS."""
    if _is_path(model_id) and not Path(model_id).is_dir():
        raise ValueError("there is no such folder")
    config: PreTrainedConfig = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantized, and would not learn: pass the model that they were made from")
    parts: list[Any] = [config, getattr(config, "vision_config", None), getattr(config, "text_config", None)]
    for part in parts:
        if getattr(part, "return_dict", True) is False:  # a model that was traced: its outputs would have no names
            part.return_dict = True
    return config


def _is_path(model_id: str) -> bool:
    """Return whether a name can only be meant for a folder of this machine: the Hub would be asked for long in vain."""
    path = Path(model_id)
    return path.is_absolute() or model_id.startswith((".", "~")) or len(path.parts) > 2


def load_weights(model_class: Any, model_id: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """Return a model in float32, and the names of the weights that its files lack: those have random values.

    Raises any of LOAD_ERRORS.
    """
    with silence_transformers():
        model, info = model_class.from_pretrained(
            model_id, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    return model, sorted(info["missing_keys"])


def reason_of(error: BaseException) -> str:
    """Return what a person should know of one of LOAD_ERRORS, on a line."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it brings code of its own, which is not run here"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config says"
    if "backend tokenizer" in text:
        return "it has no tokenizer that can be read"
    return text.partition("\n")[0][:MAX_REASON_CHARACTERS]
