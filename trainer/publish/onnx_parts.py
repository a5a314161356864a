"""Define the parts of a captioner as ONNX has them: the encoder, and a step of the decoder with the keys and values before it.

Shapes: B images, N image states, T tokens, S tokens (and states) before, V encoder width, D decoder width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.model.captioner import CaptionerModel
from trainer.model.decoder import BlockCache, Cache, ScratchDecoder
from trainer.model.language_model import PretrainedDecoder

KINDS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")  # of a block: of the words, and of the image
LANGUAGE_KINDS = ("key", "value")  # of a layer of a language model


class EncoderPart(nn.Module):
    """Pixels to the states that the decoder reads."""

    def __init__(self, captioner: CaptionerModel) -> None:
        super().__init__()
        self.encoder, self.connector = captioner.encoder, captioner.connector

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the states of images: (B, N, D)."""
        states_BNV = self.encoder.exact_states(pixels_BCHW)
        if self.encoder.config.frozen:
            states_BNV = round_to_bfloat16(states_BNV)
        states_BND: Tensor = self.connector(states_BNV)
        return states_BND


def round_to_bfloat16(values: Tensor) -> Tensor:
    """Round float32 to the 8 significant bits of bfloat16 by products and differences alone: browsers have no such type.

    Dekker (1971) splits numbers so; halfway between two of them the other one may be taken.
    """
    wide = values * (2.0**16 + 1)
    return wide - (wide - values)


class DecoderStep(nn.Module):
    """One step of the decoder, with the keys and values of a step before, or of none."""

    def __init__(self, decoder: ScratchDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def step(self, ids_BT: Tensor, states_BND: Tensor | None, caches: list[BlockCache], before: int) -> Tensor:
        """Return the logits (B, T, vocabulary), and leave keys and values in the caches."""
        return self.decoder.head(self.decoder(ids_BT, states_BND, Cache(caches, before)))


class FirstStep(DecoderStep):
    """The step that reads a prompt and the image."""

    def forward(self, ids_BT: Tensor, states_BND: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of a prompt, and the keys and values of all blocks in the order of KINDS."""
        caches = [BlockCache() for _ in self.decoder.blocks]
        logits_BTV = self.step(ids_BT, states_BND, caches, 0)
        return logits_BTV, *(part for cache in caches for part in (*(cache.words or ()), *(cache.image or ())))


class NextStep(DecoderStep):
    """The step that reads one more token."""

    def forward(self, ids_B1: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of a token, and the keys and values of the words of all blocks."""
        parts = [past[first : first + len(KINDS)] for first in range(0, len(past), len(KINDS))]
        caches = [BlockCache(words=(part[0], part[1]), image=(part[2], part[3])) for part in parts]
        logits_B1V = self.step(ids_B1, None, caches, past[0].shape[2])
        return logits_B1V, *(part for cache in caches for part in cache.words or ())


class LanguageStep(nn.Module):
    """One step of a language model behind an image, with the keys and values of a step before, or of none."""

    def __init__(self, decoder: PretrainedDecoder) -> None:
        super().__init__()
        self.model = decoder.model

    def step(self, embeds_BTD: Tensor, past: list[Tensor], before: int) -> tuple[Tensor, ...]:
        """Return the logits of the last token (B, 1, vocabulary), and keys and values of all layers, as in LANGUAGE_KINDS."""
        cache, T = DynamicCache(), embeds_BTD.shape[1]
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        # A token sees itself and all before it: a single new one sees all. A mask that is added suits every kind of attention.
        mask_TS = torch.zeros(T, before + T, dtype=embeds_BTD.dtype)
        if T > 1:
            mask_TS = torch.full_like(mask_TS, torch.finfo(mask_TS.dtype).min).triu(1)
        logits_BTV = self.model(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_TS[None, None],
            position_ids=torch.arange(before, before + T)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # a vocabulary may have 150,000 tokens
        ).logits
        layers: list[Any] = cache.layers
        return logits_BTV, *(part for layer in layers for part in (layer.keys, layer.values))


class LanguageFirstStep(LanguageStep):
    """The step that reads an image and the prompt behind it."""

    def forward(self, ids_BT: Tensor, states_BND: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of what follows a prompt behind images, and all keys and values."""
        words_BTD = self.model.get_input_embeddings()(ids_BT)
        return self.step(torch.cat([states_BND.to(words_BTD.dtype), words_BTD], 1), [], 0)


class LanguageNextStep(LanguageStep):
    """The step that reads one more token."""

    def forward(self, ids_B1: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of a token, and all keys and values."""
        return self.step(self.model.get_input_embeddings()(ids_B1), past, past[0].shape[2])
