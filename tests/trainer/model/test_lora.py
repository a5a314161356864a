"""LoRA adapters: only they learn, they start without effect, and merge into the saved weights."""

import sys

import pytest
import torch

from pipeline.errors import TrainError
from tests.trainer.model.test_language_model import batch, decoder_of
from trainer.model.language_model import is_adapter, merged_state

FAMILIES = ("llama", "gpt2", "lfm2", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_are_trained_and_they_start_as_identity(family: str) -> None:
    plain, decoder = decoder_of(family).eval(), decoder_of(family).eval()
    decoder.add_adapters(4, 0.0)
    texts, prefix = batch((9, 6, 8), (0, 0, 1)), torch.randn(2, 4, 32)
    loss = decoder.loss(prefix, texts)
    torch.testing.assert_close(loss, plain.loss(prefix, texts))
    loss.backward()
    with_gradient = {name for name, weights in decoder.named_parameters() if weights.grad is not None}
    assert with_gradient and all(map(is_adapter, with_gradient))
    assert with_gradient <= {name for name, weights in decoder.named_parameters() if weights.requires_grad}
    assert decoder.frozen_names() == {name for name in decoder.state_dict() if not is_adapter(name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_have_the_loss_of_the_adapters(family: str) -> None:
    decoder, plain = decoder_of(family).eval(), decoder_of(family).eval()
    decoder.add_adapters(4, 0.1)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in decoder.parameters():
            if weights.requires_grad:
                weights.normal_(std=0.1)
    plain.load_state_dict(merged_state(decoder))
    texts, prefix = batch((9, 6, 8), (0, 0, 1)), torch.randn(2, 4, 32)
    expected = decoder.loss(prefix, texts)
    torch.testing.assert_close(plain.loss(prefix, texts), expected, rtol=1e-4, atol=1e-3)
    assert abs(decoder_of(family).eval().loss(prefix, texts).item() - expected.item()) > 0.01


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_blocks_with_adapters_are_recomputed_on_request(*, is_recomputed: bool) -> None:
    decoder, calls = decoder_of("qwen3").train(), list[None]()
    decoder.add_adapters(4, 0.0)
    if is_recomputed:
        assert decoder.recompute_blocks()
        assert not decoder.recompute_blocks()  # nothing changes
    decoder.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    _ = decoder.probed
    calls.clear()
    decoder.loss(torch.randn(2, 4, 32), batch((9, 6, 8), (0, 0, 1))).backward()
    assert len(calls) == 1 + is_recomputed


def test_error_without_peft_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainError, match="lora_rank needs the package peft") as refused:
        decoder_of("llama").add_adapters(4, 0.0)
    assert refused.value.hint == "pip install 'peft>=0.18'"
