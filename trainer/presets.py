"""Names of models, and settings that go together: by the images, their number, and the decoder that learns from them.

Starting points after public recipes (ClipCap, SmallCap, LLaVA-1.5, BLIP), not tuned on many photographs:
docs/measurements.md says what was measured.
"""

from typing import Any, Literal

from pipeline.images.clip import CLIP_MODELS

Preset = Literal["auto", "scenes", "photos-few", "photos", "photos-lm"]  # auto: `choose_preset`, by the command
EncoderStates = Literal["all", "2x2"]  # that a decoder reads: trainer/model/states.py
Precision = Literal["fp32", "tf32", "bf16"]  # of products of matrices; tf32 is of GPUs
FeatureStorage = Literal["bf16", "none"]  # none: states are computed in each step
FEW_IMAGES = 2_000  # below which a wide decoder learns its images by heart

# Short names of models, with their ids on the Hub, or folders.
ENCODERS = {
    "vit": "google/vit-base-patch16-224-in21k",
    **CLIP_MODELS,
    "clip-large": "openai/clip-vit-large-patch14-336",
    "siglip2": "google/siglip2-base-patch16-256",
    "dinov2": "facebook/dinov2-base",
}
TINY_VIT = "tiny-vit"  # an encoder from scratch, trained along with the decoder
PREFIX = "prefix"  # a decoder from scratch in the form of a language model
SCRATCH_DECODERS = ("scratch", PREFIX)
DECODERS = {"qwen3": "Qwen/Qwen3-0.6B-Base", "smollm2": "HuggingFaceTB/SmolLM2-135M"}

PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {},  # the defaults of TrainConfig
    "photos-few": {
        "decoder_width": 256, "decoder_depth": 4, "decoder_heads": 4,
        "batch_size": 16, "connector_lr": 1e-3, "decoder_lr": 1e-3, "lr_floor_frac": 0.02,
        "epochs": 40, "min_steps": 400, "evaluate_epochs": 2.0, "evaluate_images": FEW_IMAGES, "patience": 5,
        "label_smoothing": 0.1, "average_decay": 0.99,
        "max_caption_tokens": 96, "num_beams": 3,
    },
    "photos": {
        "decoder_width": 512, "decoder_depth": 6, "decoder_heads": 8, "vocab_size": 8192,
        "batch_size": 64, "connector_lr": 5e-4, "decoder_lr": 5e-4, "lr_floor_frac": 0.02,
        "epochs": 20, "evaluate_epochs": 1.0, "evaluate_images": 5_000, "patience": 4,
        "label_smoothing": 0.1, "average_decay": 0.999,
        "max_caption_tokens": 96, "num_beams": 3,
    },
    "photos-lm": {
        "batch_size": 64, "align_epochs": 1.0, "align_lr": 1e-3, "connector_lr": 2e-4, "lr_floor_frac": 0.02,
        "lora_rank": 32, "checkpoint_blocks": True,
        "epochs": 3, "min_steps": 60, "evaluate_epochs": 0.5, "evaluate_images": 1_000, "patience": 3,
        "max_caption_tokens": 96, "num_beams": 3,
    },
}  # fmt: skip


DECODER_KINDS = {"photos-few": "scratch", "photos": "scratch", "photos-lm": "a language model"}  # scenes: for any


def choose_preset(*, is_drawn: bool, images: int, decoder: str) -> Preset:
    """Return the preset for drawn or photographed training images, and a decoder from scratch or a language model."""
    if is_drawn:
        return "scenes"
    if decoder not in SCRATCH_DECODERS:
        return "photos-lm"
    return "photos-few" if images < FEW_IMAGES else "photos"


def usual_precision(preset: Preset, *, on_gpu: bool, has_bfloat16: bool) -> Precision:
    """Return the precision of a preset: what the device multiplies fast, but for drawn scenes no less than TF32."""
    if preset == "scenes":
        return "tf32" if on_gpu else "fp32"
    return "bf16" if has_bfloat16 else "fp32"
