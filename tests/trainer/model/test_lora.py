"""Only LoRA adapters are trained, and they are merged into the saved weights."""

import pytest
import torch

from pipeline.errors import TrainError
from tests.trainer.model.test_language_model import batch, decoder_of
from trainer.model import adapters
from trainer.model.adapters import LoraLinear, is_adapter, merged_state, reduce_frozen

FAMILIES = ("llama", "gpt2", "lfm2", "gpt_oss", "falcon")


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


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "gemma3_text"])
def test_frozen_weights_in_bf16_have_the_loss_of_autocast(family: str) -> None:
    """The embedding of Gemma is scaled, and shares its weight with the head."""
    plain, reduced = decoder_of(family).eval(), decoder_of(family).eval()
    torch.manual_seed(1)
    plain.add_adapters(4, 0.0)
    with torch.no_grad():
        for weights in plain.parameters():
            weights.copy_(weights.bfloat16())
    reduced.add_adapters(4, 0.0)
    reduced.load_state_dict(plain.state_dict())
    _ = plain.probed, reduced.probed
    assert not reduce_frozen(reduced, reduced.embedding)
    texts, prefix = batch((9, 6, 8), (0, 0, 1)), torch.randn(2, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reduced.loss(prefix, texts), plain.loss(prefix, texts))
    num_bytes = [sum(weights.nbytes for weights in one.parameters()) for one in (plain, reduced)]
    assert num_bytes[1] < 0.9 * num_bytes[0]


def test_model_without_layers_for_adapters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "LINEAR", ())
    with pytest.raises(TrainError, match="no linear layers"):
        decoder_of("qwen3").add_adapters(4, 0.0)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradients_equal_those_of_peft(family: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    decoder, other = decoder_of(family).eval(), decoder_of(family).eval()
    decoder.add_adapters(4, 0.0)
    names = [name for name, layer in decoder.model.named_modules() if isinstance(layer, LoraLinear)]
    is_gpt2 = family == "gpt2"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=is_gpt2)
    inject_adapter_in_model(config, other.model)
    own = {name: weights for name, weights in decoder.named_parameters() if weights.requires_grad}
    theirs = {name: weights for name, weights in other.named_parameters() if weights.requires_grad}
    assert {name.replace(".default.weight", "") for name in theirs} == own.keys()
    with torch.no_grad():
        for name, weights in theirs.items():
            own[name.replace(".default.weight", "")].copy_(weights.normal_(std=0.1))
    texts, prefix = batch((9, 6, 8), (0, 0, 1)), torch.randn(2, 4, 32)
    loss, expected = decoder.loss(prefix, texts), other.loss(prefix, texts)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, weights in theirs.items():
        torch.testing.assert_close(own[name.replace(".default.weight", "")].grad, weights.grad)


def test_dropout_drops_inputs_of_adapters_only_in_training() -> None:
    layer = LoraLinear(torch.nn.Linear(1000, 1, bias=False), 1, 0.25)
    with torch.no_grad():
        for weights in (layer.lora_A, layer.lora_B):
            weights.fill_(1.0)
        layer.weight.zero_()
    inputs = torch.ones(50, 1000)
    in_training = layer.train()(inputs)
    assert in_training.std() > 10 and in_training.mean().item() == pytest.approx(2000, rel=0.02)
    assert torch.equal(layer.eval()(inputs), torch.full((50, 1), 2000.0))
