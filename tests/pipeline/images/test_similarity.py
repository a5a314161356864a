"""Image similarity: near-duplicate photos are rejected or grouped, and slides are kept."""

import io
import random
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from pipeline.images import near_duplicates
from pipeline.images.decode import pdq_hash
from pipeline.images.near_duplicates import (
    COMPARED_COLUMNS,
    MAX_COPY_BITS,
    MAX_NEAR_BITS,
    as_hashes,
    compare_samples,
    image_distances,
    near_hashes,
)
from pipeline.tables import SPLIT_RANK
from pipeline.types import ImageKind
from tests.media import encoded

COUNT = 60


def photo(seed: int) -> Image.Image:
    """Return an image with the spectrum of photos (1 / f) and a few ellipses."""
    return _photo(seed).copy()


@lru_cache(256)
def _photo(seed: int) -> Image.Image:
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    rows, columns = np.fft.fftfreq(240)[:, None], np.fft.rfftfreq(320)[None]
    amplitude = 1 / np.maximum(1 / 240, np.hypot(rows, columns)) ** 1.2
    waves = (np.exp(2j * np.pi * rng.random(amplitude.shape)) for _ in range(4))
    layers = [np.fft.irfft2(amplitude * wave, s=(240, 320)) for wave in waves]
    pixels = np.stack([layers[3] + 0.4 * layer for layer in layers[:3]], -1)
    scaled = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    image = Image.fromarray(scaled.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(draw.randint(1, 5)):
        x, y, side = draw.randint(0, 320), draw.randint(0, 240), draw.randint(15, 90)
        pen.ellipse((x, y, x + side, y + side), fill=tuple(draw.randint(0, 255) for _ in range(3)))
    return image


def stored_again(image: Image.Image, quality: int = 30) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=quality))).convert("RGB")


def cropped(image: Image.Image, share: float = 0.03) -> Image.Image:
    dx, dy = image.width * share / 2, image.height * share / 2
    return image.crop((round(dx), round(dy), round(image.width - dx), round(image.height - dy)))


def slide(rows: list[str]) -> Image.Image:
    image = Image.new("RGB", (640, 480), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 640, 60), fill=(20, 60, 120))
    for n, row in enumerate(rows):
        pen.text((40, 90 + 50 * n), row, fill="black", font=ImageFont.load_default(28))
    return image


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [photo(seed) for seed in range(COUNT)]


def distances(images: list[Image.Image], others: list[Image.Image]) -> np.ndarray[Any, Any]:
    hashes, other_hashes = (as_hashes([pdq_hash(image) for image in group]) for group in (images, others))
    return image_distances(hashes, other_hashes, mirrored=False)


@pytest.mark.parametrize(
    ("change", "least"),
    [
        (stored_again, 1.0),
        (lambda image: image.resize((160, 120)), 1.0),
        (lambda image: ImageEnhance.Brightness(image).enhance(1.25), 0.93),
        (lambda image: ImageOps.grayscale(image).convert("RGB"), 1.0),
    ],
    ids=["q30", "half", "bright", "gray"],
)
def test_recompressed_photo_is_a_copy(photos: list[Image.Image], change: Any, least: float) -> None:
    bits = distances(photos, [change(image) for image in photos]).diagonal()
    assert (bits <= MAX_COPY_BITS).mean() >= least


def test_photo_with_white_border_is_near_its_copy_with_text_in_the_border(photos: list[Image.Image]) -> None:
    on_white = [ImageOps.expand(image, 60, "white") for image in photos]
    marked = [image.copy() for image in on_white]
    for image in marked:
        ImageDraw.Draw(image).text((6, 6), "No. 7", fill="black")
    assert distances(on_white, marked).diagonal().max() <= MAX_NEAR_BITS["photos"]


def test_different_photos_are_not_near(photos: list[Image.Image]) -> None:
    bits = distances(photos, photos)
    assert bits[~np.eye(COUNT, dtype=bool)].min() > MAX_NEAR_BITS["photos"]


def test_crop_is_near_its_photo_but_not_a_copy(photos: list[Image.Image]) -> None:
    bits = distances(photos, [cropped(image) for image in photos]).diagonal()
    assert (bits <= MAX_NEAR_BITS["photos"]).mean() >= 0.95
    assert (bits <= MAX_COPY_BITS).mean() <= 0.1


def samples(*rows: dict[str, Any]) -> pa.Table:
    size = {"width_px": 320, "height_px": 240}
    kinds = [("sample_id", pa.string()), ("split", pa.string()), ("pdq_hashes", pa.list_(pa.binary()))]
    schema = pa.schema([*kinds, ("width_px", pa.int32()), ("height_px", pa.int32())])
    named = [{"sample_id": f"s{n}", **size, **row} for n, row in enumerate(rows)]
    return pa.Table.from_pylist(named, schema=schema)


def hashes_of(*images: Image.Image) -> list[bytes]:
    return [pdq_hash(image) for image in images]


