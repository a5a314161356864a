"""Near-duplicate images: choose which to keep, and group those that must be in the same split.

Images are compared by their PDQ hashes (images/decode.py). Photos at most 20 of 256 bits apart are copies of one photo; up to
70 bits, one may be a crop of the other, or have a frame: distinct photos are 88 or more apart (docs/experiments/real-text.md).
A mirrored photo is near, and no copy. Slides and charts are never rejected as copies: two that differ in one number look the
same, and a mirrored one is another.
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
MAX_COPY_BITS = 20  # recompressed, halved, brighter and gray copies are within (docs/experiments/curation.md)
MAX_NEAR_BITS: dict[str, int] = {"photos": 70, "graphics": 31}
# PDQ's bits say which of 16 x 16 coefficients of a cosine transform are above their median, which is near 0. Mirroring an image
# negates those of the odd columns, and so turns these bits: of 29 photos, at most 20 bits were other than that.
MIRRORED_BITS = np.uint64(0x5555_5555_5555_5555)
COMPARED_COLUMNS = ("sample_id", "split", "pdq_hashes", "width_px", "height_px")  # columns of samples that are compared
HASH_BITS = 256
BLOCK_HASHES = 256  # rows of one block of distances

NearPair = tuple[int, int, int]  # indices of two pages among those with a hash, and their distance in bits
Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row a page


def compare_samples(samples: pa.Table, kind: ImageKind) -> pa.Table:
    """Return the group of each sample, and the reason for its rejection, if any (tables.IMAGE_GROUPS).

    Among copies of a photo, the one in the most held-out split is kept, then the largest, then the first by id. A sample near
    a sample of a more held-out split is rejected, whatever its kind. The first id of a group is its name. `samples` has the
    columns COMPARED_COLUMNS.
    """
    ids, splits, hashes, widths, heights = (samples[name].to_pylist() for name in COMPARED_COLUMNS)
    near: dict[int, dict[int, int]] = defaultdict(dict)
    for a, b, bits in near_samples(hashes, kind):
        near[a][b] = near[b][a] = bits
    order = sorted(range(len(ids)), key=lambda n: (-SPLIT_RANK[splits[n]], -widths[n] * heights[n], ids[n]))
    reasons: list[str | None] = [None] * len(ids)
    near_duplicate_of: list[str | None] = [None] * len(ids)
    kept: set[int] = set()
    for n in order:
        kept_neighbors = sorted(near[n].keys() & kept, key=lambda neighbor: ids[neighbor]) if n in near else []
        rank = max(SPLIT_RANK[splits[n]], SPLIT_RANK["train"])
        more_held_out = [neighbor for neighbor in kept_neighbors if SPLIT_RANK[splits[neighbor]] > rank]
        copies = [neighbor for neighbor in kept_neighbors if kind == "photos" and near[n][neighbor] <= MAX_COPY_BITS]
        if more_held_out or copies:
            reasons[n] = "near_held_out_image" if more_held_out else "near_duplicate_image"
            near_duplicate_of[n] = ids[(more_held_out or copies)[0]]
        else:
            kept.add(n)
    return pa.table([ids, _groups(ids, near), reasons, near_duplicate_of], schema=IMAGE_GROUPS)


def near_samples(pdq_hashes: Sequence[Sequence[bytes]], kind: ImageKind) -> Iterator[tuple[int, int, int]]:
    """Yield (index, index, bits apart) of near samples: near images, or decks of which half the pages have a near page.

    The bits of two decks are those of the median page. An empty hash is near no other hash.
    """
    owned = [(n, pdq_hash) for n, sample_hashes in enumerate(pdq_hashes) for pdq_hash in sample_hashes if pdq_hash]
    hashes = as_hashes([pdq_hash for _, pdq_hash in owned])
    pages = [len(of_sample) for of_sample in pdq_hashes]
    closest: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = defaultdict(lambda: ({}, {}))
    for p, q, bits in near_hashes(hashes, kind):
        a, b = owned[p][0], owned[q][0]
        if a != b:
            for of_sample, page in zip(closest[a, b], (p, q), strict=True):
                of_sample[page] = min(bits, of_sample.get(page, bits))
    for (a, b), sides in closest.items():
        if 2 * min(map(len, sides)) >= min(pages[a], pages[b]):
            distances = sorted([*sides[0].values(), *sides[1].values()])
            yield a, b, distances[len(distances) // 2]


def near_hashes(hashes: Hashes, kind: ImageKind) -> Iterator[NearPair]:
    """Yield (row, later row, bits apart) of all hashes that are near. All cores compare all pairs."""

    def compare_block(start: int) -> list[NearPair]:
        distances = image_distances(hashes[start : start + BLOCK_HASHES], hashes[start:], kind)
        pairs = np.argwhere(distances <= MAX_NEAR_BITS[kind]).tolist()
        return [(start + i, start + j, int(distances[i, j])) for i, j in pairs if j > i]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for pairs in pool.map(compare_block, range(0, len(hashes), BLOCK_HASHES)):
            yield from pairs


def image_distances(rows: Hashes, columns: Hashes, kind: ImageKind) -> npt.NDArray[np.uint16]:
    """Return the bits apart of each pair, [len(rows), len(columns)]; of photos, of their mirror images where that is less.

    A mirrored photo is never a copy: it is more than MAX_COPY_BITS apart.
    """
    if kind != "photos":
        return hamming_distances(rows, columns)
    turned = hamming_distances(rows & MIRRORED_BITS, columns & MIRRORED_BITS)
    others = hamming_distances(rows & ~MIRRORED_BITS, columns & ~MIRRORED_BITS)
    mirrored = others + (HASH_BITS // 2 - turned)
    distances: npt.NDArray[np.uint16] = np.minimum(others + turned, np.maximum(mirrored, MAX_COPY_BITS + 1))
    return distances


def hamming_distances(rows: Hashes, columns: Hashes) -> npt.NDArray[np.uint16]:
    """Return the number of differing bits of each pair, [len(rows), len(columns)]."""
    distances = np.zeros((len(rows), len(columns)), np.uint16)
    for word in range(rows.shape[1]):
        distances += np.bitwise_count(rows[:, word, None] ^ columns[None, :, word])
    return distances


def as_hashes(pdq_hashes: Sequence[bytes]) -> Hashes:
    """Return PDQ hashes, none of them empty, as rows of four 64-bit words, [P, 4]."""
    return np.frombuffer(b"".join(pdq_hashes), dtype=np.uint64).reshape(-1, 4)


def _groups(ids: list[str], near: dict[int, dict[int, int]]) -> list[str]:
    """Return the group name of each sample; groups are the connected components of near samples."""
    names, visited = list(ids), set[int]()
    for first in sorted(near, key=lambda n: ids[n]):
        pending = [first]
        while pending:
            n = pending.pop()
            if n not in visited:
                visited.add(n)
                names[n] = ids[first]
                pending += near[n]
    return names
