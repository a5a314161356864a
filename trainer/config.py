"""Settings of a training, saved with each checkpoint: names of models, presets, and how defaults, file and options merge.

Presets are starting points after public recipes (ClipCap, SmallCap, LLaVA-1.5, BLIP), not tuned on many photographs:
docs/measurements.md reports the measurements.
"""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.config import NO_MODEL
from pipeline.config.files import read_yaml, validate
from pipeline.config.sections import Section
from pipeline.errors import ConfigError
from pipeline.images.clip import CLIP_MODELS

Preset = Literal["auto", "scenes", "photos-few", "photos", "photos-lm"]  # auto: `choose_preset`, by the command
EncoderStates = Literal["all", "2x2"]  # that a decoder reads: trainer/model/encoder.py
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


MAX_CAPTION_TOKENS = 8192  # a checkpoint of a stranger could ask for captions without an end
MAX_EPOCHS = 1_000_000
EVALUATIONS = 20  # while training, at most
Mixture = Literal["synthetic", "human", "mixed"]  # whose texts to learn
# Settings whose default depends on the data, the encoder or the decoder; see `with_defaults`.
DERIVED_KEYS = ("steps", "evaluate_every", "connector_lr", "decoder_lr", "encoder_lr")


class TrainConfig(Section):
    """Settings of one training run. Widths are features, lengths are tokens, fractions are between 0 and 1.

    A learning rate of 0 freezes that part of the model. None stands for a default that depends on encoder and decoder.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    preset: Preset | None = None  # whose values stand where nothing else is said: trainer/config.py
    encoder: str = TINY_VIT
    encoder_layer: int = -1  # whose hidden states are used: -1 the last, -2 the one before
    encoder_states: EncoderStates = "all"  # of the layer: all, or patches averaged 2x2
    feature_storage: FeatureStorage = "bf16"  # of the states of a frozen encoder on the disk
    decoder: str = "scratch"
    decoder_width: int = Field(default=192, ge=32)
    decoder_depth: int = Field(default=3, ge=1)
    decoder_heads: int = Field(default=6, ge=1)
    vocab_size: int = Field(default=4096, ge=300)  # an upper bound: small data has fewer tokens
    dropout: float = Field(default=0.1, ge=0, lt=1)
    text_source: Mixture = "synthetic"
    styles: tuple[str, ...] = ()  # caption styles to learn; empty: all
    source_in_prompt: bool = True  # whether prompts name the source: human or synthetic
    questions: bool = True  # whether to learn answers to questions
    train_images: int = Field(default=0, ge=0)  # limit on training images; 0: all
    caption_word_budget: int = Field(default=0, ge=0)  # limit on the words of all training captions; 0: none
    max_caption_tokens: int = Field(default=64, ge=4, le=MAX_CAPTION_TOKENS)
    align_steps: int = Field(default=0, ge=0)  # first stage, which trains only the connector; 0: derived from `align_epochs`
    align_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)
    align_lr: float = Field(default=1e-3, gt=0)
    contrastive_weight: float = Field(default=0.0, ge=0)  # of the loss that aligns pooled images and captions
    contrast_width: int = Field(default=128, ge=8)
    connector_lr: float | None = Field(default=None, ge=0)
    decoder_lr: float | None = Field(default=None, ge=0)
    encoder_lr: float | None = Field(default=None, ge=0)
    epochs: int = Field(default=16, ge=1, le=MAX_EPOCHS)
    steps: int = Field(default=0, ge=0)  # after the first stage; 0: derived from `epochs`
    min_steps: int = Field(default=0, ge=0)  # where `epochs` of few images are fewer
    scst_steps: int = Field(default=0, ge=0)  # of a last stage, which rewards drawn captions: trainer/self_critical.py
    scst_lr: float = Field(default=5e-5, gt=0)
    scst_samples: int = Field(default=5, ge=2)  # captions of an image that are drawn
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)  # micro-batches in a step; more on a GPU where they do not fit
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    lr_floor_frac: float = Field(default=0.1, ge=0, le=1)  # of a learning rate that is left at the end of a stage
    weight_decay: float = Field(default=0.05, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # of the targets while training
    average_decay: float = Field(default=0.0, ge=0, lt=1)  # of the moving average of weights that is scored and saved; 0: none
    lora_rank: int = Field(default=0, ge=0)  # of the matrices that a language model learns beside its own (LoRA); 0: all of it
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    checkpoint_blocks: bool = False  # compute the blocks of a language model twice instead of keeping their states
    precision: Precision = "fp32"  # of products of matrices; weights are float32 in each
    compile: bool = False
    evaluate_every: int = Field(default=0, ge=0)  # steps; 0: derived from `evaluate_epochs`
    evaluate_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)  # 0: four times in all; else at most EVALUATIONS
    patience: int = Field(default=0, ge=0)  # evaluations in a row without a better score after which training ends; 0: never
    evaluate_images: int = Field(default=128, ge=1)  # of the validation split, while training
    num_beams: int = Field(default=1, ge=1)  # for the final test
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)

    @model_validator(mode="after")
    def _adapts_a_language_model(self) -> "TrainConfig":
        if self.is_scratch and (self.lora_rank or self.checkpoint_blocks):
            name = "lora_rank" if self.lora_rank else "checkpoint_blocks"
            raise ValueError(f"{name} is of a pretrained language model: choose one, as --decoder qwen3")
        return self

    @model_validator(mode="after")
    def _divides_into_heads(self) -> "TrainConfig":
        if self.is_scratch and self.decoder_width % (2 * self.decoder_heads):
            raise ValueError(f"decoder_width {self.decoder_width} must divide into {self.decoder_heads} heads of an even width")
        return self

    @property
    def first_rewarded_step(self) -> int:
        """The number of steps before the stage of rewards, if there is one."""
        return self.align_steps + self.steps

    @property
    def total_steps(self) -> int:
        """The steps of all stages, once they are derived."""
        return self.align_steps + self.steps + self.scst_steps

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder does not learn; unless a rate is given, tiny-vit alone does."""
        return self.encoder != TINY_VIT if self.encoder_lr is None else self.encoder_lr == 0

    @property
    def is_scratch(self) -> bool:
        """Whether the decoder is trained from scratch."""
        return self.decoder in SCRATCH_DECODERS

    def digest_values(self) -> dict[str, Any]:
        """Return the settings that decide a result: all but the preset, whose values are among them."""
        return self.model_dump(mode="json", exclude={"preset"})

    def with_defaults(self, images: int) -> "TrainConfig":
        """Return the settings with all defaults filled in, for training on this number of images."""
        batch_size = min(self.batch_size, images)
        steps = self.steps or max(self.min_steps, -(-self.epochs * images // batch_size))
        align_steps = self.align_steps or math.ceil(self.align_epochs * images / batch_size)
        rates = {"connector_lr": 1e-3, "decoder_lr": 1e-3} if self.is_scratch else {"connector_lr": 2e-4, "decoder_lr": 2e-5}
        if self.lora_rank:
            rates["decoder_lr"] = 2e-4
        rates["encoder_lr"] = 0.0 if self.is_frozen else 1e-3
        defaults = {name: rate for name, rate in rates.items() if getattr(self, name) is None}
        interval = math.ceil(self.evaluate_epochs * images / batch_size)
        times = EVALUATIONS if interval else 4
        interval = self.evaluate_every or max(interval, -(-(steps + align_steps + self.scst_steps) // times))
        defaults |= {"evaluate_every": interval}
        return self.model_copy(update={"steps": steps, "align_steps": align_steps, **defaults})


def resolve(config_file: Path | None = None, **flags: Any) -> TrainConfig:
    """Merge defaults, those of a preset, config file and flags (`auto` and None: the default).

    Raises ConfigError for an invalid key or value.
    """
    given = read_yaml(config_file, "train.json of a checkpoint") if config_file else {}
    values = {name: value for name, value in given.items() if _says_something(name, value)}
    flags = {name: value for name, value in flags.items() if value is not None and _says_something(name, value)}
    stale = _derived_for_others(values, flags)
    values = {name: value for name, value in values.items() if name not in stale}
    decoder = flags.get("decoder", values.get("decoder", "scratch"))
    if values.get("preset", "auto") not in ("auto", flags.get("preset", values.get("preset"))):
        hint = "leave --preset out, or begin with a file that has no preset"
        raise ConfigError(f"{config_file} has the preset {values['preset']}, and the command another", hint=hint)
    preset = flags.get("preset", values.get("preset"))
    if isinstance(preset, str):
        if preset in DECODER_KINDS and (decoder in SCRATCH_DECODERS) != (DECODER_KINDS[preset] == "scratch"):
            hint = "name another --preset, or another --decoder"
            raise ConfigError(f"the preset {preset} is for {DECODER_KINDS[preset]}, and the decoder is {decoder}", hint=hint)
        of_preset = dict(PRESETS.get(preset, {}))
        for name, instead in (("epochs", "min_steps"), ("align_steps", "align_epochs")):
            if name in values and instead not in values:  # what a file says is not undone by the preset
                of_preset.pop(instead, None)
        values = {**of_preset, **values}
    if "epochs" in flags:  # and no number of steps of a preset, or of a training that is over
        values = {name: value for name, value in values.items() if name not in ("steps", "min_steps")}
    if "align_steps" in flags:
        values.pop("align_epochs", None)
    values |= flags
    return validate(TrainConfig, values)


def _derived_for_others(values: dict[str, Any], flags: dict[str, Any]) -> set[str]:
    """Return which settings of a file were derived for another encoder, decoder or length than flags name.

    The train.json of a checkpoint holds them beside those that were given; a file by hand holds few of them, which stay.
    """
    if not {*DERIVED_KEYS} <= values.keys():
        return set()
    changed = {name for name, value in flags.items() if name in values and values[name] != value}
    stale = {"encoder_lr"} if "encoder" in changed else set[str]()
    if changed & {"decoder", "lora_rank"}:
        stale |= {"decoder_lr", "connector_lr"}
    if changed & {"epochs", "steps", "batch_size"}:
        stale |= {"evaluate_every"}
    return stale


def _says_something(name: str, value: Any) -> bool:
    return value != "auto" or name == "preset"  # which the command chooses


def keeps_human_texts(manifest: dict[str, Any]) -> bool:
    """Return True if a version holds texts that people wrote as captions and questions, and not as references alone."""
    return any(manifest["measured"].get(name) for name in ("human_captions", "human_questions"))


def usual_texts(manifest: dict[str, Any]) -> Mixture:
    """Return whose texts a version holds as captions: those of a model, of people whose texts were kept, or of both."""
    if not keeps_human_texts(manifest):
        return "synthetic"
    return "human" if manifest["model"]["name"] == NO_MODEL else "mixed"
