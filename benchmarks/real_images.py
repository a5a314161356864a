"""Which changed copies of photographs are recognised, as near-duplicates and as excluded images.

    python benchmarks/real_images.py FOLDER

FOLDER holds distinct photographs (.jpg, .png).
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps

from pipeline.images.decode import check_image, image_id, pdq_hash, prepare_image
from pipeline.images.near_pairs import MAX_COPY_BITS, as_hashes, image_distances
from pipeline.images.similarity import MAX_NEAR_BITS
from pipeline.sources.exclusions import ExclusionIndex, exclusion_rows
from pipeline.tables import EXCLUSIONS
from pipeline.types import Sample


def cut(share: float) -> Callable[[Image.Image], Image.Image]:
    """Return a crop that takes off half of a share of each side."""

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        return image.crop(
            (
                round(width * share / 2),
                round(height * share / 2),
                round(width * (1 - share / 2)),
                round(height * (1 - share / 2)),
            )
        )

    return change


def middle(image: Image.Image, share: float = 1.0) -> Image.Image:
    """Return the middle square, or a part of it."""
    return ImageOps.fit(image, (round(min(image.size) * share),) * 2, Image.Resampling.LANCZOS, bleed=(1 - share) / 2)


def lettered(image: Image.Image) -> Image.Image:
    """Return a copy with words on it."""
    out = image.copy()
    ImageDraw.Draw(out).text(
        (image.width // 10, image.height // 10), "Sale! Only today", fill="white", font_size=image.height // 10
    )
    return out


def stored(quality: int) -> Callable[[Image.Image], Image.Image]:
    """Return a change that stores an image as JPEG."""

    def change(image: Image.Image) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return Image.open(io.BytesIO(out.getvalue())).convert("RGB")

    return change


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda image: image,
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "JPEG 30": stored(30),
    "5 % cut off": cut(0.05),
    "10 % cut off": cut(0.1),
    "middle square": middle,
    "224 of the middle 256": lambda image: middle(image, 224 / 256).resize((224, 224)),
    "mirrored": ImageOps.mirror,
    "mirrored middle square": lambda image: ImageOps.mirror(middle(image)),
    "frame of 3 %": lambda image: ImageOps.expand(image, round(0.03 * min(image.size)), "white"),
    "text added": lettered,
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
}


def sample(image: Image.Image) -> Sample:
    """Return an image as a source reads it."""
    out = io.BytesIO()
    image.save(out, "PNG")
    data = out.getvalue()
    return Sample(
        id=image_id(data), source_row="", images=(data,), pdq_hashes=(check_image(data).pdq_hash,), width_px=image.width,
        height_px=image.height, license="unknown",
    )  # fmt: skip


def main() -> None:
    """Print the share of copies that are found, by change, and the false pairs."""
    paths = [path for path in sorted(Path(sys.argv[1]).iterdir()) if path.suffix in (".jpg", ".png")]
    photos = [prepare_image(path.read_bytes()) for path in paths]
    hashes = as_hashes([pdq_hash(image) for image in photos])
    index = ExclusionIndex.of(
        pa.Table.from_pylist(list(exclusion_rows("x", [sample(image) for image in photos])), schema=EXCLUSIONS), "photos"
    )
    print(f"{len(photos)} photographs; copies within {MAX_COPY_BITS} bits, near within {MAX_NEAR_BITS['photos']}")
    print(f"{'change':24} copy  near  excluded")
    for name, change in CHANGES.items():
        changed = [sample(change(image)) for image in photos]
        others = as_hashes([one.pdq_hashes[0] for one in changed])
        bits = image_distances(hashes, others, mirrored=True).diagonal()
        found = np.mean([index.find(one) is not None for one in changed])
        print(f"{name:24} {(bits <= MAX_COPY_BITS).mean():.2f}  {(bits <= MAX_NEAR_BITS['photos']).mean():.2f}  {found:.2f}")
    between = image_distances(hashes, hashes, mirrored=True)[~np.eye(len(photos), dtype=bool)]
    print(
        f"false pairs: {(between <= MAX_NEAR_BITS['photos']).sum() // 2} of {len(between) // 2}; least distance {between.min()}"
    )


if __name__ == "__main__":
    main()
