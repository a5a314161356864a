"""Near pairs among many hashes: the search in tiles finds the pairs of a plain comparison."""

import numpy as np
import pytest

from pipeline.images import near_duplicates
from pipeline.images.near_duplicates import (
    MAX_NEAR_BITS,
    Hashes,
    ImageKind,
    NearPairs,
    image_distances,
    near_hashes,
)

FLIPS = np.array([2**64 - 1, 2**64 - 1, 0, 0], np.uint64)  # mirrors an image


def random_hashes(count: int, seed: int = 0) -> Hashes:
    """Return unrelated hashes."""
    return np.random.default_rng(seed).integers(0, 2**64, (count, 4), dtype=np.uint64)


def changed(hashes: Hashes, bits: int, seed: int = 1) -> Hashes:
    """Return the hashes with this number of bits of each flipped."""
    rng, turned = np.random.default_rng(seed), hashes.copy()
    for row in turned:
        for bit in rng.choice(256, bits, replace=False).tolist():
            row[bit // 64] ^= np.uint64(1 << bit % 64)
    return turned


def all_pairs(hashes: Hashes, kind: ImageKind) -> list[tuple[int, int, int]]:
    """Return the near pairs by comparing each hash with each, sorted by the second hash."""
    bits = image_distances(hashes, hashes, mirrored=kind == "photos")
    return [(i, j, int(bits[i, j])) for j, i in np.argwhere(MAX_NEAR_BITS[kind] >= bits.T).tolist() if i < j]


def as_list(pairs: NearPairs) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in pairs), strict=True))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK_HASHES", 100)
    monkeypatch.setattr(near_duplicates, "TILE_HASHES", 300)


@pytest.mark.parametrize("kind", ["photos", "graphics"])
@pytest.mark.parametrize("seed", range(2))
def test_all_pairs_in_clusters_are_found(seed: int, kind: ImageKind) -> None:
    rng = np.random.default_rng(seed)
    centers = random_hashes(12, seed)
    hashes = np.concatenate(
        [changed(centers, int(bits), n) for n, bits in enumerate(rng.integers(0, 30, 60))]
    )
    hashes = rng.permutation(hashes)
    pairs = as_list(near_hashes(hashes, kind))
    assert pairs == all_pairs(hashes, kind)
    assert len(pairs) > 1000


@pytest.mark.parametrize("bits", [0, 8, 20, 48, 70])
def test_mirrored_photos_are_near_and_mirrored_graphics_are_not(bits: int) -> None:
    hashes = random_hashes(250)
    both = np.concatenate([hashes, changed(hashes, bits) ^ FLIPS])
    assert as_list(near_hashes(both, "photos")) == [(n, 250 + n, bits) for n in range(250)]
    assert as_list(near_hashes(both, "graphics")) == []


def test_each_of_many_similar_hashes_is_paired_with_the_best_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_NEIGHBORS", 8)
    copies = np.repeat(random_hashes(1, 7), 1000, axis=0)
    hashes = np.concatenate([copies, random_hashes(300), changed(random_hashes(300), 30)])
    near = near_hashes(hashes, "photos")
    pairs = set(zip(near.first.tolist(), near.second.tolist(), strict=True))
    assert {(1000 + n, 1300 + n) for n in range(300)} <= pairs
    assert {(n, m) for m in range(8, 1000) for n in range(8)} <= pairs
    assert len(pairs) == 300 + 28 + 8 * 992


@pytest.mark.parametrize("count", [0, 1, 2])
def test_search_finds_pairs_among_few_hashes(count: int) -> None:
    hashes = np.repeat(random_hashes(1), count, axis=0)
    assert as_list(near_hashes(hashes, "photos")) == ([(0, 1, 0)] if count == 2 else [])
