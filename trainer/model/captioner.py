"""Captioner: an encoder looks, a connector fits its states to the decoder's width, a decoder writes.

Shapes: B images, C captions (several may share an image), T tokens, N image states, V encoder width, D decoder width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional

from trainer.model.decoder import Cache, Decoder, DecoderConfig
from trainer.model.encoder import Encoder

PAD_ID, EOS_ID = 0, 1  # fixed in every tokenizer that trainer.data trains


@dataclass(frozen=True, slots=True)
class CaptionerConfig:
    """All that is needed to build the model again; `data` says what it was trained on."""

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    styles: list[str]
    max_caption_tokens: int
    data: dict[str, Any] = field(default_factory=dict)


class Captioner(nn.Module, PyTorchModelHubMixin):
    """Saved and loaded with `save_pretrained` and `from_pretrained`: config.json and model.safetensors."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(DecoderConfig(**config.decoder))
        self.connector = nn.Sequential(nn.LayerNorm(self.encoder.width), nn.Linear(self.encoder.width, config.decoder["width"]))

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Look at images: (B, 3, H, W) -> (B, N, D)."""
        memory_BND: Tensor = self.connector(self.encoder(pixels_BCHW))
        return memory_BND

    def loss(self, pixels_BCHW: Tensor, image_of_C: Tensor, ids_CT: Tensor) -> Tensor:
        """Mean negative log-likelihood of a token, over all tokens of all captions.

        Args:
            pixels_BCHW: each image once.
            image_of_C: for each caption, the index of its image.
            ids_CT: start token, words, EOS, then padding.
        """
        memory_CND = self.encode(pixels_BCHW)[image_of_C]
        states_CTD = self.decoder(ids_CT[:, :-1], memory_CND)
        labels_CT = ids_CT[:, 1:]
        learned_CT = labels_CT != PAD_ID  # the scores of padding are never computed
        return functional.cross_entropy(self.decoder.head(states_CTD[learned_CT]), labels_CT[learned_CT])

    @torch.inference_mode()
    def generate(self, pixels_BCHW: Tensor, start_id: int) -> list[list[int]]:
        """Write one caption an image, greedily, until EOS or the longest caption that was trained on.

        Returns token ids without the start token and without EOS. Stops as soon as every caption has ended.
        """
        memory_BND = self.encode(pixels_BCHW)
        cache = Cache()
        next_B = torch.full((len(pixels_BCHW),), start_id, device=pixels_BCHW.device)
        ended_B = torch.zeros_like(next_B, dtype=torch.bool)
        written_TB: list[Tensor] = []
        while len(written_TB) < self.config.max_caption_tokens and not ended_B.all():
            states_BTD = self.decoder(next_B[:, None], memory_BND, cache)
            next_B = self.decoder.head(states_BTD[:, -1]).argmax(-1).masked_fill(ended_B, EOS_ID)
            ended_B |= next_B == EOS_ID
            written_TB.append(next_B)
        return [[token for token in row if token != EOS_ID] for row in torch.stack(written_TB, 1).tolist()]
