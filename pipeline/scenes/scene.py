"""Drawn scenes: their facts, which are a function of the source row, and their images.

A scene has one to four objects on a 3 x 3 grid of places. Each object has a size, a color and a shape. The
image has 84 x 84 px. Each place is a cell of 28 x 28 px, which Qwen2.5-VL turns into one image token by
merging 2 x 2 patches of 14 px.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from pipeline.config import DECKS

SIZES = ("small", "large")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
# The places are in reading order: index = row * 3 + column.
PLACES = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
VALUES = {"size": SIZES, "color": COLORS, "shape": SHAPES, "place": PLACES}
BACKGROUNDS = ("white", "gray", "beige", "mint")
MAX_OBJECTS = 4
SIDE_PX = 84
CELL_PX = SIDE_PX // 3
OVERSAMPLE = 4  # scenes are drawn this much larger and averaged down, for smooth edges
# The vision tower of Qwen2.5-VL has only relative positions. Without a frame, a corner would look like the
# center.
FRAME_PX = 2

RADIUS_PX = {"small": (5.0, 6.2), "large": (9.5, 11.5)}
COLOR_RGB = {
    "red": (214, 36, 36),
    "orange": (244, 132, 22),
    "yellow": (242, 206, 18),
    "green": (36, 146, 58),
    "blue": (36, 86, 212),
    "purple": (126, 48, 168),
    "pink": (246, 128, 190),
    "black": (24, 24, 24),
}
BACKGROUND_RGB = {
    "white": (248, 248, 248),
    "gray": (176, 176, 176),
    "beige": (232, 214, 178),
    "mint": (178, 230, 204),
}
# Object colors vary by at most this much, and background colors by half as much.
JITTER_RGB = 10
JITTER_PX = 2.0

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object in a scene."""

    size: str
    color: str
    shape: str
    place: str


@dataclass(frozen=True, slots=True)
class Scene:
    """All facts of a drawn image. Objects are sorted by place, with at most one per place."""

    background: str
    objects: tuple[Thing, ...]


def sample_scene(rng: random.Random) -> Scene:
    """Sample a random scene with 1 to 4 objects at distinct places."""
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, MAX_OBJECTS)))
    objects = []
    for index in places:
        size, color, shape = rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES)
        objects.append(Thing(size, color, shape, PLACES[index]))
    return Scene(rng.choice(BACKGROUNDS), tuple(objects))


def sample_deck(rng: random.Random) -> tuple[Scene, ...]:
    """Sample a random deck. It has one page per background, so that "the gray page" is unique."""
    grounds = rng.sample(BACKGROUNDS, len(BACKGROUNDS))
    return tuple(Scene(ground, sample_scene(rng).objects) for ground in grounds)


def sample_row(source: str, seed: int, index: int) -> tuple[tuple[Scene, ...], random.Random]:
    """Return the scenes of a row (one, or one per page of a deck), and the generator to draw them with."""
    if source == DECKS:
        rng = random.Random(f"deck:{seed}:{index}")
        return sample_deck(rng), rng
    rng = random.Random(f"{seed}:{index}")
    return (sample_scene(rng),), rng


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as an RGB image. `rng` varies colors, sizes, and positions within cells."""
    ground = _tone(BACKGROUND_RGB[scene.background], rng, JITTER_RGB // 2)
    canvas = Image.new("RGB", (SIDE_PX * OVERSAMPLE,) * 2, ground)
    pen = ImageDraw.Draw(canvas)
    frame = tuple(level // 2 for level in ground)
    pen.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=frame, width=FRAME_PX * OVERSAMPLE)
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), 3)
        radius_px = rng.uniform(*RADIUS_PX[thing.size])
        x_px = (column + 0.5) * CELL_PX + rng.uniform(-JITTER_PX, JITTER_PX)
        y_px = (row + 0.5) * CELL_PX + rng.uniform(-JITTER_PX, JITTER_PX)
        fill = _tone(COLOR_RGB[thing.color], rng, JITTER_RGB)
        x, y, r = (length_px * OVERSAMPLE for length_px in (x_px, y_px, radius_px))
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif thing.shape == "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * 0.42))
        else:
            pen.polygon([(x + r * dx, y + r * dy) for dx, dy in OUTLINES[thing.shape]], fill=fill)
    return canvas.reduce(OVERSAMPLE)


def _tone(rgb: tuple[int, int, int], rng: random.Random, jitter: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.randint(-jitter, jitter))) for level in rgb)
    return red, green, blue


# Half the width of an arm of the cross.
_A = 0.34
# Angle and radius of each corner of the star.
_STAR = [(math.pi * k / 5, 0.42 if k % 2 else 1.0) for k in range(10)]
# Corners in units of the radius. The y axis points down.
OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "cross": [
        *((_A, -1.0), (_A, -_A), (1.0, -_A), (1.0, _A), (_A, _A), (_A, 1.0)),
        *((-_A, 1.0), (-_A, _A), (-1.0, _A), (-1.0, -_A), (-_A, -_A), (-_A, -1.0)),
    ],
    "star": [(radius * math.sin(turn), -radius * math.cos(turn)) for turn, radius in _STAR],
}
