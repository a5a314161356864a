"""Devices: matrix precision, and gradients summed over processes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import TrainError
from trainer.config import Precision
from trainer.runtime.devices import all_reduce_gradients, matmul_precision, translate_peer_errors


def test_all_reduce_adds_no_gradient_to_weights_without_gradient(tmp_path: Path) -> None:
    """With a zero gradient, weight decay would change them, unlike in one process."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert all_reduce_gradients(model, torch.tensor(1.5)) == 1.5
    finally:
        torch.distributed.destroy_process_group()
    assert [weights.grad is None for weights in model.parameters()] == [False, False, True, True]


def test_failed_communication_is_an_error_with_a_hint() -> None:
    with pytest.raises(TrainError, match="lost contact with the other processes"), translate_peer_errors():
        raise RuntimeError("Connection closed")
    with pytest.raises(RuntimeError, match="CUDA error"), translate_peer_errors():
        raise RuntimeError("CUDA error: of this one's GPU")


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "device", "setting"),
    [
        ("fp32", CPU, "highest"), ("tf32", CPU, "high"), ("bf16", CPU, "medium"),
        ("fp32", GPU, "highest"), ("tf32", GPU, "high"), ("bf16", GPU, "high"),
    ],
)  # fmt: skip
def test_matrix_precision_is_set_within_the_context(
    precision: Precision, device: torch.device, setting: str
) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    before = torch.backends.cudnn.allow_tf32
    with matmul_precision(precision, device):
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 == before
