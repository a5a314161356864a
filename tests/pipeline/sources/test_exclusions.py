"""Decontamination: images and texts of excluded datasets are found, and clean ones pass."""

import io
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from pipeline.images.decode import check_image, image_id
from pipeline.sources.exclusions import ExclusionIndex, TextIndex, exclusion_rows, parse_exclusion
from pipeline.tables import EXCLUSIONS
from pipeline.types import ReferenceQA, Sample
from tests.pipeline.images.test_similarity import cropped, photo, stored_again


def sample(*images: Image.Image, kind: str = "PNG", **more: object) -> Sample:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        encoded.append(buffer.getvalue())
    checked = [check_image(data) for data in encoded]
    defaults: dict[str, Any] = {"source_row": "r", "width_px": 320, "height_px": 240, "license": "unknown"}
    return Sample(
        id=image_id(encoded[0]),
        images=tuple(encoded),
        pdq_hashes=tuple(page.pdq_hash for page in checked),
        **(defaults | more),
    )


def contaminated(texts: Sequence[str], table: pa.Table) -> list[str | None]:
    index = TextIndex.of(table)
    return [index.find(text) for text in texts]


def text_table(name: str, *texts: str) -> pa.Table:
    row = {"name": name, "image_id": "i", "pdq_hash": b"", "texts": list(texts)}
    return pa.Table.from_pylist([row], schema=EXCLUSIONS)


def exclusion_table(*samples: Sample) -> pa.Table:
    return pa.Table.from_pylist(list(exclusion_rows("x#test", samples)), schema=EXCLUSIONS)


def test_excluded_image_is_found_by_bytes_and_by_hash() -> None:
    index = ExclusionIndex.of(exclusion_table(sample(photo(1)), sample(photo(2))), "photos")
    assert index.find(sample(photo(1))) == "x#test"
    assert index.find(sample(stored_again(photo(2)))) == "x#test"
    assert index.find(sample(cropped(photo(2)))) == "x#test"
    assert index.find(sample(photo(3))) is None


@pytest.mark.parametrize("share", [1.0, 224 / 256])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_center_crop_of_excluded_image_is_found(share: float, *, is_mirrored: bool) -> None:
    index = ExclusionIndex.of(exclusion_table(sample(photo(1)), sample(photo(2))), "photos")
    image = photo(2)
    side = round(min(image.size) * share)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    middle = image.crop((left, top, left + side, top + side)).resize((224, 224))
    assert index.find(sample(ImageOps.mirror(middle) if is_mirrored else middle)) == "x#test"
    assert index.find(sample(photo(3).crop((40, 0, 280, 240)))) is None


def test_comparison_by_bytes_ignores_similar_images() -> None:
    index = ExclusionIndex.of(exclusion_table(sample(photo(1))), None)
    assert index.find(sample(photo(1))) == "x#test"
    assert index.find(sample(stored_again(photo(1)))) is None


def test_one_excluded_page_excludes_a_deck() -> None:
    index = ExclusionIndex.of(exclusion_table(sample(photo(1), photo(2))), "graphics")
    assert index.find(sample(photo(5), photo(2))) == "x#test"
    assert index.find(sample(photo(5), photo(6))) is None


def test_exclusion_texts_are_captions_and_questions() -> None:
    questions = (ReferenceQA(question="How many?", answers=("2",)),)
    rows = list(
        exclusion_rows("x", [sample(photo(1), photo(2), references=("A dog.",), reference_qa=questions)])
    )
    assert [row["texts"] for row in rows] == [["A dog.", "How many?"], []]


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
def test_exclusion_names_source_and_split(name: str, source_and_split: tuple[str, str | None]) -> None:
    assert parse_exclusion(name) == source_and_split


WHO = ("firefighter", "gardener", "toddler", "violinist", "surfer", "welder", "referee", "juggler")
DOES = ("leans against", "walks past", "points toward", "stares at", "kneels before", "climbs over")
WHAT = ("a rusted gate", "the marble fountain", "a striped awning", "an overturned canoe", "a wooden step")
WHEN = ("at dawn near the harbor", "under heavy gray clouds", "during a crowded parade", "in a quiet alley")


def test_planted_leaks_are_found_and_clean_texts_pass() -> None:
    rng = random.Random("leaks")
    endings = [" ".join(parts) for parts in itertools.product(DOES, WHAT, WHEN)]
    rng.shuffle(endings)
    test = rng.sample([f"A {who} {ending}." for who, ending in itertools.product(WHO, endings[:60])], 400)
    clean = [
        f"One {who} {ending}." for who, ending in itertools.product(WHO, endings[60:])
    ]  # same subjects, other actions
    table = text_table("x#test", *test)
    planted = {
        "verbatim": test,
        "case": [text.upper() for text in test],
        "opening": [f"The image shows {text[0].lower()}{text[1:]}" for text in test],
        "suffix": [f"{text[:-1]} in this view." for text in test],
    }
    for kind, changed in planted.items():
        names = contaminated(changed, table)
        assert sum(name == "x#test" for name in names) >= 0.99 * len(changed), kind
    assert sum(name is not None for name in contaminated(clean, table)) <= 0.002 * len(clean)


def test_contained_and_containing_texts_are_found() -> None:
    short, sentence = (
        "A painter leans against the marble fountain at dawn.",
        "Two sleeping cats lie beside a rusted gate in the sun.",
    )
    table = text_table("x", short)
    assert contaminated([f"{sentence} {short} {sentence}", sentence], table) == ["x", None]
    table = text_table("x", f"{sentence} {short}")
    assert contaminated([short], table) == ["x"]
