"""Encoder: images to hidden states, one vector a patch (and one for the whole), never a pooled one.

Shapes: B images, N hidden states, V encoder width. ViT-B/16 at 224 px: N = 197; CLIP ViT-B/32: N = 50; V = 768 both.
"""

import hashlib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModel, ViTImageProcessor, ViTModel

from pipeline.digests import canonical
from pipeline.errors import TrainError
from trainer.model.hf_config import quietly, settings_of

HUB = {
    "vit": "google/vit-base-patch16-224-in21k",
    "clip": "openai/clip-vit-base-patch32",
    "metaclip": "facebook/metaclip-b32-400m",
}
TINY_CLIP = "tiny-clip"  # shipped with the package; knows drawn scenes
TINY_VIT = "tiny-vit"  # from scratch, trained along with the decoder
# Patches of 14 px, as in the larger CLIP and DINO towers, in pictures of 84 px: 36 of them.
TINY_VIT_CONFIG: dict[str, Any] = {
    "model_type": "vit",
    "image_size": 84,
    "patch_size": 14,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 576,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """All that is needed to build an encoder again.

    `layer` counts hidden states as transformers does: -1 is what the last layer gives, -2 what the one before it gives.
    States of a `frozen` encoder are rounded to bfloat16, which is how a feature cache keeps them.
    """

    model: dict[str, Any]
    processor: dict[str, Any]
    layer: int = -1
    frozen: bool = False
    made_from: dict[str, str] = field(default_factory=dict)  # name and revision


class Encoder(nn.Module):
    """The vision tower of a ViT, a CLIP or any other vision model of transformers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        about = AutoConfig.for_model(**config.model)
        self.tower = _build(about)
        self.width: int = about.hidden_size
        kind = getattr(transformers, config.processor["image_processor_type"])
        self._processor = kind(**{name: value for name, value in config.processor.items() if not name.endswith("_type")})
        if config.frozen:
            self.requires_grad_(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Map prepared pixels to the hidden states of the chosen layer: (B, 3, H, W) -> (B, N, V)."""
        if self.config.layer == -1:
            states_BNV: Tensor = self.tower(pixels_BCHW).last_hidden_state
        else:
            states_BNV = self.tower(pixels_BCHW, output_hidden_states=True).hidden_states[self.config.layer]
        return states_BNV.bfloat16().float() if self.config.frozen else states_BNV

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Prepare RGB images as the encoder was trained on them: -> (B, 3, H, W)."""
        prepared: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return prepared

    def key(self) -> str:
        """Return a name for what this encoder computes: its settings and every weight."""
        found = hashlib.sha256(canonical([self.config.model, self.config.processor, self.config.layer]))
        for name, tensor in sorted(self.tower.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def load_encoder(name: str, *, layer: int = -1, frozen: bool | None = None) -> Encoder:
    """Load an encoder by name: vit, clip, metaclip, tiny-clip, tiny-vit (untrained), a folder, or an id of the Hub.

    All are frozen unless told, but for the one that is untrained.

    Raises:
        TrainError: there is no such model, it is no vision model, or it has no such layer.
    """
    if name == TINY_VIT:
        side = {"height": TINY_VIT_CONFIG["image_size"], "width": TINY_VIT_CONFIG["image_size"]}
        processor = ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).to_dict()
        return Encoder(EncoderConfig(TINY_VIT_CONFIG, processor, layer, bool(frozen), {"name": TINY_VIT}))
    place = place_of(name)
    try:
        about = AutoConfig.from_pretrained(place)
        revision = getattr(about, "_commit_hash", None)
        about = getattr(about, "vision_config", about)
        processor = AutoImageProcessor.from_pretrained(place).to_dict()
        options: dict[str, Any] = {"add_pooling_layer": False} if about.model_type == "vit" else {}
        with quietly():
            tower = _class_of(about).from_pretrained(place, dtype=torch.float32, **options)
        shown = name if name in (TINY_CLIP, *HUB) else Path(place).name if Path(place).exists() else place
        made_from = {"name": shown, **({"revision": revision} if revision else {})}
        encoder = Encoder(EncoderConfig(settings_of(about), _plain(processor), layer, frozen is not False, made_from))
        encoder.tower.load_state_dict(tower.state_dict())
        layers = about.num_hidden_layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0][:200]
        raise TrainError(
            f"no encoder {name}: {said}", hint="pass vit, clip, metaclip, tiny-clip, tiny-vit, or a folder"
        ) from None
    if not -layers - 1 <= layer <= layers:
        raise TrainError(f"{name} has no layer {layer}", hint=f"layers are 0 (the embeddings) to {layers}, or -1 for the last")
    return encoder


def place_of(name: str) -> str:
    """Return the folder, or the id on the Hub, that a name stands for."""
    return str(files("pipeline.scenes") / "weights" / "clip") if name == TINY_CLIP else HUB.get(name, name)


def _build(about: Any) -> nn.Module:
    kind = _class_of(about)
    built: nn.Module
    if kind is ViTModel:
        built = ViTModel(about, add_pooling_layer=False)
    else:
        built = kind(about) if kind is CLIPVisionModel else AutoModel.from_config(about)
    return built


def _class_of(about: Any) -> Any:
    return {"vit": ViTModel, "clip_vision_model": CLIPVisionModel}.get(about.model_type, AutoModel)


def _plain(processor: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold, and no path of this machine."""
    return {name: value for name, value in processor.items() if isinstance(value, str | int | float | bool | list | dict)}
