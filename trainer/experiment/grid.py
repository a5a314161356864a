"""Read an experiment file and expand its grid into cells, one training run each.

The grid combines all data entries with all encoders, decoders, image counts and seeds.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.files import read_yaml, validate
from pipeline.config.sections import Section
from pipeline.dataset.version import slugify
from pipeline.digests import digest
from trainer.config import Mixture, TrainConfig, resolve

FACTORS = ("data", "encoder", "decoder", "train_images")
GRID_SETTINGS = {
    "encoder", "decoder", "text_source", "source_in_prompt", "train_images", "caption_word_budget",
    "seed",
}  # fmt: skip
NotEmpty = Field(min_length=1)


class Data(Section):
    """A data entry: a version and the texts to learn from. `data` has the syntax of `synth train --data`."""

    data: str | None = None
    images: str | None = None
    text_source: Mixture = "synthetic"
    source_in_prompt: bool = True


class Experiment(Section):
    """Content of an experiment file.

    The product of the lists gives the cells. In `train_images`, 0 means all. `settings` is for TrainConfig.
    `match_words` limits captions to the word count of the smallest data.
    """

    data: Annotated[dict[str, Data], NotEmpty]
    encoder: Annotated[tuple[str, ...], NotEmpty] = ("clip",)
    decoder: Annotated[tuple[str, ...], NotEmpty] = ("scratch",)
    train_images: Annotated[tuple[Annotated[int, Field(ge=0)], ...], NotEmpty] = (0,)
    seeds: Annotated[tuple[int, ...], NotEmpty] = (0, 1, 2)
    settings: dict[str, Any] = Field(default_factory=dict)
    match_words: bool = True

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        steps = self.settings.get("steps")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError("settings.steps must be the number of steps of each cell")
        if clash := sorted(self.settings.keys() & GRID_SETTINGS):
            raise ValueError(f"remove settings.{clash[0]}: the grid sets it")
        if self.settings.get("preset") == "auto":
            raise ValueError("set a preset by name: auto is not supported in an experiment")
        for factor in ("encoder", "decoder"):
            names = {*getattr(self, factor)}
            if "auto" in names:
                raise ValueError(f"list each {factor} by name: auto is not supported in an experiment")
            if len({Path(name).name for name in names}) < len(names):
                raise ValueError(f"two {factor}s have the same last part of their name: rename a folder")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run."""

    data: str
    encoder: str
    decoder: str
    train_images: int
    seed: int
    config: TrainConfig

    @property
    def arm(self) -> tuple[str, ...]:
        """The key that cells with different seeds share: the values of FACTORS."""
        return tuple(str(getattr(self, name)) for name in FACTORS)

    def folder(self, *identity: Any) -> str:
        """Return a folder name that is unique to the settings and to the data (`identity`)."""
        models = f"{Path(self.encoder).name}-{Path(self.decoder).name}"
        name = slugify(f"{self.data}-{models}-{self.train_images or 'all'}-s{self.seed}")
        return f"{name}-{digest([self.config.digest_values(), *identity])[:8]}"


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from a YAML file. Raises ConfigError if the file or one of its cells is invalid."""
    experiment = validate(Experiment, read_yaml(path, "docs/experiment.yaml"), where=f"{path}: ")
    cells_of(experiment)
    return experiment


def cells_of(experiment: Experiment) -> list[Cell]:
    """Return the cells in file order. Raises ConfigError if the settings of a cell are invalid."""
    cells: dict[tuple[Any, ...], Cell] = {}
    lists = (getattr(experiment, name) for name in (*FACTORS, "seeds"))
    for data, encoder, decoder, images, seed in itertools.product(*lists):
        learned = experiment.data[data]
        texts = {"text_source": learned.text_source, "source_in_prompt": learned.source_in_prompt}
        values = {"encoder": encoder, "decoder": decoder, "train_images": images, "seed": seed, **texts}
        factors = (data, encoder, decoder, images, seed)
        cells.setdefault(factors, Cell(*factors, resolve(None, **experiment.settings, **values)))
    return list(cells.values())
