"""Encoder: images to hidden states, one vector a patch (and one for the whole), never a pooled one.

Shapes: B images, N = 1 + patches hidden states, V encoder width.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

# Patches of 14 px, as in the larger CLIP and DINO towers, in pictures of 84 px: 36 of them.
TINY_VIT: dict[str, Any] = {
    "image_size": 84,
    "patch_size": 14,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 576,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MEAN = STD = 0.5  # of ViT's own preprocessing: pixels go from [0, 1] to [-1, 1]


class Encoder(nn.Module):
    """A ViT from transformers; `settings` are those of its ViTConfig."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.image_size_px: int = settings["image_size"]
        self.width: int = settings["hidden_size"]
        self.vit = ViTModel(ViTConfig(**settings), add_pooling_layer=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Map pixels in [-1, 1] to hidden states of the last layer: (B, 3, H, W) -> (B, N, V)."""
        states_BNV: Tensor = self.vit(pixels_BCHW).last_hidden_state
        return states_BNV

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Scale RGB images to the size that this encoder takes: -> (B, 3, H, W) in [-1, 1]."""
        size = (self.image_size_px, self.image_size_px)
        scaled = [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in images]
        stacked_BHWC = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*size, 3) for i in scaled])
        return (stacked_BHWC.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
