"""Encoder: images to hidden states, one vector per patch (and the class token), not pooled.

Shapes: B images, N hidden states, M those that a decoder reads, V encoder width. ViT-B/16 at 224 px: N = 197; CLIP ViT-B/32:
N = 50; V = 768 both.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel, ViTImageProcessor, ViTModel
from transformers.image_processing_utils import BaseImageProcessor

from pipeline.digests import canonical
from pipeline.errors import TrainError, one_line
from trainer.config import ENCODERS, TINY_VIT
from trainer.model.pretrained import (
    LOAD_ERRORS,
    config_of,
    load_config,
    load_weights,
    processor_settings,
    reason_of,
    settings_of,
)

# Patches of 14 px, as in the larger CLIP and DINO towers, in images of 84 px: 36 of them.
TINY_VIT_CONFIG: dict[str, Any] = {
    "model_type": "vit", "image_size": 84, "patch_size": 14,
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 576,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_TEST_IMAGE = Image.linear_gradient("L").convert("RGB")


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Everything needed to rebuild an encoder.

    `layer` indexes hidden states as transformers does: -1 is the output of the last layer, -2 that of the one before.
    `states` are those that a decoder reads. States of a `frozen` encoder are rounded to bfloat16, as in a
    feature store.
    """

    model: dict[str, Any]
    processor: dict[str, Any]
    layer: int = -1
    frozen: bool = False
    made_from: dict[str, str] = field(default_factory=dict)  # name and revision
    states: str = "all"


class Encoder(nn.Module):
    """The vision tower of a ViT, a CLIP or any other vision model of transformers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        model_config = config_of(config.model)
        self.tower: nn.Module = AutoModel.from_config(model_config, **_tower_options(model_config))
        self.width: int = model_config.hidden_size
        self.depth: int = model_config.num_hidden_layers
        kind = _image_processor(config.processor)
        self.processor = kind(**processor_settings(kind, config.processor))
        if config.frozen:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":  # noqa: FBT001  # as torch has it
        """Set the mode of training. A frozen encoder stays as it is used: no dropout, no random positions."""
        super().train(mode and not self.config.frozen)
        return self

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Map prepared pixels to the hidden states that a decoder reads: (B, 3, H, W) -> (B, N, V).

        Raises TrainError if the encoder has no such states.
        """
        states_BNV = self.exact_states(pixels_BCHW)
        return states_BNV.bfloat16().float() if self.config.frozen else states_BNV

    def exact_states(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the states before those of a frozen encoder are rounded; see forward."""
        states_BNV = layer_states(self.tower, pixels_BCHW, self.config.layer)
        try:
            states_BNV = choose_states(states_BNV, self.config.states)
        except ValueError as error:
            hint = "choose all states, or an encoder like ViT and CLIP"
            raise TrainError(f"{error}: it has no states {self.config.states!r}", hint=hint) from None
        return states_BNV

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Preprocess RGB images as in the encoder's training: -> (B, 3, H, W)."""
        prepared: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return prepared

    @torch.inference_mode()
    def count_states(self) -> int:
        """Return how many hidden states of an image a decoder reads."""
        device = next(self.parameters()).device
        return int(self(self.pixels([_TEST_IMAGE]).to(device)).shape[1])

    def key(self) -> str:
        """Return a digest of the encoder's settings and of every weight."""
        about = [self.config.model, self.config.processor, self.config.layer, self.config.states]
        return weights_digest(canonical(about), self.tower.state_dict())


def weights_digest(about: bytes, weights: Mapping[str, Tensor]) -> str:
    """Return a digest of what weights are about, and of their names and every value."""
    sha256 = hashlib.sha256(about)
    for name, tensor in sorted(weights.items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def load_encoder(name: str, *, layer: int = -1, states: str = "all", frozen: bool | None = None) -> Encoder:
    """Load an encoder by name: one of ENCODERS, tiny-vit (untrained), a folder, or an id of the Hub.

    Every encoder but tiny-vit is frozen by default. Raises TrainError if there is no such vision model, it needs more than
    pixels, or it lacks the layer or the states.
    """
    if name == TINY_VIT:
        side = {"height": TINY_VIT_CONFIG["image_size"], "width": TINY_VIT_CONFIG["image_size"]}
        processor = ViTImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).to_dict()
        made_from = {"name": TINY_VIT}
        return _require_states(Encoder(EncoderConfig(TINY_VIT_CONFIG, processor, layer, bool(frozen), made_from, states)))
    model_id = ENCODERS.get(name, name)
    try:
        model_config = load_config(model_id)
        revision = getattr(model_config, "_commit_hash", None)
        model_config = getattr(model_config, "vision_config", model_config)  # there may be a text model as well
        settings = settings_of(model_config)
        config_of(settings)  # which refuses what cannot be rebuilt, such as models of timm
        tower_class: Any = {"vit": ViTModel, "clip_vision_model": CLIPVisionModel}.get(model_config.model_type, AutoModel)
        saved = AutoImageProcessor.from_pretrained(model_id, trust_remote_code=False).to_dict()
        # What JSON can hold, and no path of this machine.
        processor = {name: value for name, value in saved.items() if isinstance(value, str | int | float | bool | list | dict)}
        tower, missing = load_weights(tower_class, model_id, config=model_config, **_tower_options(model_config))
        shown = name if name in ENCODERS else folder_name(Path(model_id)) if Path(model_id).exists() else model_id
        made_from = {"name": shown, **({"revision": revision} if revision else {})}
        encoder = Encoder(EncoderConfig(settings, processor, layer, frozen is not False, made_from, states))
        encoder.tower.load_state_dict(tower.state_dict())
        _require_unused(encoder, missing)
    except LOAD_ERRORS as error:
        reason, hint = reason_of(error), f"pass {', '.join(ENCODERS)}, {TINY_VIT}, or a folder"
        if Path(model_id).is_dir() and not (Path(model_id) / "preprocessor_config.json").exists():
            reason = "its folder has no preprocessor_config.json, which says how images are prepared"
            hint = "save the image processor of the model there, by its save_pretrained"
        elif isinstance(error, AttributeError):
            reason = f"it is no vision transformer: {reason}"
        raise TrainError(f"no encoder {name}: {reason}", hint=hint) from None
    return _require_states(encoder)


def _require_unused(encoder: Encoder, missing: Sequence[str]) -> None:
    """Set weights that are in no file to zero. Raises ValueError if a state depends on them, as none does on a pooler."""
    if not missing:
        return
    weights = encoder.tower.state_dict()
    for name in missing:
        weights[name].fill_(math.nan if weights[name].is_floating_point() else 0)
    with torch.inference_mode():
        if encoder(encoder.pixels([_TEST_IMAGE])).isnan().any():
            what = f"its files lack {len(missing):,} weights of a vision model that can be read alone, such as {missing[0]}"
            raise ValueError(f"{what}: a model of images and texts may name them otherwise")
        for name in missing:
            weights[name].zero_()


def folder_name(folder: Path) -> str:
    """Return the name of an encoder that lies in a folder, which is not the one that is known by that name."""
    return f"{folder.name}/" if folder.name in ENCODERS else folder.name


def _require_states(encoder: Encoder) -> Encoder:
    """Return an encoder that gives the states which its config names, of an image. Raises TrainError if it does not."""
    config, name = encoder.config, encoder.config.made_from["name"]
    if not -encoder.depth - 1 <= config.layer <= encoder.depth:
        hint = f"layers are 0 (the embeddings) to {encoder.depth}, or -1 for the last"
        raise TrainError(f"{name} has no layer {config.layer}", hint=hint)
    try:
        with torch.inference_mode():
            wide = _TEST_IMAGE.resize((_TEST_IMAGE.width * 2, _TEST_IMAGE.height))
            pixels = encoder.pixels([_TEST_IMAGE, wide])[:1]  # in a batch: of one size
            is_training = encoder.training
            states_1NV, again_1NV = encoder.eval()(pixels), encoder(pixels)
            encoder.train(is_training)
            shape = states_1NV.shape
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        hint = "choose one of plain pixels and of one size, such as vit, clip, dinov2 or google/siglip2-base-patch16-224"
        raise TrainError(f"{name} cannot be an encoder here: {one_line(error)}", hint=hint) from None
    if shape != again_1NV.shape or not torch.allclose(states_1NV, again_1NV, atol=1e-3, rtol=1e-3):
        hint = "choose one that sees all of an image each time, such as vit, clip, siglip2 or dinov2"
        raise TrainError(f"{name} gives other states of the same image each time", hint=hint)
    if len(shape) != 3 or shape[2] != encoder.width:
        hint = "choose one that gives a state for each patch, such as vit, clip, siglip2 or dinov2"
        raise TrainError(f"{name} gives states of the shape {[*shape]}, and not (1, states, {encoder.width})", hint=hint)
    return encoder


def _image_processor(settings: dict[str, Any]) -> type[BaseImageProcessor]:
    """Return the class that settings name. Raises TrainError if it is not an image processor: it may be a stranger's."""
    name = settings.get("image_processor_type")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, BaseImageProcessor)):
        raise TrainError(
            f"the checkpoint names {name!r} as its image processor, which is none", hint="do not use this checkpoint"
        )
    return kind


