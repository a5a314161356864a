"""How a captioner is trained: every number in one place, saved with each checkpoint."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError


class TrainConfig(BaseModel):
    """Settings of one training run. Widths are features, lengths are tokens, shares are between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: Literal["tiny-vit"] = "tiny-vit"
    decoder: Literal["scratch"] = "scratch"
    decoder_width: int = Field(default=192, ge=32)
    decoder_depth: int = Field(default=3, ge=1)
    decoder_heads: int = Field(default=6, ge=1)
    vocab_size: int = Field(default=4096, ge=300)  # an upper bound: small data has fewer words
    max_caption_tokens: int = Field(default=64, ge=4)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    epochs: int = Field(default=16, ge=1)
    steps: int = Field(default=0, ge=0)  # 0: as many as the epochs take
    batch_images: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_frac: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    evaluate_every: int = Field(default=0, ge=0)  # steps; 0: four times in all
    evaluate_images: int = Field(default=128, ge=1)  # of the validation split, while training
    seed: int = 0

    def for_images(self, count: int) -> "TrainConfig":
        """Return the same settings with the steps that training on `count` images takes."""
        steps = self.steps or -(-self.epochs * count // min(self.batch_images, count))
        return self.model_copy(update={"steps": steps, "evaluate_every": self.evaluate_every or -(-steps // 4)})


def resolve(**flags: Any) -> TrainConfig:
    """Return the settings with the flags that were given; `auto` and None stand for the default.

    Raises:
        ConfigError: a value is not one that we know.
    """
    try:
        return TrainConfig.model_validate({name: value for name, value in flags.items() if value not in (None, "auto")})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"bad value for {first['loc'][0]}: {first['msg']}", hint="see `synth train --help`") from None
