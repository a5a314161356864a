"""Decontamination: images of excluded datasets are found, and clean ones pass."""

from typing import Any

import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from pipeline.images.decode import check_image, image_id
from pipeline.sources.exclusions import ExclusionIndex, exclusion_rows, parse_exclusion
from pipeline.tables import EXCLUSIONS
from pipeline.types import Sample
from tests.media import encoded
from tests.pipeline.images.test_similarity import cropped, photo, stored_again


def sample(*images: Image.Image) -> Sample:
    pages = tuple(map(encoded, images))
    hashes = tuple(check_image(page).pdq_hash for page in pages)
    others: dict[str, Any] = {"width_px": 320, "height_px": 240, "source_row": "r", "license": "unknown"}
    return Sample(id=image_id(pages[0]), images=pages, pdq_hashes=hashes, **others)


def exclusion_table(*samples: Sample) -> pa.Table:
    rows = [row for sample in samples for row in exclusion_rows("x#test", sample)]
    return pa.Table.from_pylist(rows, schema=EXCLUSIONS)


def test_excluded_image_is_found_by_bytes_and_by_hash() -> None:
    index = ExclusionIndex(exclusion_table(sample(photo(1)), sample(photo(2))), "photos")
    assert index.find(sample(photo(1))) == "x#test"
    assert index.find(sample(stored_again(photo(2)))) == "x#test"
    assert index.find(sample(cropped(photo(2)))) == "x#test"
    assert index.find(sample(photo(3))) is None


@pytest.mark.parametrize("share", [1.0, 224 / 256])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_center_crop_of_excluded_image_is_found(share: float, *, is_mirrored: bool) -> None:
    index = ExclusionIndex(exclusion_table(sample(photo(1)), sample(photo(2))), "photos")
    image = photo(2)
    side = round(min(image.size) * share)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    middle = image.crop((left, top, left + side, top + side)).resize((224, 224))
    assert index.find(sample(ImageOps.mirror(middle) if is_mirrored else middle)) == "x#test"
    assert index.find(sample(photo(3).crop((40, 0, 280, 240)))) is None


def test_comparison_by_bytes_ignores_similar_images() -> None:
    index = ExclusionIndex(exclusion_table(sample(photo(1))), None)
    assert index.find(sample(photo(1))) == "x#test"
    assert index.find(sample(stored_again(photo(1)))) is None


def test_one_excluded_page_excludes_a_deck() -> None:
    index = ExclusionIndex(exclusion_table(sample(photo(1), photo(2))), "graphics")
    assert index.find(sample(photo(5), photo(2))) == "x#test"
    assert index.find(sample(photo(5), photo(6))) is None


@pytest.mark.parametrize(
    ("name", "source_and_split"),
    [
        ("flickr30k", ("flickr30k", "test")),
        ("flickr30k:me/copy", ("flickr30k:me/copy", "test")),
        ("vqav2", ("vqav2", "validation")),
        ("slidevqa#train", ("slidevqa", "train")),
        ("folder:photos", ("folder:photos", None)),
        ("hub:me/x@abc#test", ("hub:me/x@abc", "test")),
    ],
)
def test_exclusion_is_parsed_into_source_and_split(
    name: str, source_and_split: tuple[str, str | None]
) -> None:
    assert parse_exclusion(name) == source_and_split
