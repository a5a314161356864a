"""Load pretrained models of transformers whole, or say why not: nothing in them is run, and no weight is made up."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from trainer.model.hf_config import silence_transformers

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
