"""The states that a decoder reads: of a layer, and all or pooled ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trainer.model.encoder import choose_states, layer_states, patch_grid


class Tower(nn.Module):
    """A tower that returns given layers."""

    def __init__(self, *layers: Tensor) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixels_BCHW: Tensor, *, output_hidden_states: bool = False) -> SimpleNamespace:
        below = self.layers[:-1] if output_hidden_states else None
        return SimpleNamespace(last_hidden_state=self.layers[-1], hidden_states=below)


def test_layer_minus_1_selects_the_output_of_the_tower() -> None:
    below, last = torch.randn(2, 5, 8), 100 * torch.randn(2, 5, 8)
    tower, pixels = Tower(torch.zeros(2, 5, 8), below, last), torch.zeros(2, 3, 4, 4)
    assert layer_states(tower, pixels, -1) is last and layer_states(tower, pixels, 1) is below


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("side", [4, 7])
def test_patches_are_averaged_2x2_and_other_tokens_stay(before: int, side: int) -> None:
    patches = torch.arange(side * side, dtype=torch.float32).view(1, -1, 1)
    tokens = torch.full((1, before, 1), -1.0)
    pooled = choose_states(torch.cat([tokens, patches], 1), "2x2")
    half = -(-side // 2)
    assert pooled.shape == (1, before + half * half, 1)
    assert pooled[0, :before].eq(-1).all()
    grid = patches.view(side, side)
    expected = [grid[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean() for r in range(half) for c in range(half)]
    torch.testing.assert_close(pooled[0, before:, 0], torch.stack(expected))


def test_states_mode_all_changes_nothing_and_mode_2x2_needs_a_square() -> None:
    states = torch.randn(2, 17, 3)
    assert choose_states(states, "all") is states
    with pytest.raises(ValueError, match="12 states do not form a square"):
        choose_states(states[:, :12], "2x2")


GRIDS = {197: (1, 14), 50: (1, 7), 576: (0, 24), 577: (1, 24), 261: (5, 16), 256: (0, 16), 198: (2, 14)}


@pytest.mark.parametrize(("count", "grid"), GRIDS.items())
def test_known_encoders_have_expected_patch_grids(count: int, grid: tuple[int, int]) -> None:
    assert patch_grid(count) == grid
