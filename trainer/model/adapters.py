"""LoRA adapters (Hu et al., 2021): frozen linear layers, each with a trained product of two narrow matrices.

Shapes: K tokens, D input width, O output width, R rank.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

# Other subclasses of nn.Linear, such as routers of experts, compute something else.
LINEAR = (nn.Linear, Conv1D, FalconLinear)
# Other libraries define this as lora_alpha / rank.
SCALE = 2.0


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: x W^T + b + SCALE * dropout(x) A^T B^T. B is 0 at the start.

    The weights of the layer keep their names.
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
        if torch.is_autocast_enabled(x.device.type):
            x_KD = x_KD.to(torch.get_autocast_dtype(x.device.type))
        y_KO = functional.linear(x_KD, self._oriented(self.weight), self.bias)
        low_KR = functional.linear(functional.dropout(x_KD, self.dropout, self.training), self.lora_A)
        # Adding in place saves a kernel and memory. Autocast does not cast operations in place.
        y_KO.addmm_(low_KR, self.lora_B.to(y_KO.dtype).T, alpha=SCALE)
        return y_KO.view(*x.shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        """Return the change that merges the adapter into the weight, on the CPU."""
        return self._oriented(SCALE * self.lora_B.detach().cpu() @ self.lora_A.detach().cpu())

    def _oriented(self, weight: Tensor) -> Tensor:
        """Convert a weight between the layout of the layer and (O, D)."""
        return weight.T if self.is_transposed else weight


def add_adapters(model: nn.Module, head: nn.Module, rank: int, dropout: float) -> int:
    """Freeze a model, and add adapters to its linear layers except head and experts. Returns their number."""
    model.requires_grad_(False)
    linear = [(name, layer) for name, layer in model.named_modules() if type(layer) in LINEAR]
    adapted = [(name, layer) for name, layer in linear if layer is not head and "expert" not in name]
    for name, layer in adapted:
        model.set_submodule(name, LoraLinear(layer, rank, dropout))
    return len(adapted)


def is_adapter(name: str) -> bool:
    """Return whether a weight with this name belongs to an adapter."""
    return ".lora_" in name


def reduce_frozen(module: nn.Module, embedding: nn.Embedding) -> dict[str, Tensor]:
    """Store frozen weights of linear layers, and the input `embedding`, in bfloat16.

    The embedding stays float32 if rounding would change it. Returns the float32 weights that were rounded, on
    the CPU.
    """
    exact: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        is_linear = type(layer) in (*LINEAR, LoraLinear)
        if not (is_linear or layer is embedding) or layer.weight.requires_grad:
            continue
        reduced = layer.weight.detach().bfloat16()
        is_rounded = not torch.equal(reduced.float(), layer.weight)
        # A subclass of nn.Embedding may compute something else. The head may share the weight.
        if layer.weight is embedding.weight and (is_rounded or type(embedding) is not nn.Embedding):
            continue
        if is_rounded:
            exact[f"{name}.weight"] = layer.weight.detach().cpu()
        layer.weight.data = reduced
        if layer is embedding:
            layer.register_forward_hook(lambda _layer, _ids, states: states.float())
    return exact


def merged_state(module: nn.Module, exact: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict with adapters merged into their base weights.

    With adapters, the tensors are float32 and on the CPU. `exact` is the result of `reduce_frozen`.
    """
    state = {name: weights for name, weights in module.state_dict().items() if not is_adapter(name)}
    if len(state) == len(module.state_dict()):
        return state
    # Copy to the CPU, because a GPU may not hold a second language model. Tied weights stay tied.
    places = {name: (weights.data_ptr(), weights.shape) for name, weights in state.items()}
    copies = {places[name]: weights.cpu() for name, weights in state.items()}
    copies |= {places[name]: weights for name, weights in (exact or {}).items()}
    copies = {place: w.float() if w.dtype == torch.bfloat16 else w for place, w in copies.items()}
    merged = {name: copies[place] for name, place in places.items()}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.delta()
    return merged
