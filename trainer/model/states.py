"""Which hidden states of an encoder a decoder reads: those of a layer, all of them or fewer.

A published captioner holds a copy of these functions (publish/files.py): they need torch alone.

Shapes: B images, N hidden states, M those that are read, V width of a layer.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# Tokens before the patches: none, a class token, that and one of distillation, that and the registers of DINO.
BEFORE_PATCHES = (0, 1, 2, 5)


def layer_states(tower: nn.Module, pixels_BCHW: Tensor, layer: int) -> Tensor:
    """Return the hidden states of a layer: (B, N, V). -1 is the output of the tower, with its last norm."""
    states_BNV: Tensor
    if layer == -1:
        states_BNV = tower(pixels_BCHW).last_hidden_state
    else:
        states_BNV = tower(pixels_BCHW, output_hidden_states=True).hidden_states[layer]
    return states_BNV


def choose_states(states_BNV: Tensor, which: str) -> Tensor:
    """Return the states that a decoder reads, (B, M, V): all, or patches averaged 2 x 2 behind the tokens before them.

    Raises ValueError if the patches are no square.
    """
    if which == "all":
        return states_BNV
    before, side = patch_grid(states_BNV.shape[1])
    grid_BVRC = states_BNV[:, before:].transpose(1, 2).unflatten(2, (side, side))
    pooled_BVRC = functional.avg_pool2d(grid_BVRC, 2, ceil_mode=True)  # of an odd side, the last row is averaged alone
    return torch.cat([states_BNV[:, :before], pooled_BVRC.flatten(2).transpose(1, 2)], 1)


def patch_grid(count: int) -> tuple[int, int]:
    """Return how many of `count` states come before the patches, and the side of their square. Raises ValueError for none."""
    for before in BEFORE_PATCHES:
        side = math.isqrt(max(0, count - before))
        if side > 1 and side * side == count - before:
            return before, side
    raise ValueError(f"the encoder's {count} states are no square of patches")
