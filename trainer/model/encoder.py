"""Image encoder: returns unpooled hidden states, one vector for each patch or position of a feature map.

Shapes: B images, N hidden states of the model, M states after selection, V encoder width, R rows and C
columns of a feature map. ViT-B/16 at 224 px has N = 197 and V = 768 (a class token and 14 x 14 patches),
ResNet-50 has N = 49 and V = 2048 (7 x 7 positions).
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
from PIL.Image import Resampling
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig, ViTImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from pipeline.digests import canonical
from pipeline.errors import TrainError, one_line
from trainer.config import ENCODERS, TINY_VIT
from trainer.model import pretrained

# 36 patches of 14 px, the patch size of larger CLIP and DINO towers.
TINY_VIT_CONFIG: dict[str, Any] = {
    "model_type": "vit", "image_size": 84, "patch_size": 14,
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 576,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_HINT = f"pass {', '.join(ENCODERS)}, {TINY_VIT}, or a folder or Hub id of a transformers or timm model"
_TEST_IMAGE = Image.linear_gradient("L").convert("RGB")


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Everything needed to rebuild an encoder.

    `width` is the number of features per state. `states` selects hidden states of the last layer (see
    `choose_states`). `made_from` holds the name and the revision of the original model.
    """

    model: dict[str, Any]
    processor: dict[str, Any]
    width: int
    frozen: bool = False
    made_from: dict[str, str] = field(default_factory=dict)
    states: str = "all"


# The definitions up to `Tower` are copied into checkpoints, so they may use only torch and transformers.

# Before the patches, there may be no token, a class token, two tokens (distillation), or registers.
BEFORE_PATCHES = (0, 1, 2, 4, 5)


def choose_states(states: Tensor, which: str, width: int, pixels_BCHW: Tensor) -> Tensor:
    """Return the states for the decoder (B, M, V). Unless `which` is "all", 2 x 2 positions are averaged.

    `states` are a sequence (B, N, V), or a feature map with channels first (B, V, R, C) or last (B, R, C, V).
    Raises ValueError if the width is not V, or if the patches of a sequence do not form a grid.
    """
    if width not in (states.shape[-1], states.shape[1 if states.dim() == 4 else -1]):
        raise ValueError(f"the encoder returns states of shape {[*states.shape]}, not of width {width}")
    if states.dim() == 4:
        map_BVRC = states if states.shape[1] == width else states.permute(0, 3, 1, 2)
        before_BNV = states.new_empty(len(states), 0, width)
    elif which == "all":
        return states
    else:
        before, rows, columns = patch_grid(states.shape[1], *pixels_BCHW.shape[2:])
        map_BVRC = states[:, before:].transpose(1, 2).unflatten(2, (rows, columns))
        before_BNV = states[:, :before]
    if which != "all":
        map_BVRC = functional.avg_pool2d(map_BVRC, 2, ceil_mode=True)
    return torch.cat([before_BNV, map_BVRC.flatten(2).transpose(1, 2)], 1)


