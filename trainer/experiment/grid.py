"""Read an experiment file and expand its grid into cells, one training run each.

The grid combines all data entries with all encoders, decoders, alignments, image counts and seeds.
`also` adds grids that replace some of these lists.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.files import read_yaml, validate
from pipeline.config.sections import Section
from pipeline.dataset.version import slugify
from pipeline.digests import digest
from trainer.config import Mixture, TrainConfig, resolve

Alignment = Literal["none", "connector", "contrast"]
# The share of steps, at the beginning of a run, that train only the connector.
ALIGN_FRAC = 0.25
CONTRASTIVE_WEIGHT = 0.1
# With fewer steps, ALIGN_FRAC of them is less than one step.
MIN_STEPS = 4
FACTORS = ("data", "encoder", "decoder", "alignment", "train_images")
# Settings that select examples. They must be equal in all cells, because all learn from the same images.
SHARED_SETTINGS = ("styles", "questions")
GRID_SETTINGS = {
    "encoder", "decoder", "text_source", "source_in_prompt", "train_images", "caption_word_budget",
    "align_steps", "align_epochs", "contrastive_weight", "seed",
}  # fmt: skip
NotEmpty = Field(min_length=1)


class Data(Section):
    """A data entry: a version and the texts to learn from. `data` has the syntax of `synth train DATASET`."""

    data: str | None = None
    images: str | None = None
    text_source: Mixture = "synthetic"
    source_in_prompt: bool = True


class Grid(Section):
    """Lists whose product gives the cells. In `train_images`, 0 means all. `settings` is for TrainConfig."""

    encoder: Annotated[tuple[str, ...], NotEmpty] = ("clip",)
    decoder: Annotated[tuple[str, ...], NotEmpty] = ("scratch",)
    alignment: Annotated[tuple[Alignment, ...], NotEmpty] = ("none",)
    train_images: Annotated[tuple[Annotated[int, Field(ge=0)], ...], NotEmpty] = (0,)
    seeds: Annotated[tuple[int, ...], NotEmpty] = (0, 1, 2)
    settings: dict[str, Any] = Field(default_factory=dict)


class ExtraGrid(Grid):
    """An additional grid. Its lists and settings override those of the first grid.

    Its arms are compared with arms of the first grid only if their settings are equal.
    """

    data: Annotated[tuple[str, ...], NotEmpty] | None = None


class Experiment(Grid):
    """Content of an experiment file. `match_words` limits captions to the word count of the smallest data."""

    data: Annotated[dict[str, Data], NotEmpty]
    match_words: bool = True
    also: tuple[ExtraGrid, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        for extra in (None, *self.also):
            _check_settings(self.settings | (extra.settings if extra else {}))
            if extra and (clash := sorted(extra.settings.keys() & set(SHARED_SETTINGS))):
                raise ValueError(f"settings.{clash[0]} must be set in the first grid, not in `also`")
            if extra and (unknown := sorted(set(extra.data or ()) - set(self.data))):
                raise ValueError(f"`also` names unknown data: {unknown[0]}")
        for factor in ("encoder", "decoder"):
            grids = [self, *(extra for extra in self.also if factor in extra.model_fields_set)]
            names = {name for grid in grids for name in getattr(grid, factor)}
            if "auto" in names:
                raise ValueError(f"list each {factor} by name: auto is not supported in an experiment")
            if len({Path(name).name for name in names}) < len(names):
                raise ValueError(f"two {factor}s have the same last part of their name: rename a folder")
        return self


def _check_settings(settings: dict[str, Any]) -> None:
    steps = settings.get("steps")
    if not isinstance(steps, int) or steps < MIN_STEPS:
        raise ValueError(f"settings.steps must be the number of steps of each cell, at least {MIN_STEPS}")
    if clash := sorted(settings.keys() & GRID_SETTINGS):
        raise ValueError(f"remove settings.{clash[0]}: the grid sets it")
    if settings.get("preset") == "auto":
        raise ValueError("set a preset by name: auto is not supported in an experiment")


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run. `otherwise` describes the settings that differ from the first grid."""

    data: str
    encoder: str
    decoder: str
    alignment: Alignment
    train_images: int
    seed: int
    config: TrainConfig
    otherwise: str = ""

    @property
    def arm(self) -> tuple[str, ...]:
        """The key that cells with different seeds share: the values of FACTORS, and `otherwise`."""
        return (*(str(getattr(self, name)) for name in FACTORS), self.otherwise)

    def folder(self, *identity: Any) -> str:
        """Return a folder name that is unique to the settings and to the data (`identity`)."""
        models = f"{Path(self.encoder).name}-{Path(self.decoder).name}"
        images = self.train_images or "all"
        name = slugify(f"{self.data}-{models}-{self.alignment}-{images}-s{self.seed}")
        return f"{name}-{digest([self.config.digest_values(), *identity])[:8]}"


def read_experiment(path: Path) -> Experiment:
    """Read an experiment from a YAML file. Raises ConfigError if the file or one of its cells is invalid."""
    experiment = validate(Experiment, read_yaml(path, "docs/experiment.yaml"), where=f"{path}: ")
    cells_of(experiment)
    return experiment


def cells_of(experiment: Experiment) -> list[Cell]:
    """Return the distinct cells in file order. Raises ConfigError if the settings of a cell are invalid."""
    first = experiment.model_dump(include=set(Grid.model_fields)) | {"data": tuple(experiment.data)}
    grids = [(first, "")]
    for extra in experiment.also:
        replaced = extra.model_dump(exclude={"settings"}, exclude_unset=True, exclude_none=True)
        settings = experiment.settings | extra.settings
        changed = [name for name in sorted(settings) if settings[name] != experiment.settings.get(name)]
        overrides = ", ".join(f"{name} {settings[name]}" for name in changed)
        grids.append((first | replaced | {"settings": settings}, overrides))
    cells: dict[tuple[Any, ...], Cell] = {}
    for grid, overrides in grids:
        lists = (grid[name] for name in (*FACTORS, "seeds"))
        for data, encoder, decoder, alignment, images, seed in itertools.product(*lists):
            factors = (encoder, decoder, alignment, images, seed)
            config = _cell_config(experiment.data[data], *factors, grid["settings"])
            # Settings in `also` may equal the defaults, so cells may repeat.
            cells.setdefault((data, digest(config.digest_values())), Cell(data, *factors, config, overrides))
    return list(cells.values())


def _cell_config(
    data: Data,
    encoder: str,
    decoder: str,
    alignment: Alignment,
    images: int,
    seed: int,
    settings: dict[str, Any],
) -> TrainConfig:
    """Return the settings of a cell. All cells of a grid have the same total number of steps."""
    align_steps = round(ALIGN_FRAC * settings["steps"]) if alignment != "none" else 0
    models = {"encoder": encoder, "decoder": decoder, "seed": seed}
    texts = {"text_source": data.text_source, "source_in_prompt": data.source_in_prompt}
    steps = {"steps": settings["steps"] - align_steps, "align_steps": align_steps, "align_epochs": 0.0}
    weight = CONTRASTIVE_WEIGHT if alignment == "contrast" else 0.0
    values = {**settings, **models, **texts, **steps, "train_images": images}
    return resolve(None, **values, contrastive_weight=weight)
