"""Source: drawn scenes with known facts, endless and seeded."""

import io
import random
from dataclasses import asdict

from pipeline.image import check_image
from pipeline.scenes.draw import SIDE_PX, draw
from pipeline.scenes.facts import sample_scene
from pipeline.scenes.text import caption
from pipeline.types import Sample, Source

REVISION = "1"  # raise when the same seed would draw other pixels or facts
DEFAULT_LIMIT = 1000


def open_scenes(seed: int, limit: int | None) -> Source:
    """Return `limit` scenes; the first n of a longer run are the n of a shorter one."""
    total = limit or DEFAULT_LIMIT
    rows = (draw_sample(seed, index) for index in range(total))
    return Source(name="scenes", revision=f"{REVISION}.{seed}", rows=rows, total=total)


def draw_sample(seed: int, index: int) -> Sample:
    """Draw one scene and say what is true of it: a reference caption, brief, and the facts."""
    rng = random.Random(f"{seed}:{index}")
    scene = sample_scene(rng)
    buffer = io.BytesIO()
    draw(scene, rng).save(buffer, "PNG")
    sample_id, _, _ = check_image(buffer.getvalue())
    return Sample(
        id=sample_id,
        source_row=f"{seed}/{index}",
        images=(buffer.getvalue(),),
        width_px=SIDE_PX,
        height_px=SIDE_PX,
        licence="cc0-1.0",
        references=(caption(scene, "brief"),),
        facts=asdict(scene),
    )
