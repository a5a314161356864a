"""Draw a scene: an 84 x 84 px image in which every place is one 28 px cell.

84 px is three cells of 28, and 28 px is what one merged image token of Qwen2.5-VL covers (two patches of 14),
so that the nine image tokens are the nine places.
"""

import math
import random

from PIL import Image, ImageDraw

from pipeline.scenes.facts import PLACES, Scene, Thing

SIDE_PX = 84
CELL_PX = SIDE_PX // 3
OVERSAMPLE = 4  # drawn larger and averaged down, for smooth edges
# The vision tower of Qwen2.5-VL knows relative positions only: on a uniform background a corner would look like the center.
# The frame makes every place look different.
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
BACKGROUND_RGB = {"white": (248, 248, 248), "gray": (176, 176, 176), "beige": (232, 214, 178), "mint": (178, 230, 204)}
JITTER_RGB = 10  # objects; the background shifts half as much
JITTER_PX = 2.0

Point = tuple[float, float]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Return the scene as an RGB image; `rng` moves each object a little within its cell and shifts each tone a little."""
    ground = _tone(BACKGROUND_RGB[scene.background], rng, JITTER_RGB // 2)
    canvas = Image.new("RGB", (SIDE_PX * OVERSAMPLE,) * 2, ground)
    pen = ImageDraw.Draw(canvas)
    frame = tuple(level // 2 for level in ground)
    pen.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=frame, width=FRAME_PX * OVERSAMPLE)
    for thing in scene.objects:
        _draw_thing(pen, thing, rng)
    return canvas.reduce(OVERSAMPLE)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
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


def _tone(rgb: tuple[int, int, int], rng: random.Random, jitter: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.randint(-jitter, jitter))) for level in rgb)
    return red, green, blue


def _star(points: int, inner: float) -> list[Point]:
    turns = [math.pi * k / points for k in range(2 * points)]
    return [((inner if k % 2 else 1.0) * math.sin(t), -(inner if k % 2 else 1.0) * math.cos(t)) for k, t in enumerate(turns)]


def _cross(arm: float) -> list[Point]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]  # from the top arm to the right one, then turned three times
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


OUTLINES: dict[str, list[Point]] = {  # corners in units of the radius, y down
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "cross": _cross(arm=0.34),
    "star": _star(5, 0.42),
}
