"""In which precision matrices are multiplied, on a GPU and on a CPU. Weights are float32 in each."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.presets import Precision


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in a precision until the context ends, in the whole process.

    For `bf16` a CPU rounds the factors of a product to bfloat16 and adds in float32: all else stays float32, since casts of
    weights and states, as on a GPU, would take what that gains. Its fused attention is left out: its products are too small.
    """
    before, convolved_before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # of the convolution that cuts an image into patches
        if precision == "bf16" and device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # high: TF32
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolved_before


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: for `bf16` on a GPU, most operations take and return bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and device.type != "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has units for products of bfloat16 matrices: a GPU from Ampere on, or a CPU with AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
