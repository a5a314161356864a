"""Devices: the precision of matrix products."""

import pytest
import torch

from trainer.config import Precision, Preset
from trainer.runtime.devices import default_precision, matmul_precision


@pytest.mark.parametrize(("precision", "setting"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_matrix_precision_is_set_within_the_context(precision: Precision, setting: str) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with matmul_precision(precision):
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_default_precision_depends_on_preset_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Preset, str, bool, str]] = [
        ("scenes", "cuda", True, "tf32"),
        ("scenes", "cpu", True, "fp32"),
        ("photos", "cuda", True, "bf16"),
        ("photos", "cuda", False, "tf32"),
        ("photos", "cpu", True, "fp32"),
    ]
    for preset, device, has_bfloat16, precision in cases:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bfloat16, **_: has)
        assert default_precision(preset, torch.device(device)) == precision
