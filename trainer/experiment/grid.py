"""Read an experiment file and expand its grid into cells, one training run each.

The grid combines every kind of data with every encoder, decoder, alignment, number of images and seed. `also` adds smaller
grids that replace some of these lists.
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
from pipeline.errors import did_you_mean
from trainer.config import Mixture, TrainConfig, resolve

Alignment = Literal["none", "connector", "contrast"]
ALIGN_SHARE = 0.25  # fraction of all steps that align the connector first
CONTRAST = 0.1
MIN_STEPS = 4  # so that ALIGN_SHARE of them is at least one
FACTORS = ("data", "encoder", "decoder", "alignment", "train_images")  # by which arms differ
SHARED_SETTINGS = ("styles", "questions")  # they select the examples of a version: grids of `also` cannot change them
GRID_SETTINGS = (
    "encoder", "decoder", "text_source", "source_in_prompt", "train_images", "caption_word_budget", "align_steps",
    "align_epochs", "contrastive_weight", "seed",
)  # fmt: skip


class Data(Section):
    """A version and the choice of its texts to learn from."""

    data: str | None = None  # as in `synth train --data`; None: the latest dataset
    images: str | None = None
    text_source: Mixture = "synthetic"
    source_in_prompt: bool = True


class Grid(Section):
    """Lists whose product gives the cells."""

    encoder: Annotated[tuple[str, ...], Field(min_length=1)] = ("clip",)
    decoder: Annotated[tuple[str, ...], Field(min_length=1)] = ("scratch",)
    alignment: Annotated[tuple[Alignment, ...], Field(min_length=1)] = ("none",)
    train_images: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)  # 0: all
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    settings: dict[str, Any] = Field(default_factory=dict)  # of trainer/config.py, for all cells


class ExtraGrid(Grid):
    """An additional grid: a list that is named replaces that of the first grid; settings are merged.

    Its arms are compared with each other, and with those of the first grid only if the settings are equal.
    """

    data: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # names


class Experiment(Grid):
    """An experiment file."""

    data: Annotated[dict[str, Data], Field(min_length=1)]
    match_words: bool = True  # whether captions are cut to the word count of the smallest data
    also: tuple[ExtraGrid, ...] = ()

    @model_validator(mode="after")
    def _is_one_budget(self) -> "Experiment":
        for settings in (self.settings, *({**self.settings, **more.settings} for more in self.also)):
            known = list(TrainConfig.model_fields)
            if unknown := sorted(settings.keys() - {*known}):
                meant = did_you_mean(unknown[0], known) or "docs/settings.md lists them"
                raise ValueError(f"settings.{unknown[0]} is not a setting of a training: {meant}")
            steps = settings.get("steps")
            if not isinstance(steps, int) or steps < MIN_STEPS:
                raise ValueError(f"settings.steps must say how many steps every cell trains for: a number from {MIN_STEPS} on")
            if clash := sorted(settings.keys() & set(GRID_SETTINGS)):
                raise ValueError(f"settings.{clash[0]} is decided by the grid, not by settings")
        if "auto" in (self.settings.get("preset"), *(more.settings.get("preset") for more in self.also)):
            raise ValueError("an experiment names its preset: auto is none")
        if clash := sorted({name for more in self.also for name in more.settings} & set(SHARED_SETTINGS)):
            raise ValueError(
                f"settings.{clash[0]} of `also` must be that of the first grid, which has the same images and words"
            )
        for factor in ("encoder", "decoder"):
            grids = [self, *(more for more in self.also if factor in more.model_fields_set)]
            names = {name for grid in grids for name in getattr(grid, factor)}
            if "auto" in names:
                raise ValueError("an experiment names its encoders and decoders: auto is none")
            if len({Path(name).name for name in names}) < len(names):
                raise ValueError("two encoders or decoders have the same last part of their name: rename a folder")
        if unknown := sorted({name for more in self.also for name in more.data or ()} - set(self.data)):
            raise ValueError(f"`also` names data that is not there: {unknown[0]}")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run, with settings without the word budget; `otherwise` names settings that differ from the first grid."""

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
        """Return the key shared by cells that differ only in the seed: the values of FACTORS, and `otherwise`."""
        return (*(str(getattr(self, name)) for name in FACTORS), self.otherwise)

    def folder(self, *identity: Any) -> str:
        """Return a readable folder name, unique for the settings and for the data (`identity`)."""
        models = f"{Path(self.encoder).name}-{Path(self.decoder).name}"
        name = slugify(f"{self.data}-{models}-{self.alignment}-{self.train_images or 'all'}-s{self.seed}")
        return f"{name}-{digest([self.config.digest_values(), *identity])[:8]}"


def read_experiment(path: Path) -> Experiment:
    """Return the experiment of a YAML file. Raises ConfigError if it cannot be read or a key or value is invalid."""
    experiment = validate(Experiment, read_yaml(path, "docs/experiment.yaml"), where=f"{path}: ")
    cells_of(experiment)  # invalid settings of a cell fail here, before anything runs
    return experiment


def cells_of(experiment: Experiment) -> list[Cell]:
    """Return all distinct cells in the order of the file. Raises ConfigError if the settings of a cell are invalid."""
    first = experiment.model_dump(include=set(Grid.model_fields))
    grids = [(tuple(experiment.data), first, "")]
    for more in experiment.also:
        replaced = more.model_dump(exclude={"data", "settings"}, exclude_unset=True)
        usual = experiment.settings
        changed = {name: value for name, value in more.settings.items() if usual.get(name) != value}
        overrides = ", ".join(f"{name} {value}" for name, value in sorted(changed.items()))
        settings = {**usual, **changed}
        grids.append((more.data or tuple(experiment.data), {**first, **replaced, "settings": settings}, overrides))
    cells: dict[tuple[Any, ...], Cell] = {}
    for names, grid, overrides in grids:
        lists = (names, *(grid[name] for name in FACTORS[1:]), grid["seeds"])
        for data, encoder, decoder, alignment, images, seed in itertools.product(*lists):
            config = _config(experiment.data[data], encoder, decoder, alignment, images, seed, grid["settings"])
            cell = Cell(data, encoder, decoder, alignment, images, seed, config, overrides)
            cells.setdefault((data, digest(config.digest_values())), cell)  # a setting may be the usual one
    return list(cells.values())


def _config(
    data: Data, encoder: str, decoder: str, alignment: Alignment, images: int, seed: int, settings: dict[str, Any]
) -> TrainConfig:
    """Return the settings of a cell: all cells of one grid train for the same number of steps, including alignment."""
    align = round(ALIGN_SHARE * settings["steps"]) if alignment != "none" else 0
    models = {"encoder": encoder, "decoder": decoder, "seed": seed}
    texts = {"text_source": data.text_source, "source_in_prompt": data.source_in_prompt}
    budget = {"train_images": images, "align_steps": align, "align_epochs": 0.0, "steps": settings["steps"] - align}
    weight = CONTRAST if alignment == "contrast" else 0.0
    return resolve(None, **{**settings, **models, **texts, **budget, "contrastive_weight": weight})