def _tower_options(model_config: Any) -> dict[str, Any]:
    return {"add_pooling_layer": False} if model_config.model_type == "vit" else {}


# A published captioner has a copy of all that follows (trainer/publish/captioner_package.py): it needs torch alone.

# Tokens before the patches: none, a class token, that and one of distillation, that and the registers of DINO.
BEFORE_PATCHES = (0, 1, 2, 5)


def layer_states(tower: nn.Module, pixels_BCHW: Tensor, layer: int) -> Tensor:
    """Return the hidden states of a layer: (B, N, V). -1 is the output of the tower, with its last norm."""
    states_BNV: Tensor
    if layer == -1:
        states_BNV = tower(pixels_BCHW).last_hidden_state
    else:
        states_BNV = tower(pixels_BCHW, output_hidden_states=True).hidden_states[layer]
    return states_BNV


def choose_states(states_BNV: Tensor, which: str) -> Tensor:
    """Return the states that a decoder reads, (B, M, V): all, or patches averaged 2 x 2 behind the tokens before them.

    Raises ValueError if the patches are no square.
    """
    if which == "all":
        return states_BNV
    before, side = patch_grid(states_BNV.shape[1])
    grid_BVRC = states_BNV[:, before:].transpose(1, 2).unflatten(2, (side, side))
    pooled_BVRC = functional.avg_pool2d(grid_BVRC, 2, ceil_mode=True)  # of an odd side, the last row is averaged alone
    return torch.cat([states_BNV[:, :before], pooled_BVRC.flatten(2).transpose(1, 2)], 1)


def patch_grid(count: int) -> tuple[int, int]:
    """Return how many of `count` states come before the patches, and the side of their square. Raises ValueError for none."""
    for before in BEFORE_PATCHES:
        side = math.isqrt(max(0, count - before))
        if side > 1 and side * side == count - before:
            return before, side
    raise ValueError(f"the encoder's {count} states are no square of patches")