def test_slides_of_one_template_are_kept() -> None:
    texts = ("Revenue grew by 12 %", "Costs fell in all regions", "New plants in two cities", "Staff: 1,240")
    pages = [slide([*random.Random(n).sample(texts, 4), f"Chart {n}: {n * 37} units"]) for n in range(12)]
    changed = [slide(["Revenue grew by 12 %", "Total: 118"]), slide(["Revenue grew by 12 %", "Total: 113"])]
    rows = ({"pdq_hashes": hashes_of(page)} for page in pages + changed)
    groups = compare_samples(samples(*rows), "graphics")
    assert set(groups["image_reason"].to_pylist()) == {None}


def test_decks_are_near_if_half_of_their_pages_are(photos: list[Image.Image]) -> None:
    rows = [
        {"pdq_hashes": hashes_of(*photos[:4])},
        {"pdq_hashes": hashes_of(*map(stored_again, photos[:2]), *photos[4:6])},
        {"pdq_hashes": hashes_of(photos[0], *photos[6:9])},
        {"pdq_hashes": [b"", b"", *hashes_of(photos[0])]},
    ]
    assert compare_samples(samples(*rows), "graphics")["image_group"].to_pylist() == ["s0", "s0", "s2", "s3"]


def test_flat_images_are_near_no_other_image(photos: list[Image.Image]) -> None:
    assert pdq_hash(Image.new("RGB", (300, 200), "white")) == b""
    hashes = [hashes_of(photos[0]), [b""], hashes_of(cropped(photos[0])), [b""], []]
    groups = compare_samples(samples(*({"pdq_hashes": of_sample} for of_sample in hashes)), "photos")
    assert groups["image_group"].to_pylist() == ["s0", "s1", "s0", "s3", "s4"]


def test_copy_of_a_deck_with_similar_pages_is_rejected() -> None:
    page = np.random.default_rng(4).integers(0, 2, 256, np.uint8)
    changed = np.eye(4, dtype=np.uint8).repeat(64, axis=1) * (np.arange(256) % 3 == 0)
    similar = [np.packbits(page ^ bits) for bits in changed]
    deck = {"pdq_hashes": [one.tobytes() for one in similar]}
    assert compare_samples(samples(deck, deck), "photos")["near_duplicate_of"].to_pylist() == [None, "s0"]


