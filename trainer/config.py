"""Training settings: model names, presets, and the merging of defaults, settings file and flags.

The presets `scenes` and `photos` were chosen by measurements (docs/measurements.md). The other two follow
published recipes (ClipCap, SmallCap, LLaVA-1.5, BLIP).
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.config import NO_MODEL
from pipeline.config.files import read_yaml, validate
from pipeline.config.sections import Section
from pipeline.errors import ConfigError
from pipeline.images.clip import CLIP_MODELS

Preset = Literal["auto", "scenes", "photos", "photos-large", "photos-lm"]
EncoderStates = Literal["all", "2x2"]
Precision = Literal["fp32", "tf32", "bf16"]
Mixture = Literal["synthetic", "human", "mixed"]

ENCODERS = {
    "vit": "google/vit-base-patch16-224-in21k",
    **CLIP_MODELS,
    "clip-large": "openai/clip-vit-large-patch14-336",
    "siglip2": "google/siglip2-base-patch16-256",
    "dinov2": "facebook/dinov2-base",
}
# This encoder has random weights, and is trained together with the decoder.
TINY_VIT = "tiny-vit"
# This decoder is a language model with random weights that reads the image as a prefix.
PREFIX = "prefix"
SCRATCH_DECODERS = ("scratch", PREFIX)
DECODERS = {"qwen3": "Qwen/Qwen3-0.6B-Base", "smollm2": "HuggingFaceTB/SmolLM2-135M"}

MANY_IMAGES = 20_000  # with fewer images, or without a GPU, `auto` does not choose a large decoder
# The preset `photos` trains for at least 10 epochs, and longer on fewer images: 10 epochs of 6,000 images.
MIN_EPOCHS, MIN_IMAGES_SEEN = 10, 60_000
MAX_EPOCHS, MAX_STAGE_FRAC = 1_000_000, 10.0
# These limits also apply to checkpoints from untrusted sources.
MAX_CAPTION_TOKENS = 8192
MAX_BEAMS, MAX_LENGTH_PENALTY = 64, 10.0
# A run has at most one evaluation per epoch, but this number is always allowed.
MIN_EVALUATIONS = 4

PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {},
    "photos": {
        "decoder_width": 256, "decoder_depth": 3, "decoder_heads": 4, "vocab_size": 2000,
        "batch_size": 16, "connector_lr": 1e-3, "decoder_lr": 1e-3, "lr_floor_frac": 0.02,
        "scst_frac": 0.4, "scst_lr": 2e-4, "evaluations": 12, "evaluate_images": 500, "patience": 4,
        "num_beams": 3, "text_weights": {"detailed": 0.3},
    },
    "photos-large": {
        "decoder_width": 512, "decoder_depth": 6, "decoder_heads": 8, "vocab_size": 8192,
        "batch_size": 64, "connector_lr": 5e-4, "decoder_lr": 5e-4, "lr_floor_frac": 0.02,
        "epochs": 20, "scst_frac": 0.1, "evaluations": 20, "evaluate_images": 5_000, "patience": 4,
        "num_beams": 3, "text_weights": {"detailed": 0.3},
    },
    "photos-lm": {
        "batch_size": 64, "gradient_accumulation_steps": 8, "align_frac": 0.33, "align_lr": 1e-3,
        "connector_lr": 2e-4, "lr_floor_frac": 0.02, "lora_rank": 32, "epochs": 3, "evaluations": 8,
        "evaluate_images": 1_000, "patience": 3, "num_beams": 3, "text_weights": {"detailed": 0.3},
    },
}  # fmt: skip


def choose_preset(*, is_drawn: bool, images: int, decoder: str, has_gpu: bool) -> Preset:
    """Return the default preset for the training images, the decoder and the machine."""
    if is_drawn:
        return "scenes"
    if decoder not in SCRATCH_DECODERS:
        return "photos-lm"
    return "photos-large" if has_gpu and images >= MANY_IMAGES else "photos"


class TrainConfig(Section):
    """Settings of a training run. Widths are in features and lengths in tokens.

    A learning rate of 0 freezes its part of the model. None means a default that depends on model and data.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    preset: Preset | None = None
    """Settings for a kind of data (see below). Without a settings file, the command chooses one (`auto`)."""
    init: str | None = None
    """Captioner whose training continues: a folder or a Hub id. Null starts from an encoder and a decoder."""
    encoder: str = TINY_VIT
    """`vit`, `clip`, `clip-large`, `siglip2`, `dinov2`, `metaclip`, `tiny-clip`, `tiny-vit`, a folder or a
    Hub id. The command uses `clip`, or `tiny-clip` for drawn scenes if `clip` cannot be downloaded.
    """
    encoder_states: EncoderStates = "all"
    """States of the last layer: `all`, or `2x2` for averages of 2 x 2 patches."""
    feature_storage: Literal["bf16", "none"] = "bf16"
    """Storage of the hidden states of a frozen encoder: `bf16`, or `none` to compute them in each step."""
    decoder: str = "scratch"
    """`scratch`, `prefix`, `qwen3`, `smollm2`, a folder or a Hub id of a causal language model."""
    decoder_width: int = Field(default=192, ge=32)
    """Width of a decoder trained from scratch."""
    decoder_depth: int = Field(default=3, ge=1)
    """Number of blocks of a decoder trained from scratch."""
    decoder_heads: int = Field(default=6, ge=1)
    """Number of attention heads of a decoder trained from scratch."""
    vocab_size: int = Field(default=4096, ge=300)
    """Maximum size of the vocabulary of a decoder trained from scratch."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of a decoder trained from scratch."""
    text_source: Mixture = "synthetic"
    """Captions to learn: `synthetic`, `human` or `mixed`. The command uses all captions of the version."""
    text_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of tokens in the loss by style, by source (`human` or `synthetic`), or for answers (`answer`).
    The weights of a text's style and source are multiplied. Names that are not set keep the weight of the
    preset, or 1. Texts of weight 0 are not learned, for example answers with `{answer: 0}`.
    """
    max_caption_tokens: int | None = Field(default=None, ge=4, le=MAX_CAPTION_TOKENS)
    """Maximum tokens of a text. Longer texts are cut after a sentence. Null uses the smallest multiple
    of 16 that is enough for 99 % of the texts of each style, at most 256.
    """
    align_frac: float = Field(default=0.0, ge=0, le=MAX_STAGE_FRAC)
    """Additional steps at the start that train only the connector, as a multiple of `steps` (at most 10)."""
    align_lr: float = Field(default=1e-3, gt=0)
    """Learning rate while only the connector is trained."""
    connector_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the connector. 0 freezes it. Null uses 0.001, or 0.0002 with a pretrained decoder."""
    decoder_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the decoder. 0 freezes it. Null uses 0.001, or with a pretrained decoder 0.00002
    (0.0002 for adapters).
    """
    encoder_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the encoder. 0 freezes it. Null uses 0, or 0.001 for `tiny-vit`."""
    epochs: int = Field(default=16, ge=1, le=MAX_EPOCHS)
    """Epochs. Not used if `steps` is set. The command uses 60,000 / images with the preset `photos`, and at
    least 10.
    """
    steps: int = Field(default=0, ge=0)
    """Optimizer steps, without those of `align_frac` and `scst_frac`. 0 uses `epochs`."""
    scst_frac: float = Field(default=0.0, ge=0, le=MAX_STAGE_FRAC)
    """Additional last steps, as a multiple of `steps` (at most 10). They maximize the CIDEr-D of sampled
    captions (self-critical training).
    """
    scst_lr: float = Field(default=5e-5, gt=0)
    """Learning rate of self-critical training."""
    scst_samples: int = Field(default=5, ge=2)
    """Captions per image that self-critical training samples."""
    batch_size: int = Field(default=32, ge=1)
    """Images per step."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per step and process. More micro-batches need less memory. Can change with `--resume`."""
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    lr_floor_frac: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate, as a share of the highest one."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Maximum norm of the gradient."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy loss."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of LoRA adapters for a language model. 0 trains all its weights."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout of the adapters."""
    precision: Precision = "fp32"
    """Precision of matrix products: `fp32`, `tf32` (GPU only) or `bf16`. Presets use `bf16` where the GPU or
    the CPU has instructions for it, except for scenes. Otherwise, they use `tf32` on a GPU.
    """
    evaluations: int = Field(default=4, ge=1)
    """Maximum evaluations on the validation split, at equal intervals. A run has at most one evaluation per
    epoch, or four if it has fewer epochs. Each stage also ends with an evaluation.
    """
    patience: int = Field(default=0, ge=0)
    """Evaluations without a better score after which the learning rate falls to its floor and the stage ends.
    0 never ends a stage early.
    """
    evaluate_images: int = Field(default=128, ge=1)
    """Images per evaluation on the validation split."""
    num_beams: int = Field(default=1, ge=1, le=MAX_BEAMS)
    """Number of beams in the final test, and the default of the trained captioner. 1 is greedy."""
    length_penalty: float = Field(default=1.0, ge=0, le=MAX_LENGTH_PENALTY)
    """Exponent of the length by which beam search divides the log-probability of a text."""
    min_new_tokens: int = Field(default=0, ge=0, le=MAX_CAPTION_TOKENS)
    """Minimum tokens of a generated text."""
    no_repeat_ngram_size: int = Field(default=0, ge=0, le=MAX_CAPTION_TOKENS)
    """Size of the n-grams that may occur only once in a generated text. 0 allows repetition."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Seed of weights, dropout and the order of the data."""

    @model_validator(mode="after")
    def _require_valid_decoder(self) -> "TrainConfig":
        if self.is_scratch and self.lora_rank:
            raise ValueError("lora_rank needs a pretrained language model, such as --decoder qwen3")
        if self.is_scratch and self.decoder_width % (2 * self.decoder_heads):
            heads = f"{self.decoder_heads} heads of even width"
            raise ValueError(f"decoder_width {self.decoder_width} must divide into {heads}")
        return self

    @property
    def stage_steps(self) -> dict[str, int]:
        """The number of steps in each stage."""
        shares = {"align": self.align_frac, "train": 1.0, "scst": self.scst_frac}
        return {stage: round(share * self.steps) for stage, share in shares.items()}

    @property
    def total_steps(self) -> int:
        """The number of steps in all stages."""
        return sum(self.stage_steps.values())

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder is frozen. By default, all encoders except tiny-vit are frozen."""
        return self.encoder != TINY_VIT if self.encoder_lr is None else self.encoder_lr == 0

    @property
    def is_scratch(self) -> bool:
        """Whether the decoder is trained from scratch."""
        return self.decoder in SCRATCH_DECODERS

    def text_weight(self, source: str, style: str) -> float:
        """Return the weight of a text's tokens in the loss. The style of answers is ""."""
        return self.text_weights.get(source, 1.0) * self.text_weights.get(style or "answer", 1.0)

    def digest_values(self) -> dict[str, Any]:
        """Return the settings that a resumed run must keep."""
        return self.model_dump(mode="json", exclude={"preset", "init", "gradient_accumulation_steps"})

    def with_defaults(self, images: int) -> "TrainConfig":
        """Return a copy with derived values filled in for this number of training images."""
        rates = {"connector_lr": 1e-3, "decoder_lr": 1e-3}
        if not self.is_scratch:
            rates = {"connector_lr": 2e-4, "decoder_lr": 2e-4 if self.lora_rank else 2e-5}
        rates["encoder_lr"] = 0.0 if self.is_frozen else 1e-3
        derived = {name: rate for name, rate in rates.items() if getattr(self, name) is None}
        steps = self.steps or math.ceil(self.epochs * images / min(self.batch_size, images))
        return self.model_copy(update=derived | {"steps": steps})


