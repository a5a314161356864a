"""Decontamination: find images that occur in other datasets, such as a benchmark's test set.

Images match by their bytes, or by the PDQ hash of the image or its center crops. Texts are not compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.errors import SourceError
from pipeline.images.decode import check_image, image_id, pdq_hash, prepare_image
from pipeline.images.near_duplicates import MAX_NEAR_BITS, as_hashes, image_distances
from pipeline.progress import Progress
from pipeline.sources import choose_image_kind, find_source, open_source
from pipeline.storage.files import write_table
from pipeline.tables import EXCLUSIONS
from pipeline.types import ImageKind, Rejected, Sample, Source

# These are side lengths of square center crops, relative to the image's shorter side.
CROPS = (1.0, 224 / 256)


def hash_images(sample: Sample) -> tuple[bytes, ...]:
    """Return the PDQ hash of each image in a sample. Raises ImageError if one cannot be decoded."""
    return sample.pdq_hashes or tuple(check_image(image).pdq_hash for image in sample.images)


def exclusion_rows(name: str, sample: Sample, kind: ImageKind | None = "photos") -> Iterator[dict[str, Any]]:
    """Yield one row (tables.EXCLUSIONS) per image.

    `kind` is the kind of images that will be compared with these rows. Crops are hashed only for photos.
    """
    is_photo = kind == "photos" and len(sample.images) == 1
    hashes = hash_images(sample) if kind else [b""] * len(sample.images)
    for image, page_hash in zip(sample.images, hashes, strict=True):
        crop_hashes = _crop_hashes(image) if is_photo else []
        yield {"name": name, "image_id": image_id(image), "pdq_hash": page_hash, "crop_hashes": crop_hashes}


def _crop_hashes(data: bytes) -> list[bytes]:
    """Return the PDQ hashes of an image's center crops, except crops with too little detail."""
    image, hashes = prepare_image(data), list[bytes]()
    for share in CROPS:
        side = round(min(image.size) * share)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        hashes.append(pdq_hash(image.crop((left, top, left + side, top + side))))
    return [crop_hash for crop_hash in hashes if crop_hash]


class ExclusionIndex:
    """Images to keep out of the training data (tables.EXCLUSIONS), by sha256 and by PDQ hash.

    `kind` is the kind of the images to look up, or None to compare only bytes.
    """

    def __init__(self, table: pa.Table, kind: ImageKind | None) -> None:
        rows, hashes = table.to_pylist(), list[bytes]()
        self.kind = kind
        self.dataset_of_id: dict[str, str] = {row["image_id"]: row["name"] for row in rows}
        self.dataset_of_hash: list[str] = []
        for row in rows if kind else ():
            crops = row["crop_hashes"] if kind == "photos" else []
            row_hashes = [one for one in (row["pdq_hash"], *crops) if one]
            hashes += row_hashes
            self.dataset_of_hash += [row["name"]] * len(row_hashes)
        self.hashes = as_hashes(hashes)

    def find(self, sample: Sample) -> str | None:
        """Return a dataset that has an image of this sample or its near-duplicate, or None."""
        for image in sample.images if self.dataset_of_id else ():  # without exclusions, no image is hashed
            if name := self.dataset_of_id.get(image_id(image)):
                return name
        pdq_hashes = [pdq_hash for pdq_hash in sample.pdq_hashes if pdq_hash]
        if not pdq_hashes or self.kind is None or not len(self.hashes):
            return None
        distances = image_distances(as_hashes(pdq_hashes), self.hashes, mirrored=self.kind == "photos")
        near = np.argwhere(distances <= MAX_NEAR_BITS[self.kind])
        return self.dataset_of_hash[int(near[0][1])] if len(near) else None


@dataclass(frozen=True, slots=True)
class Exclusion:
    """An opened source of --exclude. `option` is the user's value. Tables and messages show `label`."""

    option: str
    label: str
    source: Source


def parse_exclusion(option: str) -> tuple[str, str | None]:
    """Return the source and the split in SOURCE[#SPLIT].

    The default split is the one on which models are scored, if the source has one, or else None.
    """
    name, _, split = option.partition("#")
    return name, split or find_source(name).scored_split


def open_exclusions(config: Config) -> list[Exclusion]:
    """Open the sources of --exclude without reading rows."""
    exclusions = []
    for option in config.exclude:
        name, split = parse_exclusion(option)
        settings: dict[str, Any] = {"image_filter": {"enabled": False}}
        if "frame_seconds" in find_source(name).options:
            settings["frame_seconds"] = config.frame_seconds
        source = open_source(resolve(source=name, source_split=split, **settings))
        exclusions.append(Exclusion(option, f"{source.name}#{split}" if split else source.name, source))
    return exclusions


def write_exclusions(
    dataset: DatasetDir, config: Config, exclusions: Sequence[Exclusion], progress: Progress
) -> list[dict[str, Any]]:
    """Write the images of the sources of --exclude to a table, and describe each source.

    Raises SourceError if no image in a source can be read.
    """
    described: list[dict[str, Any]] = []
    kind = choose_image_kind(config)

    def tables() -> Iterator[pa.Table]:
        for exclusion in exclusions:
            label, rows, unread = exclusion.label, list[dict[str, Any]](), 0
            for sample in exclusion.source.rows:
                if isinstance(sample, Rejected):
                    unread += 1
                else:
                    rows += exclusion_rows(label, sample, kind)
                    progress(f"exclude {label}", len(rows), None)
            if not rows:
                raise SourceError(
                    f"no image of --exclude {exclusion.option} can be read", hint="check its name and split"
                )
            if unread:
                progress.warn(f"exclude {label}: {unread} rows could not be read, and were not excluded")
            counts = {"images": len(rows), "unread": unread}
            described.append({"name": label, "revision": exclusion.source.revision, **counts})
            yield pa.Table.from_pylist(rows, schema=EXCLUSIONS)

    write_table(dataset.step_file("read", "exclusions"), tables(), EXCLUSIONS)
    return described
