"""Low-rank adapters (LoRA, Hu et al., 2021) of a language model, by peft: few weights learn, and are merged to be saved."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import TrainError
from pipeline.install import install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"


def add_adapters(model: "PreTrainedModel", rank: int, dropout: float) -> None:
    """Give every linear layer but the head and experts an adapter, and freeze all else.

    Adapters are scaled by 2, whatever the rank, as is usual.

    Raises TrainError if peft is not installed, or knows no linear layer of the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise TrainError("peft is not installed, and lora_rank needs it", hint=install_command("lora")) from None
    head = model.get_output_embeddings()
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head and "expert" not in name
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=names)
    try:
        if not names:
            raise ValueError("it has no linear layers")
        with warnings.catch_warnings():  # of GPT-2's layers, which peft knows how to handle
            warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
            inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise TrainError(f"this language model takes no adapters: {error}", hint="train all of it: --lora-rank 0") from None


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name is of an adapter."""
    return ".lora_" in name


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module as if it had no adapters, each added to the matrix that it adapts, on the CPU."""
    state = {name: weights for name, weights in module.state_dict().items() if not is_adapter(name)}
    if len(state) == len(module.state_dict()):
        return state
    from peft.tuners.lora import LoraLayer

    # A GPU has no room for a second language model. Matrices that are tied stay one.
    places = {name: (weights.data_ptr(), weights.shape) for name, weights in state.items()}
    copies = {places[name]: weights.cpu() for name, weights in state.items()}
    state = {name: copies[places[name]] for name in state}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            with torch.no_grad():
                delta: Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]  # of each kind of layer
                state[f"{name}.weight"] = state.pop(f"{name}.base_layer.weight") + delta.cpu()
            if f"{name}.base_layer.bias" in state:
                state[f"{name}.bias"] = state.pop(f"{name}.base_layer.bias")
    return state