def resolve(config_file: Path | None = None, **flags: Any) -> TrainConfig:
    """Merge defaults, preset, settings file and flags. Later ones take precedence.

    A flag that is None or "auto" is not set. Raises ConfigError for an invalid key or value, or if a flag
    names an unknown encoder or decoder.
    """

    def is_set(name: str, value: Any) -> bool:
        return value != "auto" or name == "preset"

    given = read_yaml(config_file, "for an example, see train.json of a checkpoint") if config_file else {}
    values = {name: value for name, value in given.items() if is_set(name, value)}
    flags = {name: value for name, value in flags.items() if value is not None and is_set(name, value)}
    # A captioner whose training continues may contain other models.
    if not (values | flags).get("init"):
        _require_known_models(flags)
    preset, decoder = ({**values, **flags}.get(name) for name in ("preset", "decoder"))
    if values.get("preset", "auto") not in ("auto", preset):
        hint = "leave out --preset, or remove the preset from the file"
        problem = f"{config_file} has the preset {values['preset']}, but --preset is {preset}"
        raise ConfigError(problem, hint=hint)
    if isinstance(preset, str):
        needs_lm = {"photos": False, "photos-large": False, "photos-lm": True}.get(preset)
        if needs_lm is not None and needs_lm == ((decoder or "scratch") in SCRATCH_DECODERS):
            problem = f"the preset {preset} does not fit the decoder {decoder or 'scratch'}"
            raise ConfigError(problem, hint="choose another --preset or --decoder")
        defaults = PRESETS.get(preset, {})
        for given in (values, flags):
            if isinstance(weights := given.get("text_weights"), dict):
                given["text_weights"] = defaults.get("text_weights", {}) | weights
        values = defaults | values
    if "epochs" in flags:
        values.pop("steps", None)
    return validate(TrainConfig, values | flags)


def _require_known_models(flags: dict[str, Any]) -> None:
    """Raise ConfigError if the encoder or the decoder in the flags is unknown."""
    for kind, names in (("encoder", (*ENCODERS, TINY_VIT)), ("decoder", (*SCRATCH_DECODERS, *DECODERS))):
        name = str(flags.get(kind, names[0]))
        if name in names or "/" in name or Path(name).exists():
            continue
        hint = f"pass {', '.join(names)}, a folder, or ORG/NAME on the Hub"
        raise ConfigError(f"no {kind} {name}", unknown=name, known=names, hint=hint)


def keeps_human_texts(manifest: dict[str, Any]) -> bool:
    """Return whether the caption and question columns of a version contain human texts."""
    return any(manifest["measured"].get(name) for name in ("human_captions", "human_questions"))


def default_texts(manifest: dict[str, Any]) -> Mixture:
    """Return whether the caption columns of a version hold synthetic, human or mixed texts."""
    if not keeps_human_texts(manifest):
        return "synthetic"
    return "human" if manifest["model"]["name"] == NO_MODEL else "mixed"
