"""LoRA adapters (Hu et al., 2021): frozen linear layers, each with a trained product of two narrow matrices.

Shapes: K tokens, D input width, O output width, R rank.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

SCALE = 2.0  # lora_alpha / rank in other libraries


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: x W^T + b + SCALE * dropout(x) A^T B^T.

    Keeps the names of the weights of the layer. B is 0 at the start. An adapter adds few and small matrix
    products, so the time on a GPU depends on the number of kernels.
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, dropout: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        self.is_transposed = isinstance(base, Conv1D)
        self.out_features, self.in_features = self._oriented(base.weight).shape
        self.dropout, self.training = dropout, base.training
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., O)."""
        x_KD = x.flatten(0, -2)
        if torch.is_autocast_enabled(x.device.type):  # one cast for both products
            x_KD = x_KD.to(torch.get_autocast_dtype(x.device.type))
        y_KO = functional.linear(x_KD, self._oriented(self.weight), self.bias)
        low_KR = functional.linear(functional.dropout(x_KD, self.dropout, self.training), self.lora_A)
        # In place, so that the sum needs no kernel and no memory. Autocast skips operations in place.
        y_KO.addmm_(low_KR, self.lora_B.to(y_KO.dtype).T, alpha=SCALE)
        return y_KO.unflatten(0, x.shape[:-1])

    def merged_weight(self) -> Tensor:
        """Return the weight of a layer without an adapter that has the same outputs, in float32."""
        delta_OD = SCALE * self.lora_B.detach() @ self.lora_A.detach()
        return self.weight.detach().float() + self._oriented(delta_OD)

    def _oriented(self, weight: Tensor) -> Tensor:
        """Convert a weight from the layout of the layer to (O, D), or back. Conv1D of GPT-2 has (D, O)."""
        return weight.T if self.is_transposed else weight


def add_adapters(model: nn.Module, head: nn.Module, rank: int, dropout: float) -> int:
    """Freeze a model, and add adapters to its linear layers, except head and experts. Returns their number."""
    model.requires_grad_(False)
    # A subclass of nn.Linear may compute something else.
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) in (nn.Linear, Conv1D)]
    adapted = [(name, layer) for name, layer in linear if layer is not head and "expert" not in name]
    for name, layer in adapted:
        model.set_submodule(name, LoraLinear(layer, rank, dropout))
    return len(adapted)


def is_adapter(name: str) -> bool:
    """Return whether a weight with this name belongs to an adapter."""
    return ".lora_" in name


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with adapters merged into their base weights.

    If there are adapters, the tensors are on the CPU.
    """
    state = {name: weights for name, weights in module.state_dict().items() if not is_adapter(name)}
    if len(state) == len(module.state_dict()):
        return state
    # Copy to the CPU, because a GPU may not hold a second language model. Tied weights stay tied.
    places = {name: (weights.data_ptr(), weights.shape) for name, weights in state.items()}
    copies = {places[name]: weights.cpu() for name, weights in state.items()}
    merged = {
        f"{name}.weight": layer.merged_weight().cpu()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLinear)
    }
    return {name: copies[places[name]] for name in state} | merged
