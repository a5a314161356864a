"""Near pairs among many hashes: recall of the search, compared with exhaustive comparison."""

import numpy as np
import pytest

from pipeline.images import near_duplicates
from pipeline.images.near_duplicates import (
    MAX_COPY_BITS,
    MIRRORED_BITS,
    Hashes,
    NearPairs,
    find_near_pairs,
    image_distances,
)

COUNT = 5000
PAIRS = 1500  # pairs per distance


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


def exhaustive_pairs(hashes: Hashes, max_bits: int, *, mirrored: bool) -> list[tuple[int, int, int]]:
    """Return the near pairs by exhaustive comparison."""
    distances = image_distances(hashes, hashes, mirrored=mirrored)
    return [(i, j, int(distances[i, j])) for i, j in np.argwhere(distances <= max_bits).tolist() if i < j]


def as_list(pairs: NearPairs) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in pairs), strict=True))


@pytest.fixture(autouse=True)
def parts_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "PART_ROWS", 1024)


@pytest.mark.parametrize(("bits", "least"), [(0, 1.0), (8, 1.0), (20, 1.0), (48, 0.999), (64, 0.99)])
@pytest.mark.parametrize("turned_bits", [np.uint64(0), MIRRORED_BITS], ids=["copies", "mirrored copies"])
def test_recall_of_pairs_reaches_the_stated_probability(
    bits: int, least: float, turned_bits: np.uint64
) -> None:
    hashes = random_hashes(COUNT)
    near = changed(hashes[:PAIRS], bits) ^ turned_bits
    pairs = as_list(find_near_pairs(np.concatenate([hashes, near]), 70, 64, mirrored=True))
    apart = max(bits, MAX_COPY_BITS + 1) if turned_bits else bits
    planted = {(n, COUNT + n, apart) for n in range(PAIRS)}
    assert set(pairs) <= planted
    assert len(pairs) >= least * PAIRS


@pytest.mark.parametrize("kind", ["photos", "graphics"])
@pytest.mark.parametrize("seed", range(2))
def test_nearly_all_pairs_in_clusters_are_found(seed: int, kind: str) -> None:
    mirrored = kind == "photos"
    rng = np.random.default_rng(seed)
    centers = random_hashes(12, seed)
    hashes = np.concatenate(
        [changed(centers, int(bits), n) for n, bits in enumerate(rng.integers(0, 30, 60))]
    )
    hashes = rng.permutation(hashes)
    pairs = set(as_list(find_near_pairs(hashes, 64, 64, mirrored=mirrored)))
    all_pairs = set(exhaustive_pairs(hashes, 64, mirrored=mirrored))
    assert pairs <= all_pairs
    assert len(all_pairs) == 21_240
    assert [bits for *_, bits in all_pairs - pairs if bits <= 48] == []
    assert len(all_pairs - pairs) <= 2


def test_mirrored_graphics_are_not_near() -> None:
    hashes = random_hashes(50)
    both = np.concatenate([hashes, hashes ^ MIRRORED_BITS])
    assert as_list(find_near_pairs(both, 70, 64, mirrored=False)) == []


def test_thousands_of_equal_hashes_do_not_hide_other_near_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_NEIGHBORS", 8)
    one = random_hashes(1, 7)
    copies = np.repeat(one, 3000, axis=0)
    hashes = np.concatenate([copies, random_hashes(2000), changed(random_hashes(300), 30)])
    near = find_near_pairs(hashes, 70, 64, mirrored=True)
    pairs = set(zip(near.first.tolist(), near.second.tolist(), strict=True))
    assert {(3000 + n, 5000 + n) for n in range(300)} <= pairs
    assert {(n, n + 1) for n in range(2999)} <= pairs  # each copy is linked to the next


def test_search_is_deterministic() -> None:
    hashes = np.concatenate([random_hashes(2000), changed(random_hashes(2000), 70)])
    first, second = (find_near_pairs(hashes, 70, 64, mirrored=True) for _ in range(2))
    assert as_list(first) == as_list(second) != []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_search_finds_pairs_among_few_hashes(count: int) -> None:
    hashes = np.repeat(random_hashes(1), count, axis=0)
    assert as_list(find_near_pairs(hashes, 70, 64, mirrored=True)) == ([(0, 1, 0)] if count == 2 else [])