@pytest.mark.parametrize("kind", ["photos", "graphics"])
def test_tiled_search_finds_the_same_near_pairs_as_plain_comparison(
    kind: ImageKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK_HASHES", 100)
    monkeypatch.setattr(near_duplicates, "TILE_HASHES", 300)
    rng = np.random.default_rng(0)
    hashes = np.repeat(rng.integers(0, 2**64, (12, 4), dtype=np.uint64), 60, axis=0)
    for row in hashes:
        for bit in rng.choice(256, rng.integers(0, 40), replace=False).tolist():
            row[bit // 64] ^= np.uint64(1 << bit % 64)
    hashes[::2] ^= np.array([2**64 - 1, 2**64 - 1, 0, 0], np.uint64)  # mirrored
    hashes = rng.permutation(hashes)
    bits = image_distances(hashes, hashes, mirrored=kind == "photos")
    near = np.argwhere(MAX_NEAR_BITS[kind] >= bits.T)
    expected = [(first, second, bits[first, second]) for second, first in near if first < second]
    pairs = near_hashes(hashes, kind, np.zeros(len(hashes), np.bool_))
    assert list(zip(*pairs, strict=True)) == expected and len(expected) > 1000


def test_mirrored_photo_is_a_copy_and_the_larger_one_is_kept(photos: list[Image.Image]) -> None:
    mirrored = [ImageOps.mirror(image) for image in photos]
    hashes, others = (as_hashes([pdq_hash(image) for image in images]) for images in (photos, mirrored))
    bits = image_distances(hashes, others, mirrored=True)
    assert bits.diagonal().max() <= MAX_COPY_BITS
    assert bits[~np.eye(COUNT, dtype=bool)].min() > MAX_NEAR_BITS["photos"]
    assert (image_distances(hashes, others, mirrored=False).diagonal() > MAX_NEAR_BITS["graphics"]).all()
    rows: list[dict[str, Any]] = [
        {"pdq_hashes": hashes_of(photos[0]), "width_px": 320},
        {"pdq_hashes": hashes_of(mirrored[0]), "width_px": 640},
    ]
    groups = compare_samples(samples(*rows), "photos").to_pydict()
    assert groups["image_reason"] == ["near_duplicate_image", None]
    assert compare_samples(samples(*rows), "graphics")["image_reason"].to_pylist() == [None, None]


def choose_one_by_one(
    ids: list[str], splits: list[str | None], pixels: list[int], bits: Any, kind: str
) -> list[tuple[Any, ...]]:
    """Return the expected result of `compare_samples`, computed from all pairwise distances."""
    others = [np.flatnonzero(row <= MAX_NEAR_BITS[kind]).tolist() for row in bits]
    near = [[b for b in row if b != a] for a, row in enumerate(others)]
    kept: set[int] = set()
    results: dict[int, tuple[str | None, str | None]] = {}
    for n in sorted(range(len(ids)), key=lambda n: (-SPLIT_RANK[splits[n]], -pixels[n], ids[n])):
        neighbors = sorted(kept.intersection(near[n]), key=lambda neighbor: ids[neighbor])
        rank = max(SPLIT_RANK[splits[n]], SPLIT_RANK["train"])
        held_out = [m for m in neighbors if SPLIT_RANK[splits[m]] > rank]
        copies = [m for m in neighbors if kind == "photos" and bits[n, m] <= MAX_COPY_BITS]
        if held_out or copies:
            reason = "near_held_out_image" if held_out else "near_duplicate_image"
            results[n] = (reason, ids[(held_out or copies)[0]])
        else:
            kept.add(n)
            results[n] = (None, None)
    groups = {n: {n} for n in range(len(ids))}
    for a in range(len(ids)):
        for b in near[a]:
            joined = groups[a] | groups[b]
            groups.update(dict.fromkeys(joined, joined))
    return sorted((ids[n], min(ids[m] for m in groups[n]), *results[n]) for n in range(len(ids)))


@pytest.mark.parametrize("kind", ["photos", "graphics"])
@pytest.mark.parametrize("seed", range(3))
def test_duplicate_choice_equals_sequential_algorithm(seed: int, kind: ImageKind) -> None:
    rng = np.random.default_rng(seed)
    count = 80
    ids = [f"{n:04d}" for n in rng.permutation(count)]
    hashes = rng.integers(0, 2**64, (10, 4), dtype=np.uint64)[rng.integers(0, 10, count)]
    for row in hashes:  # flip some bits, so that distances within a cluster vary
        for bit in rng.choice(256, rng.integers(0, 36), replace=False).tolist():
            row[bit // 64] ^= np.uint64(1 << bit % 64)
    splits = [(None, "train", "validation", "test")[n] for n in rng.integers(0, 4, count)]
    widths = rng.integers(1, 4, count).tolist()
    columns = (ids, splits, [[row.tobytes()] for row in hashes], widths, [10] * count)
    table = pa.table(dict(zip(COMPARED_COLUMNS, columns, strict=True)))
    compared = as_hashes([row.tobytes() for row in hashes])
    bits = image_distances(compared, compared, mirrored=kind == "photos")
    rows = [tuple(row.values()) for row in compare_samples(table, kind).to_pylist()]
    assert rows == choose_one_by_one(ids, splits, [10 * width for width in widths], bits, kind)
    assert len({row[2] for row in rows}) == (3 if kind == "photos" else 2)


def samples_of(hashes: Any, splits: list[str | None]) -> pa.Table:
    """Return samples of one size with these hashes, sorted by id."""
    ids, sides_px = [f"{n:05d}" for n in range(len(hashes))], [10] * len(hashes)
    columns = (ids, splits, [[row.tobytes()] for row in hashes], sides_px, sides_px)
    return pa.table(dict(zip(COMPARED_COLUMNS, columns, strict=True)))


@pytest.mark.parametrize("kind", ["photos", "graphics"])
def test_decks_that_have_only_common_pages_form_one_group(
    kind: ImageKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.images.near_duplicates.MAX_NEIGHBORS", 4)
    common, own = np.split(np.random.default_rng(3).integers(0, 2**64, (93, 4), dtype=np.uint64), [3])
    decks = [[common[n % 3], *own[3 * n : 3 * n + 3]] for n in range(30)] + 2 * [[*common]]
    samples = samples_of(own[: len(decks)], [None] * len(decks))
    hashes = pa.array([[page.tobytes() for page in deck] for deck in decks])
    groups = compare_samples(samples.set_column(2, "pdq_hashes", hashes), kind)
    assert groups["image_group"].to_pylist()[-2:] == ["00030", "00030"]
    assert len(groups["image_group"].unique()) == 31


@pytest.mark.parametrize("kind", ["photos", "graphics"])
def test_images_near_a_held_out_image_are_rejected(kind: ImageKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.near_duplicates.MAX_NEIGHBORS", 16)
    rng = np.random.default_rng(2)
    hashes = np.repeat(rng.integers(0, 2**64, (1, 4), dtype=np.uint64), 1500, axis=0)
    for row in hashes[1:]:
        for bit in rng.choice(256, 6, replace=False).tolist():
            row[bit // 64] ^= np.uint64(1 << bit % 64)
    order = rng.permutation(1500)
    splits: list[str | None] = ["train"] * 1500
    splits[int(np.flatnonzero(order == 0)[0])] = "test"
    groups = compare_samples(samples_of(hashes[order], splits), kind)
    assert groups["image_reason"].null_count == 1
