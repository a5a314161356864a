"""Sums of gradients over processes."""

from pathlib import Path

import torch
from torch import nn

from trainer.distributed import all_reduce_gradients


def test_weights_without_a_gradient_in_any_process_have_none_after_the_sum(tmp_path: Path) -> None:
    """The optimizer would change them by their decay, as it does not in one process."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert all_reduce_gradients(model, 1.5, torch.device("cpu")) == 1.5
    finally:
        torch.distributed.destroy_process_group()
    assert [weights.grad is None for weights in model.parameters()] == [False, False, True, True]
