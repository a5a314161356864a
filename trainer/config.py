"""How a captioner is trained: every number in one place, saved with each checkpoint."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError, one_line

# What training decides where it is left open.
SETTLED = ("steps", "evaluate_every", "connector_rate", "decoder_rate", "encoder_rate")


class TrainConfig(BaseModel):
    """Settings of one training run. Widths are features, lengths are tokens, shares are between 0 and 1.

    A rate of 0 leaves that part of the model as it is. What is None depends on encoder and decoder; see `with_defaults`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str = "tiny-vit"
    layer: int = -1  # whose hidden states: -1 the last, -2 the one before
    decoder: str = "scratch"
    decoder_width: int = Field(default=192, ge=32)
    decoder_depth: int = Field(default=3, ge=1)
    decoder_heads: int = Field(default=6, ge=1)
    vocab_size: int = Field(default=4096, ge=300)  # an upper bound: small data has fewer words
    dropout: float = Field(default=0.1, ge=0, lt=1)
    texts: Literal["synthetic", "human", "mixed"] = "synthetic"
    styles: tuple[str, ...] = ()  # of captions to learn; none: all
    name_source: bool = True  # whether a prompt says whose words are wanted
    questions: bool = True  # learn to answer them
    train_images: int = Field(default=0, ge=0)  # that are learned from; 0: all
    caption_words: int = Field(default=0, ge=0)  # of all captions that are learned; 0: all
    max_caption_tokens: int = Field(default=64, ge=4)
    align_steps: int = Field(default=0, ge=0)  # of the first stage, in which only the connector learns
    align_rate: float = Field(default=1e-3, gt=0)
    contrast: float = Field(default=0.0, ge=0)  # weight of the term that aligns pooled images and captions
    contrast_width: int = Field(default=128, ge=8)
    connector_rate: float | None = Field(default=None, ge=0)
    decoder_rate: float | None = Field(default=None, ge=0)
    encoder_rate: float | None = Field(default=None, ge=0)
    epochs: int = Field(default=16, ge=1)
    steps: int = Field(default=0, ge=0)  # after the first stage; 0: as many as the epochs take
    batch_images: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)  # in how many parts the images of a step go through the model
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    evaluate_every: int = Field(default=0, ge=0)  # steps; 0: four times in all
    evaluate_images: int = Field(default=128, ge=1)  # of the validation split, while training
    beams: int = Field(default=1, ge=1)  # of the test, at the end
    seed: int = 0

    @model_validator(mode="after")
    def _divides_into_heads(self) -> "TrainConfig":
        if self.decoder_width % (2 * self.decoder_heads):
            raise ValueError(f"decoder_width {self.decoder_width} must divide into {self.decoder_heads} heads of an even width")
        return self

    @property
    def is_scratch(self) -> bool:
        """Whether the decoder begins from nothing."""
        return self.decoder == "scratch"

    def with_defaults(self, images: int) -> "TrainConfig":
        """Return the same settings with everything decided, for training on so many images."""
        steps = self.steps or -(-self.epochs * images // min(self.batch_images, images))
        from_nothing = self.encoder == "tiny-vit"
        rates = {
            "connector_rate": 1e-3 if self.is_scratch else 2e-4,
            "decoder_rate": 1e-3 if self.is_scratch else 2e-5,
            "encoder_rate": 1e-3 if from_nothing else 0.0,
        }
        decided = {name: rate for name, rate in rates.items() if getattr(self, name) is None}
        every = self.evaluate_every or -(-(steps + self.align_steps) // 4)
        return self.model_copy(update={"steps": steps, "evaluate_every": every, **decided})


def resolve(config_file: Path | None = None, **flags: Any) -> TrainConfig:
    """Return the defaults, changed by the file and by the flags that were given; `auto` and None stand for the default.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is not one that we know.
    """
    values = _read(config_file) if config_file else {}
    values |= {name: value for name, value in flags.items() if value not in (None, "auto")}
    values = {name: value for name, value in values.items() if value != "auto"}
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(TrainConfig.model_fields)
        where = f" for {first['loc'][0]}" if first["loc"] else ""
        raise ConfigError(f"bad value{where}: {first['msg']}", hint=f"known keys: {known}") from None


def is_of_other_settings(folder: Path, config: TrainConfig) -> bool:
    """Whether a checkpoint folder holds a finished captioner that was not trained as `config` says."""
    if not (folder / "metrics.json").exists():
        return False
    try:
        before = TrainConfig.model_validate_json((folder / "train.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    decided = config.model_dump(exclude_unset=True)
    left = TrainConfig().model_dump()
    return any(
        getattr(before, name) != decided.get(name, left[name]) for name in left if name in decided or name not in SETTLED
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = one_line(error, 1000)
        hint = "pass a YAML file, such as train.json of a checkpoint"
        raise ConfigError(f"cannot read config file {path}: {said}", hint=hint) from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold keys and values", hint="for example: decoder_depth: 4")
    return values