def patch_grid(count: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the number of states before the patches, and the rows and columns of the patch grid.

    The grid has the aspect ratio of the image. Raises ValueError if the patches do not form such a grid.
    """
    for before in BEFORE_PATCHES:
        rows = round(math.sqrt(max(0, count - before) * height / width))
        columns = round(rows * width / height)
        if rows > 1 and rows * columns == count - before:
            return before, rows, columns
    raise ValueError(f"{count} states do not form a grid of patches")


def tower_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the options that leave out an unused pooling layer."""
    return {"add_pooling_layer": False} if config.model_type == "vit" else {}


class Tower(nn.Module):
    """The vision tower of ViT, CLIP, ResNet or another vision model of transformers or timm."""

    def __init__(self, config: PreTrainedConfig, states: str, width: int, *, is_rounded: bool) -> None:
        super().__init__()
        self.tower: nn.Module = AutoModel.from_config(config, **tower_options(config))
        self.states, self.width, self.is_rounded = states, width, is_rounded

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the hidden states for the decoder, (B, M, V), rounded to bfloat16 if the tower is frozen."""
        last = self.tower(pixels_BCHW).last_hidden_state
        states_BMV = choose_states(last, self.states, self.width, pixels_BCHW)
        return states_BMV.bfloat16().to(states_BMV.dtype) if self.is_rounded else states_BMV


class Encoder(Tower):
    """A vision tower with its preprocessing."""

    def __init__(self, config: EncoderConfig) -> None:
        model_config = pretrained.config_of(config.model)
        super().__init__(model_config, config.states, config.width, is_rounded=config.frozen)
        self.config = config
        kind = _image_processor(config.processor)
        self.processor = kind(**pretrained.processor_settings(kind, config.processor))
        if config.frozen:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Encoder":  # noqa: FBT001
        """Set the mode. A frozen encoder and batch norms always stay in evaluation mode.

        The statistics of a batch would depend on its images and on the number of processes.
        """
        super().train(mode and not self.config.frozen)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """Preprocess RGB images with the model's image processor. Returns (B, 3, H, W)."""
        prepared: Tensor = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return prepared

    def key(self) -> str:
        """Return a digest of the settings and weights, which identifies stored features."""
        settings = [self.config.model, self.config.processor, self.config.states]
        return weights_digest(canonical(settings), self.tower.state_dict())


def weights_digest(prefix: bytes, weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 digest of `prefix` and all weights with their names."""
    sha256 = hashlib.sha256(prefix)
    for name, tensor in sorted(weights.items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def load_encoder(name: str, *, states: str = "all", frozen: bool | None = None) -> Encoder:
    """Load an encoder by a name in ENCODERS, a folder or a Hub id, or build tiny-vit with random weights.

    By default, all encoders except tiny-vit are frozen. Raises TrainError if the model cannot be loaded,
    needs other inputs besides pixels, or does not support `states`.
    """
    if name == TINY_VIT:
        processor = _squashing_processor(TINY_VIT_CONFIG["image_size"], TINY_VIT_CONFIG["image_size"])
        made_from, width = {"name": TINY_VIT}, TINY_VIT_CONFIG["hidden_size"]
        config = EncoderConfig(TINY_VIT_CONFIG, processor, width, bool(frozen), made_from, states)
        return _require_states(Encoder(config))
    model_id = ENCODERS.get(name, name)
    try:
        model_config = pretrained.load_config(model_id)
        revision = getattr(model_config, "_commit_hash", None)
        processor = _load_processor(model_id, model_config)
        model_config = getattr(model_config, "vision_config", model_config)
        settings = pretrained.settings_of(model_config)
        model_config = pretrained.config_of(settings)  # raises if the model cannot be rebuilt
        options = {"config": model_config, **tower_options(model_config)}
        tower, missing = pretrained.load_weights(AutoModel, model_id, **options)
        shown = folder_name(Path(model_id)) if name not in ENCODERS and Path(model_id).exists() else name
        made_from = {"name": shown, **({"revision": revision} if revision else {})}
        width = _measure_width(tower.eval(), processor)
        encoder = Encoder(EncoderConfig(settings, processor, width, frozen is not False, made_from, states))
        encoder.tower.load_state_dict(tower.state_dict())
        _require_unused(encoder, missing)
    except pretrained.LOAD_ERRORS as error:
        reason = pretrained.reason_of(error)
        if isinstance(error, AttributeError):
            reason = f"it is not an image encoder: {reason}"
        raise TrainError(f"cannot load encoder {name}: {reason}", hint=_HINT) from None
    return _require_states(encoder)


def _load_processor(model_id: str, model_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of the image processor of a model.

    The transforms of timm crop the borders of an image, where captions may name objects. Therefore, images
    for timm models are resized without a crop.
    """
    if model_config.model_type == pretrained.TIMM:
        trained = getattr(model_config, "pretrained_cfg", {})
        (_, height, width), resampling = trained["input_size"], trained.get("interpolation", "bicubic")
        norm = {"image_mean": trained["mean"], "image_std": trained["std"]}
        return _squashing_processor(height, width, resample=Resampling[resampling.upper()].value, **norm)
    saved = AutoImageProcessor.from_pretrained(model_id, trust_remote_code=False).to_dict()
    # Keep only JSON values.
    return {key: value for key, value in saved.items() if isinstance(value, str | int | float | list | dict)}


def _squashing_processor(height: int, width: int, **settings: Any) -> dict[str, Any]:
    """Return the settings of a processor that resizes images to `height` x `width` pixels without a crop."""
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return ViTImageProcessor(size={"height": height, "width": width}, **norm | settings).to_dict()


def _measure_width(tower: nn.Module, processor: dict[str, Any]) -> int:
    """Return the number of features per hidden state."""
    kind = _image_processor(processor)
    pixels = kind(**pretrained.processor_settings(kind, processor))([_TEST_IMAGE], return_tensors="pt")
    with torch.inference_mode():
        shape = tower(pixels["pixel_values"]).last_hidden_state.shape
    # A feature map has more channels than rows or columns.
    return int(shape[-1] if len(shape) == 3 else max(shape[1:]))


def folder_name(folder: Path) -> str:
    """Return the name of a folder. A slash is added if it equals the name of a known encoder."""
    return f"{folder.name}/" if folder.name in ENCODERS else folder.name


def _require_unused(encoder: Encoder, missing: Sequence[str]) -> None:
    """Set missing weights to zero. Raises ValueError if the hidden states depend on these weights."""
    if not missing:
        return
    weights = encoder.tower.state_dict()
    for name in missing:
        weights[name].fill_(math.nan if weights[name].is_floating_point() else 0)
    with torch.inference_mode():
        if encoder(encoder.pixels([_TEST_IMAGE])).isnan().any():
            raise ValueError(f"its files lack {len(missing)} weights of a vision model, such as {missing[0]}")
        for name in missing:
            weights[name].zero_()


def _require_states(encoder: Encoder) -> Encoder:
    """Check an encoder and return it. Raises TrainError if its states are not usable."""
    name, was_training = encoder.config.made_from["name"], encoder.training
    try:
        with torch.inference_mode():
            # The two images differ in shape, so this fails if the processor does not resize to a fixed size.
            wide = _TEST_IMAGE.resize((_TEST_IMAGE.width * 2, _TEST_IMAGE.height))
            pixels = encoder.pixels([_TEST_IMAGE, wide])[:1]
            states_1MV, again_1MV = encoder.eval()(pixels), encoder(pixels)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        hint = "choose an encoder with a fixed image size, such as vit, clip or timm/resnet50.a1_in1k"
        raise TrainError(f"{name} cannot be used as an encoder: {one_line(error)}", hint=hint) from None
    encoder.train(was_training)
    shape = states_1MV.shape
    hint = "choose an encoder with one state per patch or position, such as vit, clip, dinov2 or a ResNet"
    if shape != again_1MV.shape or not torch.allclose(states_1MV, again_1MV, atol=1e-3, rtol=1e-3):
        raise TrainError(f"{name} returns different states for the same image", hint=hint)
    if len(shape) != 3 or shape[2] != encoder.width:
        raise TrainError(f"{name} returns states of shape {[*shape]}, not (1, N, {encoder.width})", hint=hint)
    return encoder


def _image_processor(settings: dict[str, Any]) -> type[BaseImageProcessor]:
    """Return the image processor class named in untrusted settings. Raises TrainError for anything else."""
    name = settings.get("image_processor_type")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, BaseImageProcessor)):
        problem = f"the image processor of the checkpoint, {name!r}, is not in transformers"
        raise TrainError(problem, hint="do not use this checkpoint")
    return kind
