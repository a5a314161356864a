"""Pretrained decoders: texts do not attend to each other, and are packed if possible."""

import json
from typing import Any

import pytest
import torch

from pipeline.errors import TrainError
from tests.trainer.small_trainings import only
from trainer.model.language_model import PretrainedDecoder
from trainer.model.pretrained import config_of, settings_of
from trainer.tokenizer import TextBatch

BASE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
# The config of this model contains infinity.
GRANITE_H: dict[str, Any] = {
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48, "num_local_experts": 0,
    "num_experts_per_tok": 0, "logits_scaling": 2.0,
}  # fmt: skip
# For each model type: its settings, and whether texts can be packed.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (BASE, True),
    "qwen3": (BASE, True),
    "gpt2": (GPT2, True),
    "opt": ({**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16}, True),
    "cohere": ({**BASE, "logit_scale": 4.0}, True),
    "gemma2": ({**BASE, "final_logit_softcapping": 0.2}, True),
    "gemma3_text": (BASE, True),
    "gpt_oss": ({**BASE, **EXPERTS}, False),
    "qwen3_5_text": ({**BASE, **LINEAR}, False),
    "lfm2": ({**BASE, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, False),
    "mamba": ({"vocab_size": 128, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, False),
    "granitemoehybrid": ({**BASE, **GRANITE_H}, False),
    "bloom": ({"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 2}, False),
    "falcon": ({key: value for key, value in BASE.items() if key != "head_dim"}, True),
}


def decoder_of(family: str) -> PretrainedDecoder:
    torch.manual_seed(0)
    config = config_of({"model_type": family, **FAMILIES[family][0]})
    return PretrainedDecoder(json.loads(json.dumps(settings_of(config))))


def batch(lengths: tuple[int, ...], image_of: tuple[int, ...]) -> TextBatch:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 128, (len(lengths), max(lengths)), generator=draw)
    prompts = torch.full((len(lengths),), 2)
    return TextBatch(torch.tensor(image_of), ids, prompts, torch.tensor(lengths), torch.ones(len(lengths)))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_texts_is_the_sum_of_their_separate_losses(family: str) -> None:
    decoder = decoder_of(family).eval()
    texts = batch((9, 6, 8), (0, 0, 1))
    prefix = torch.randn(2, 4, decoder.width, generator=torch.Generator().manual_seed(6))
    together = decoder.loss(prefix, texts)
    assert decoder.probed.can_pack == FAMILIES[family][1]
    alone = 0.0
    for n, (length, image) in enumerate(zip((9, 6, 8), (0, 0, 1), strict=True)):
        words = decoder.model.get_input_embeddings()(texts.ids_CT[n : n + 1, :length])
        embeds = torch.cat([prefix[image : image + 1], words], 1)
        logits = decoder.model(inputs_embeds=embeds, use_cache=False).logits[0, 4 + 1 : -1]
        alone += torch.nn.functional.cross_entropy(logits, texts.ids_CT[n, 2:length], reduction="sum").item()
    assert together.item() == pytest.approx(alone, rel=2e-4)
    together.backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)


def test_texts_longer_than_the_attention_window_are_not_packed() -> None:
    """If packed, the attention window of the last text would contain other texts instead of the image."""
    torch.manual_seed(0)
    decoder = PretrainedDecoder({"model_type": "gemma3_text", **BASE, "sliding_window": 14}).eval()
    texts = batch((9, 6, 8), (0, 0, 0))
    prefix = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(6))
    # Shorter texts are packed.
    assert decoder.probed.can_pack
    alone = sum(decoder.loss(prefix, only(texts, n)).item() for n in range(3))
    assert decoder.loss(prefix, texts).item() == pytest.approx(alone, rel=1e-4)


def test_dropout_changes_the_loss_in_training_only() -> None:
    plain, decoder = decoder_of("qwen3").eval(), decoder_of("qwen3").eval()
    decoder.add_dropout(0.5)
    texts, prefix = batch((9, 6, 8), (0, 0, 1)), torch.randn(2, 4, 32)
    expected = plain.loss(prefix, texts)
    assert torch.equal(decoder.loss(prefix, texts), expected)
    losses = [decoder.train().loss(prefix, texts).item() for _ in range(2)]
    assert len({*losses, expected.item()}) == 3


def test_model_that_changes_logits_in_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of("llama")
    forward = decoder.model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * output.logits.abs()
        return output

    monkeypatch.setattr(decoder.model, "forward", squared)
    with pytest.raises(TrainError, match="so the training loss would be wrong"):
        _ = decoder.probed


def test_model_without_input_embeddings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of("llama")

    def refuse(**_: Any) -> Any:
        raise ValueError("this model takes ids")

    monkeypatch.setattr(decoder.model, "get_decoder", lambda: refuse)
    with pytest.raises(TrainError, match="the decoder cannot read an image: this model takes ids"):
        _ = decoder.probed


def test_model_with_too_few_positions_is_refused() -> None:
    decoder = PretrainedDecoder(
        {"model_type": "gpt2", "vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 12}
    )
    prefix = torch.zeros(1, 4, 32)
    assert decoder.loss(prefix, batch((8,), (0,)))
    problem = "an image of 4 states and a text of 9 tokens need 13 positions"
    with pytest.raises(TrainError, match=problem) as refused:
        decoder.loss(prefix, batch((9,), (0,)))
    assert "--encoder-states" in refused.value.hint
