"""What an experiment file says, and the cells that follow from it: one training run each.

The file is a grid: every kind of data with every encoder, decoder, alignment, number of images and seed. `also` adds smaller
grids, in which some of these lists are replaced.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Section, read_yaml, validate
from pipeline.dataset.paths import slugify
from pipeline.digests import digest
from trainer.config import TrainConfig, resolve
from trainer.data import Mixture

Alignment = Literal["none", "connector", "contrast"]
ALIGN_SHARE = 0.25  # of all steps, where the connector is aligned first
CONTRAST = 0.1
MIN_STEPS = 4  # so that a quarter of them is one
FACTORS = ("data", "encoder", "decoder", "alignment", "train_images")  # by which arms differ
ONE_FOR_ALL = ("styles", "questions")  # what is seen of a version: a smaller grid cannot have others
DECIDED = (
    "encoder", "decoder", "text_source", "source_in_prompt", "train_images", "caption_word_budget", "align_steps",
    "contrastive_weight", "seed",
)  # fmt: skip


class Data(Section):
    """A version with the choice of its texts that is learned from."""

    OLD_KEYS: ClassVar = {"texts": "text_source", "name_source": "source_in_prompt"}

    data: str | None = None  # as of `synth train --data`; None: what was made last
    images: str | None = None
    text_source: Mixture = "synthetic"
    source_in_prompt: bool = True


class Grid(Section):
    """The lists whose product is the cells."""

    encoder: Annotated[tuple[str, ...], Field(min_length=1)] = ("clip",)
    decoder: Annotated[tuple[str, ...], Field(min_length=1)] = ("scratch",)
    alignment: Annotated[tuple[Alignment, ...], Field(min_length=1)] = ("none",)
    train_images: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)  # 0: all
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    settings: dict[str, Any] = Field(default_factory=dict)  # of trainer/config.py, for all cells


class More(Section):
    """A smaller grid beside the first: what is given replaces the list of that name; settings are merged.

    Its arms are compared with one another, and with those of the first grid only where the settings are the same.
    """

    data: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # names
    encoder: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    decoder: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    alignment: Annotated[tuple[Alignment, ...], Field(min_length=1)] | None = None
    train_images: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class Experiment(Grid):
    """An experiment file."""

    data: Annotated[dict[str, Data], Field(min_length=1)]
    match_words: bool = True  # whether all kinds of data are cut to the captions of the smallest
    also: tuple[More, ...] = ()

    @model_validator(mode="after")
    def _is_one_budget(self) -> "Experiment":
        for settings in (self.settings, *({**self.settings, **more.settings} for more in self.also)):
            steps = settings.get("steps")
            if not isinstance(steps, int) or steps < MIN_STEPS:
                raise ValueError(f"settings.steps must say how many steps every cell trains for: a number from {MIN_STEPS} on")
            if clash := sorted({TrainConfig.OLD_KEYS.get(key, key) for key in settings} & set(DECIDED)):
                raise ValueError(f"settings.{clash[0]} is decided by the grid, not by settings")
        if clash := sorted({name for more in self.also for name in more.settings} & set(ONE_FOR_ALL)):
            raise ValueError(
                f"settings.{clash[0]} of `also` must be that of the first grid, which has the same images and words"
            )
        models = [set(self.encoder).union(*(m.encoder or () for m in self.also))]
        models.append(set(self.decoder).union(*(m.decoder or () for m in self.also)))
        for known in models:
            if "auto" in known:
                raise ValueError("an experiment names its encoders and decoders: auto is none")
            if len({Path(name).name for name in known}) < len(known):
                raise ValueError("two encoders or decoders have the same last part of their name: rename a folder")
        unknown = sorted({name for more in self.also for name in more.data or ()} - set(self.data))
        if unknown:
            raise ValueError(f"`also` names data that is not there: {unknown[0]}")
        return self


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run: its place in the grid, and its settings but for the budget of words.

    `otherwise` says which settings are not those of the first grid.
    """

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
        """Return what it shares with the cells that differ in the seed alone: the values of FACTORS, and other settings."""
        return (*(str(getattr(self, name)) for name in FACTORS), self.otherwise)

    def folder(self, *known: Any) -> str:
        """Return a readable name that no cell of other settings, on other data (`known`), has."""
        images = str(self.train_images or "all")
        said = slugify(
            f"{self.data}-{Path(self.encoder).name}-{Path(self.decoder).name}-{self.alignment}-{images}-s{self.seed}"
        )
        return f"{said}-{digest([self.config.digest_values(), *known])[:8]}"


def read_experiment(path: Path) -> Experiment:
    """Return what a YAML file says.

    Raises:
        ConfigError: it cannot be read, or says something that we do not know.
    """
    values = read_yaml(path, "docs/experiment.yaml")
    experiment = validate(Experiment, values, where=f"{path}: ")
    cells_of(experiment)  # settings that a cell cannot have are found before anything runs
    return experiment


def cells_of(experiment: Experiment) -> list[Cell]:
    """Return all cells in the order of the file, each once. Raises ConfigError where one has settings that cannot be."""
    first = experiment.model_dump(include=set(Grid.model_fields))
    grids = [(tuple(experiment.data), first, "")]
    for more in experiment.also:
        given = {name: value for name, value in more.model_dump(exclude={"data", "settings"}).items() if value is not None}
        changed = {name: value for name, value in more.settings.items() if experiment.settings.get(name) != value}
        otherwise = ", ".join(f"{name} {value}" for name, value in sorted(changed.items()))
        settings = {**experiment.settings, **changed}
        grids.append((more.data or tuple(experiment.data), {**first, **given, "settings": settings}, otherwise))
    cells: dict[tuple[Any, ...], Cell] = {}
    for names, grid, otherwise in grids:
        lists = (names, *(grid[name] for name in FACTORS[1:]), grid["seeds"])
        for data, encoder, decoder, alignment, images, seed in itertools.product(*lists):
            config = _config(experiment.data[data], encoder, decoder, alignment, images, seed, grid["settings"])
            cell = Cell(data, encoder, decoder, alignment, images, seed, config, otherwise)
            cells.setdefault((*cell.arm, seed), cell)
    return list(cells.values())


def _config(
    data: Data, encoder: str, decoder: str, alignment: Alignment, images: int, seed: int, settings: dict[str, Any]
) -> TrainConfig:
    """Return the settings of a cell: all cells of one grid train for the same number of steps, those of aligning included."""
    align = round(ALIGN_SHARE * settings["steps"]) if alignment != "none" else 0
    chosen = {
        "encoder": encoder,
        "decoder": decoder,
        "seed": seed,
        "text_source": data.text_source,
        "source_in_prompt": data.source_in_prompt,
    }
    budget = {"train_images": images, "align_steps": align, "steps": settings["steps"] - align}
    return resolve(None, **{**settings, **chosen, **budget, "contrastive_weight": CONTRAST if alignment == "contrast" else 0.0})
