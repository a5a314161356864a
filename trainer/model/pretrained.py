"""Load transformers models with all their weights, and store their configs as plain JSON.

Checkpoints may be untrusted. Settings that name code or another repository, or that replace a method, are
removed, and layer counts are limited. Missing weights are reported, never left at random values.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from pipeline.images.clip import silence_transformers
from pipeline.install import install_command

UNUSED_SETTINGS = {"architectures", "dtype", "id2label", "label2id", "transformers_version"}
# Settings that make transformers download files or run code.
CODE_SETTINGS = frozenset(
    ("attn_implementation", "auto_map", "backbone", "backbone_config", "backbone_kwargs",
     "custom_pipelines", "quantization_config", "trust_remote_code", "use_kernels",
     "use_pretrained_backbone", "use_timm_backbone")
)  # fmt: skip
# Model types whose configs download other configs from the Hub.
FETCHING_MODELS = re.compile("timm_backbone|edgetam")
TIMM = "timm_wrapper"  # model type of transformers for the models of timm
LAYER_COUNTS = re.compile(r"layers|depth|blocks|stages|experts")
MAX_LAYERS = 1024
# Settings that hold the attention window, and the layer types that use it.
WINDOWS = (
    "sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention",
)  # fmt: skip
WINDOWED_LAYERS = re.compile(r"sliding|local|chunk|window")
SIDES = ("height", "width", "shortest_edge", "longest_edge")
MAX_PATCH, MAX_SIDE_PX, MAX_PROCESSED_PIXELS = 64, 4096, 20_000_000
# Errors that transformers raises for missing or damaged files and for unsupported models.
LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError,
)  # fmt: skip
MAX_REASON_CHARACTERS = 200


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings from which `config_of` can rebuild a config, without paths and class labels."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if values["model_type"] == TIMM:
        return _timm_settings(values)
    used = {name for name in values if not name.startswith("_")} - UNUSED_SETTINGS
    return {name: value for name, value in values.items() if name in used}


def config_of(settings: dict[str, Any]) -> PreTrainedConfig:
    """Build a config, ignoring settings that name code. Raises ValueError for an unknown model type."""
    model_type = settings.get("model_type")
    if (
        not isinstance(model_type, str)
        or model_type not in CONFIG_MAPPING
        or FETCHING_MODELS.search(model_type)
    ):
        raise ValueError(f"{model_type!r} is not a supported transformers model type")
    kind = CONFIG_MAPPING[model_type]
    methods = {name for name in dir(kind) if callable(getattr(kind, name, None))}
    safe = _remove_code({name: value for name, value in settings.items() if name not in methods})
    if model_type == TIMM:
        safe = _timm_settings(safe)
    config: PreTrainedConfig = AutoConfig.for_model(**safe)
    return config


def _timm_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture and its numeric arguments. Raises ValueError if timm does not have it.

    Other names make timm download a model, and some arguments, such as `checkpoint_path`, read other files.
    """
    try:
        from timm import list_models
    except ModuleNotFoundError as error:
        raise ValueError(f"models of timm need the package {error.name}: {install_command('timm')}") from None
    architecture = settings.get("architecture")
    if architecture not in list_models():
        raise ValueError(f"timm has no model architecture {architecture!r}")
    arguments = settings.get("model_args") or {}
    sizes = {name: value for name, value in arguments.items() if all(_are_numbers(value))}
    return {"model_type": TIMM, "architecture": architecture, "model_args": sizes, "do_pooling": False}


def _are_numbers(value: Any) -> Iterator[bool]:
    """Yield for each value whether it is a number."""
    for item in value if isinstance(value, list) else [value]:
        yield isinstance(item, int | float)


def attention_window(config: PreTrainedConfig) -> float:
    """Return the smallest attention window of all layers in tokens, or infinity if no layer has a window."""
    layer_types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if layer_types and not any(WINDOWED_LAYERS.search(str(kind)) for kind in layer_types):
        return math.inf
    sizes = (getattr(config, name, None) for name in WINDOWS)
    return min((size for size in sizes if isinstance(size, int) and size > 1), default=math.inf)


def processor_settings(kind: type[BaseImageProcessor], settings: dict[str, Any]) -> dict[str, Any]:
    """Return only the settings that an image processor supports. Raises ValueError if a size is invalid."""
    known = kind().to_dict().keys() | getattr(kind.valid_kwargs, "__annotations__", {}).keys()
    known -= {name for name in known if name.endswith("_type") or name.startswith("_")}
    chosen: dict[str, Any] = _remove_code({name: value for name, value in settings.items() if name in known})
    for name, number in _numbers(chosen):
        maximum = MAX_PROCESSED_PIXELS if "pixels" in name or "edge" in name else MAX_SIDE_PX
        maximum = MAX_PATCH if "patch" in name or "frames" in name else maximum
        if number > maximum or (number < 1 and name in SIDES):
            raise ValueError(f"{name} is {number}; allowed are 1 to {maximum:,}")
    return chosen


def require_few_layers(settings: dict[str, Any]) -> None:
    """Raise ValueError if settings ask for more than MAX_LAYERS layers."""
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if isinstance(number, int | float)]
        if isinstance(value, list) and MAX_LAYERS < len(value) == len(numbers):
            raise ValueError(f"{name} has {len(numbers)} values; at most {MAX_LAYERS} are allowed")
        if LAYER_COUNTS.search(name) and sum(numbers) > MAX_LAYERS:
            raise ValueError(f"{name} is over {MAX_LAYERS}: {value}"[:100])


def _remove_code(value: Any) -> Any:
    """Recursively remove settings that name code or change the type of a model's outputs."""
    if isinstance(value, list):
        return [_remove_code(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    # transformers writes infinity to JSON like this.
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    require_few_layers(value)
    hidden = {name for name in value if name.startswith(("_", "base_model_"))}
    removed = hidden | CODE_SETTINGS | {"return_dict"}
    return {name: _remove_code(inner) for name, inner in value.items() if name not in removed}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in settings with its innermost key."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else ((name, inner) for inner in value):
            yield from _numbers(inner, str(key))


def load_config(model_id: str) -> PreTrainedConfig:
    """Load a config from a folder or the Hub. Raises one of LOAD_ERRORS, also for quantized weights."""
    path = Path(model_id)
    # Do not look up names that can only be paths, because a lookup may take minutes.
    is_path = path.is_absolute() or model_id.startswith((".", "~")) or len(path.parts) > 2
    if is_path and not path.is_dir():
        raise ValueError("the folder does not exist")
    config: PreTrainedConfig = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantized and cannot be trained. Pass the original model")
    return config


def load_weights(model_class: Any, model_id: str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """Load a float32 model. Returns it with the names of missing weights, which have random values.

    Raises one of LOAD_ERRORS.
    """
    with silence_transformers():
        model, info = model_class.from_pretrained(
            model_id, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    return model, sorted(info["missing_keys"])


def reason_of(error: BaseException) -> str:
    """Return the reason why a model could not be loaded, as one line for the user."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs code from its repository, which synth never runs"
    return text.partition("\n")[0][:MAX_REASON_CHARACTERS]
