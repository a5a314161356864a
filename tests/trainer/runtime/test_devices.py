"""Devices: matrix precision, and gradients summed over processes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.config import Precision, Preset
from trainer.runtime.devices import all_reduce_gradients, default_precision, matmul_precision


def test_all_reduce_adds_no_gradient_to_weights_without_gradient(tmp_path: Path) -> None:
    """With a zero gradient, weight decay would change them, unlike in one process."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        assert all_reduce_gradients(model, torch.tensor(1.5)) == 1.5
    finally:
        torch.distributed.destroy_process_group()
    assert [weights.grad is None for weights in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(("precision", "setting"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_matrix_precision_is_set_within_the_context(precision: Precision, setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == setting
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    ("preset", "device", "has_bfloat16", "precision"),
    [
        ("scenes", "cuda", True, "tf32"),
        ("scenes", "cpu", True, "fp32"),
        ("photos", "cuda", True, "bf16"),
        ("photos", "cuda", False, "tf32"),
        ("photos", "cpu", True, "bf16"),
        ("photos", "cpu", False, "fp32"),
    ],
)
def test_default_precision_depends_on_preset_and_device(
    monkeypatch: pytest.MonkeyPatch, preset: Preset, device: str, *, has_bfloat16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_bfloat16})
    assert default_precision(preset, torch.device(device)) == precision
