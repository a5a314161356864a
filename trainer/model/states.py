"""Which hidden states of an encoder a decoder reads: those of one layer or of several, all of them or fewer.

A published captioner holds a copy of these functions (publish/files.py): they need torch alone.

Shapes: B images, N hidden states, M those that are read, V width of a layer, L layers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# Tokens before the patches: none, a class token, that and one of distillation, that and the registers of DINO.
BEFORE_PATCHES = (0, 1, 2, 5)


def layer_states(tower: nn.Module, pixels_BCHW: Tensor, layers: Sequence[int]) -> Tensor:
    """Return the hidden states of layers, side by side: (B, N, L * V). -1 is the output of the tower, with its last norm.

    Several layers are normalized first, so that none outweighs the others.
    """
    output = tower(pixels_BCHW, output_hidden_states=True) if set(layers) != {-1} else tower(pixels_BCHW)
    parts = [output.last_hidden_state if layer == -1 else output.hidden_states[layer] for layer in layers]
    if len(parts) == 1:
        states_BNV: Tensor = parts[0]
        return states_BNV
    return torch.cat([functional.layer_norm(part, part.shape[-1:]) for part in parts], -1)


def choose_states(states_BNV: Tensor, which: str) -> Tensor:
    """Return the states that a decoder reads, (B, M, V): all; patches averaged 2 x 2 or all together; or the class token.

    With 2 x 2, tokens before the patches stay. Raises ValueError if there is no such token, or the patches are no square.
    """
    if which == "all":
        return states_BNV
    before, side = patch_grid(states_BNV.shape[1])
    patches_BPV = states_BNV[:, before:]
    if which == "class":
        if not before:
            raise ValueError("the encoder has no class token")
        return states_BNV[:, :1]
    if which == "mean":
        return patches_BPV.mean(1, keepdim=True)
    grid_BVRC = patches_BPV.transpose(1, 2).unflatten(2, (side, side))
    pooled_BVRC = functional.avg_pool2d(grid_BVRC, 2, ceil_mode=True)  # of an odd side, the last row is averaged alone
    return torch.cat([states_BNV[:, :before], pooled_BVRC.flatten(2).transpose(1, 2)], 1)


def patch_grid(count: int) -> tuple[int, int]:
    """Return how many of `count` states come before the patches, and the side of their square. Raises ValueError for none."""
    for before in BEFORE_PATCHES:
        side = math.isqrt(max(0, count - before))
        if side > 1 and side * side == count - before:
            return before, side
    raise ValueError(f"the encoder's {count} states are no square of patches")
