"""Devices: the precision of products, and gradients that several processes sum."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer.devices import all_reduce_gradients, autocast, multiplies_bfloat16, products_in
from trainer.presets import Precision


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


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "device", "setting"),
    [
        ("fp32", CPU, "highest"), ("tf32", CPU, "high"), ("bf16", CPU, "medium"),
        ("fp32", GPU, "highest"), ("tf32", GPU, "high"), ("bf16", GPU, "high"),
    ],
)  # fmt: skip
def test_products_are_rounded_as_the_device_does_it_and_only_within_the_context(
    precision: Precision, device: torch.device, setting: str
) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    before = torch.backends.cudnn.allow_tf32
    with products_in(precision, device):
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")  # of the convolution that cuts an image into patches
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32 == before


def test_on_a_cpu_all_but_the_factors_of_products_stays_float32() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 64, 256, requires_grad=True)
    exact = first @ second.T
    with products_in("bf16", CPU), autocast("bf16", CPU):
        rounded = first @ second.T
        attended = scaled_dot_product_attention(first[None], second[None], second[None])
        (gradient,) = torch.autograd.grad(rounded.sum(), first)
    assert rounded.dtype == attended.dtype == gradient.dtype == torch.float32
    assert float((rounded - exact).detach().abs().max()) < 0.02 * float(exact.detach().abs().max())
    torch.testing.assert_close(attended[0], attend(first, second), rtol=0.05, atol=0.05)
    if multiplies_bfloat16(CPU):
        assert not torch.equal(rounded, exact)


def attend(queries: Tensor, keys: Tensor) -> Tensor:
    weights: Tensor = (queries @ keys.T / queries.shape[-1] ** 0.5).softmax(-1)
    return weights @ keys


def test_a_gpu_multiplies_bfloat16_and_a_cpu_if_it_has_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities in ({"amx_bf16": True}, {"amx_bf16": False}, {}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert multiplies_bfloat16(CPU) == capabilities.get("amx_bf16", False)
    for has_units in (True, False):  # those of a T4 are emulated
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, found=has_units: found)
        assert multiplies_bfloat16(GPU) == has_units
