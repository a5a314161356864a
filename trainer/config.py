"""Settings of a training run, saved with each checkpoint."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import NO_MODEL, Section, read_yaml, validate
from pipeline.errors import TrainError
from pipeline.storage.files import read_json
from pipeline.storage.untrusted import UnsafeFileError

MAX_CAPTION_TOKENS = 8192  # a checkpoint of a stranger could ask for captions without an end
CAPTIONER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
Mixture = Literal["synthetic", "human", "mixed"]  # whose texts to learn
# Settings whose default depends on the data, the encoder or the decoder; see `with_defaults`.
DERIVED_KEYS = ("steps", "evaluate_every", "connector_lr", "decoder_lr", "encoder_lr")


class TrainConfig(Section):
    """Settings of one training run. Widths are features, lengths are tokens, fractions are between 0 and 1.

    A learning rate of 0 freezes that part of the model. None stands for a default that depends on encoder and decoder.
    """

    OLD_KEYS: ClassVar = {
        "layer": "encoder_layer", "texts": "text_source", "name_source": "source_in_prompt",
        "caption_words": "caption_word_budget", "align_rate": "align_lr", "contrast": "contrastive_weight",
        "connector_rate": "connector_lr", "decoder_rate": "decoder_lr", "encoder_rate": "encoder_lr",
        "batch_images": "batch_size", "accumulate": "gradient_accumulation_steps", "clip_norm": "max_grad_norm",
        "beams": "num_beams",
    }  # fmt: skip

    encoder: str = "tiny-vit"
    encoder_layer: int = -1  # whose hidden states are used: -1 the last, -2 the one before
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
    align_steps: int = Field(default=0, ge=0)  # first stage, which trains only the connector
    align_lr: float = Field(default=1e-3, gt=0)
    contrastive_weight: float = Field(default=0.0, ge=0)  # of the loss that aligns pooled images and captions
    contrast_width: int = Field(default=128, ge=8)
    connector_lr: float | None = Field(default=None, ge=0)
    decoder_lr: float | None = Field(default=None, ge=0)
    encoder_lr: float | None = Field(default=None, ge=0)
    epochs: int = Field(default=16, ge=1)
    steps: int = Field(default=0, ge=0)  # after the first stage; 0: derived from `epochs`
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)  # micro-batches in a step
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    evaluate_every: int = Field(default=0, ge=0)  # steps; 0: four times in all
    evaluate_images: int = Field(default=128, ge=1)  # of the validation split, while training
    num_beams: int = Field(default=1, ge=1)  # for the final test
    seed: int = 0

    @model_validator(mode="after")
    def _divides_into_heads(self) -> "TrainConfig":
        if self.decoder_width % (2 * self.decoder_heads):
            raise ValueError(f"decoder_width {self.decoder_width} must divide into {self.decoder_heads} heads of an even width")
        return self

    @property
    def is_scratch(self) -> bool:
        """Whether the decoder is trained from scratch."""
        return self.decoder == "scratch"

    def digest_values(self) -> dict[str, Any]:
        """Return all settings as digests take them: under their first names, so that runs of earlier releases can resume."""
        first_names = {name: old for old, name in self.OLD_KEYS.items()}
        return {first_names.get(name, name): value for name, value in self.model_dump(mode="json").items()}

    def with_defaults(self, images: int) -> "TrainConfig":
        """Return the settings with all defaults filled in, for training on this number of images."""
        steps = self.steps or -(-self.epochs * images // min(self.batch_size, images))
        rates = {"connector_lr": 1e-3, "decoder_lr": 1e-3} if self.is_scratch else {"connector_lr": 2e-4, "decoder_lr": 2e-5}
        rates["encoder_lr"] = 1e-3 if self.encoder == "tiny-vit" else 0.0
        defaults = {name: rate for name, rate in rates.items() if getattr(self, name) is None}
        interval = self.evaluate_every or -(-(steps + self.align_steps) // 4)
        return self.model_copy(update={"steps": steps, "evaluate_every": interval, **defaults})


def resolve(config_file: Path | None = None, **flags: Any) -> TrainConfig:
    """Merge defaults, config file and flags (`auto` and None: the default). Raises ConfigError for an invalid key or value."""
    values = read_yaml(config_file, "train.json of a checkpoint") if config_file else {}
    values |= {name: value for name, value in flags.items() if value not in (None, "auto")}
    return validate(TrainConfig, {name: value for name, value in values.items() if value != "auto"})


def no_captioner(folder: Path, reason: str = "") -> TrainError:
    """Return the error that a folder holds no captioner."""
    return TrainError(
        f"no captioner in {folder}{f': {reason}' if reason else ''}", hint="pass the folder that `synth train` printed"
    )


def require_checkpoint(folder: Path) -> None:
    """Raise TrainError if a folder lacks a file of a captioner. Nothing is loaded: the import of torch alone takes a second."""
    if missing := [name for name in CAPTIONER_FILES if not (folder / name).is_file()]:
        raise no_captioner(folder, f"it lacks {missing[0]}")


def has_other_settings(folder: Path, config: TrainConfig) -> bool:
    """Whether a checkpoint folder holds a finished captioner that was trained with other settings."""
    if not (folder / "metrics.json").exists():
        return False
    try:
        trained = TrainConfig.model_validate(read_json(folder / "train.json"))
    except (OSError, ValueError, UnsafeFileError):
        return True
    given = config.model_dump(exclude_unset=True)
    compared = {name: value for name, value in TrainConfig().model_dump().items() if name not in DERIVED_KEYS} | given
    return any(getattr(trained, name) != value for name, value in compared.items())


def keeps_human_texts(manifest: dict[str, Any]) -> bool:
    """Return True if a version holds texts that people wrote as captions and questions, and not as references alone."""
    return any(manifest["measured"].get(name) for name in ("human_captions", "human_questions"))


def usual_texts(manifest: dict[str, Any]) -> Mixture:
    """Return whose texts a version holds as captions: those of a model, of people whose texts were kept, or of both."""
    if not keeps_human_texts(manifest):
        return "synthetic"
    return "human" if manifest["model"]["name"] == NO_MODEL else "mixed"
