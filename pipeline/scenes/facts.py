"""Facts of a drawn scene: one to four objects on a 3 x 3 grid of places, each with a size, a color and a shape."""

import random
from dataclasses import dataclass

SIZES = ("small", "large")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
PLACES = (  # in reading order: the index is row * 3 + column
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}  # of the attributes of a thing
BACKGROUNDS = ("white", "gray", "beige", "mint")
MAX_OBJECTS = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    size: str
    color: str
    shape: str
    place: str


@dataclass(frozen=True, slots=True)
class Scene:
    """All facts of one drawn image; objects are in reading order of their places."""

    background: str
    objects: tuple[Thing, ...]

    def __post_init__(self) -> None:
        order = [PLACES.index(thing.place) for thing in self.objects]
        if order != sorted(set(order)):
            raise ValueError(f"objects must stand in reading order, one a place: {order}")


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene uniformly: the number of objects first (1 to 4), then places without repetition, then attributes."""
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, MAX_OBJECTS)))
    objects = tuple(Thing(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), PLACES[index]) for index in places)
    return Scene(rng.choice(BACKGROUNDS), objects)
