"""Near-duplicate images: which of them stays, and which belong together when samples are split.

Images are compared by their PDQ hashes (images/decode.py). Photos at most 20 of 256 bits apart are one photo, stored twice; up
to 48 bits, one may be a crop of the other. Slides and charts are never rejected by their hash: with one number changed they
look the same.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.tables import IMAGE_GROUPS, SPLIT_RANK

ImageKind = Literal["photos", "graphics"]
SAME_BITS = 20  # a worse JPEG, half the size, brighter, gray: all are within (docs/experiments/curation.md)
NEAR_BITS: dict[str, int] = {"photos": 48, "graphics": 31}  # different slides of one template are 42 apart or more
COMPARED = ("sample_id", "split", "pdq_hashes", "width_px", "height_px")  # columns of samples that decide
BLOCK_HASHES = 256  # compared with all others at once

Near = tuple[int, int, int]  # two pages, by their position among all that have a hash, and how many bits they are apart
Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row a page


def compare_samples(samples: pa.Table, kind: ImageKind) -> pa.Table:
    """Return the group of each sample, and why it is to go if it is (tables.IMAGE_GROUPS).

    Of photos that are the same, the one in the most held-out split stays, then the largest, then the first by id. A sample near
    one of a more held-out split goes, whatever its kind. A group is named by the first of its ids.

    Args:
        samples: with the columns `COMPARED`.
        kind: what the images are.
    """
    ids, splits, hashes, widths, heights = (samples[name].to_pylist() for name in COMPARED)
    near: dict[int, dict[int, int]] = defaultdict(dict)
    for a, b, bits in near_samples(hashes, kind):
        near[a][b] = near[b][a] = bits
    order = sorted(range(len(ids)), key=lambda n: (-SPLIT_RANK[splits[n]], -widths[n] * heights[n], ids[n]))
    reasons: list[str | None] = [None] * len(ids)
    near_duplicate_of: list[str | None] = [None] * len(ids)
    stayed: set[int] = set()
    for n in order:
        before = sorted(near[n].keys() & stayed, key=lambda other: ids[other]) if n in near else []
        more_held_out = [
            other for other in before if SPLIT_RANK[splits[other]] > max(SPLIT_RANK[splits[n]], SPLIT_RANK["train"])
        ]
        same = [other for other in before if kind == "photos" and near[n][other] <= SAME_BITS]
        if more_held_out or same:
            reasons[n] = "near_held_out_image" if more_held_out else "near_duplicate_image"
            near_duplicate_of[n] = ids[(more_held_out or same)[0]]
        else:
            stayed.add(n)
    return pa.table([ids, _groups(ids, near), reasons, near_duplicate_of], schema=IMAGE_GROUPS)


def near_samples(pdq_hashes: Sequence[Sequence[bytes]], kind: ImageKind) -> Iterator[tuple[int, int, int]]:
    """Yield (sample, sample, bits apart), by position: images that are near, or decks of which half the pages have a near one.

    Of decks, the bits are those of the median page. A hash that is empty is near nothing.
    """
    owners, hashes = flatten_hashes(pdq_hashes)
    pages = [len(of_sample) for of_sample in pdq_hashes]
    closest: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = defaultdict(lambda: ({}, {}))
    for p, q, bits in near_hashes(hashes, NEAR_BITS[kind]):
        a, b = owners[p], owners[q]
        if a != b:
            for of_sample, page in zip(closest[a, b], (p, q), strict=True):
                of_sample[page] = min(bits, of_sample.get(page, bits))
    for (a, b), sides in closest.items():
        if 2 * min(map(len, sides)) >= min(pages[a], pages[b]):
            distances = sorted([*sides[0].values(), *sides[1].values()])
            yield a, b, distances[len(distances) // 2]


def near_hashes(hashes: Hashes, most_bits: int) -> Iterator[Near]:
    """Yield (row, later row, bits apart) of all hashes at most so far apart: every pair is compared, by all cores."""

    def compare_block(start: int) -> list[Near]:
        distances = hamming_distances(hashes[start : start + BLOCK_HASHES], hashes[start:])
        pairs = np.argwhere(distances <= most_bits).tolist()
        return [(start + i, start + j, int(distances[i, j])) for i, j in pairs if j > i]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for pairs in pool.map(compare_block, range(0, len(hashes), BLOCK_HASHES)):
            yield from pairs


def hamming_distances(some: Hashes, others: Hashes) -> npt.NDArray[np.uint16]:
    """Return how many bits differ, [len(some), len(others)]."""
    distances = np.zeros((len(some), len(others)), np.uint16)
    for word in range(some.shape[1]):
        distances += np.bitwise_count(some[:, word, None] ^ others[None, :, word])
    return distances


def as_hashes(pdq_hashes: Sequence[bytes]) -> Hashes:
    """Return hashes, none of them empty, as rows that can be compared."""
    return np.frombuffer(b"".join(pdq_hashes), dtype=np.uint64).reshape(-1, 4)


def flatten_hashes(pdq_hashes: Sequence[Sequence[bytes]]) -> tuple[list[int], Hashes]:
    """Return the hash of each page that has one, and before it the position of its sample."""
    owned = [(n, pdq_hash) for n, of_sample in enumerate(pdq_hashes) for pdq_hash in of_sample if pdq_hash]
    return [n for n, _ in owned], as_hashes([pdq_hash for _, pdq_hash in owned])


def _groups(ids: list[str], near: dict[int, dict[int, int]]) -> list[str]:
    """Return the name of each sample's group: whatever is near it, and near that, and so on."""
    names, done = list(ids), set[int]()
    for first in sorted(near, key=lambda n: ids[n]):
        waiting = [first]
        while waiting:
            n = waiting.pop()
            if n not in done:
                done.add(n)
                names[n] = ids[first]
                waiting += near[n]
    return names
