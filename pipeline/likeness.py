"""Images that look the same, or nearly: which one of them stays, and which belong together when a split is made.

Images are compared by their PDQ hashes (image.look_of). Photos that are 20 bits of 256 apart are one photo, stored twice; up to
48 bits, one may be a crop of the other. Slides and charts never go for a hash: with one number changed they look the same.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.tables import LIKENESS, SPLIT_RANK

Kind = Literal["photos", "graphics"]
SAME_BITS = 20  # a worse JPEG, half the size, brighter, gray: all are within (docs/experiments/curation.md)
NEAR_BITS: dict[str, int] = {"photos": 48, "graphics": 31}  # different slides of one template are 42 apart or more
COMPARED = ("sample_id", "split", "looks", "width_px", "height_px")  # columns of samples that decide
BLOCK = 256  # hashes compared with all others at once

Near = tuple[int, int, int]  # two pages, by their position among all that have a hash, and the bits that they are apart
Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row a page


def compare_samples(samples: pa.Table, kind: Kind | None, near_pages: Iterable[Near] | None = None) -> pa.Table:
    """Return the group of each sample, and why it is to go if it is (tables.LIKENESS).

    Of photos that are the same, the one in the most held-out split stays, then the largest, then the first by id. A sample that
    is near one of a more held-out split goes, of whatever kind it is. A group is named by the first of its ids.

    Args:
        samples: with the columns `COMPARED`.
        kind: what the images are; None: they are known to be distinct, and nothing is compared.
        near_pages: what `near_hashes` yields for all pages, where that is known already.
    """
    ids, splits, looks, widths, heights = (samples[name].to_pylist() for name in COMPARED)
    near: dict[int, dict[int, int]] = defaultdict(dict)
    for a, b, bits in near_samples(looks, kind, near_pages) if kind else ():
        near[a][b] = near[b][a] = bits
    order = sorted(range(len(ids)), key=lambda n: (-SPLIT_RANK[splits[n]], -widths[n] * heights[n], ids[n]))
    reasons: list[str | None] = [None] * len(ids)
    like: list[str | None] = [None] * len(ids)
    stayed: set[int] = set()
    for n in order:
        before = sorted(near[n].keys() & stayed, key=lambda other: ids[other]) if n in near else []
        more_held_out = [
            other for other in before if SPLIT_RANK[splits[other]] > max(SPLIT_RANK[splits[n]], SPLIT_RANK["train"])
        ]
        same = [other for other in before if kind == "photos" and near[n][other] <= SAME_BITS]
        if more_held_out or same:
            reasons[n] = "near_held_out_image" if more_held_out else "near_duplicate_image"
            like[n] = ids[(more_held_out or same)[0]]
        else:
            stayed.add(n)
    columns = {"sample_id": ids, "image_group": _groups(ids, near), "image_reason": reasons, "looks_like": like}
    return pa.table(columns, schema=LIKENESS)


def near_samples(
    looks: Sequence[Sequence[bytes]], kind: Kind, near_pages: Iterable[Near] | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yield (sample, sample, bits apart), by position: images that are near, or decks of which half the pages have a near one.

    Where half of the pages count, so do the bits of the median page. A hash that is empty is near nothing.
    """
    owners, hashes = hashes_of(looks)
    pages = [len(each) for each in looks]
    near_pages = near_hashes(hashes, NEAR_BITS[kind]) if near_pages is None else near_pages
    found: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = defaultdict(lambda: ({}, {}))
    for p, q, bits in near_pages:
        a, b = owners[p], owners[q]
        if a != b:
            for closest, page in zip(found[a, b], (p, q), strict=True):
                closest[page] = min(bits, closest.get(page, bits))
    for (a, b), sides in found.items():
        if 2 * min(map(len, sides)) >= min(pages[a], pages[b]):
            apart = sorted([*sides[0].values(), *sides[1].values()])
            yield a, b, apart[len(apart) // 2]


def near_hashes(hashes: Hashes, most_bits: int, first: int = 0, step: int = 1) -> Iterator[Near]:
    """Yield (row, later row, bits apart) of all hashes that are at most so far apart: each pair is looked at.

    With `first` and `step`, only every so many blocks of rows are compared with those behind them, for others do the rest.
    """
    for start in range(first * BLOCK, len(hashes), step * BLOCK):
        block = hashes[start : start + BLOCK]
        bits = bits_apart(block, hashes[start:])
        for i, j in np.argwhere(bits <= most_bits).tolist():
            if j > i:
                yield start + i, start + j, int(bits[i, j])


def bits_apart(some: Hashes, others: Hashes) -> npt.NDArray[np.uint16]:
    """Return how many bits differ, [len(some), len(others)]."""
    apart = np.zeros((len(some), len(others)), np.uint16)
    for word in range(some.shape[1]):
        apart += np.bitwise_count(some[:, word, None] ^ others[None, :, word])
    return apart


def as_hashes(looks: Sequence[bytes]) -> Hashes:
    """Return looks, none of them empty, as rows that can be compared."""
    return np.frombuffer(b"".join(looks), dtype=np.uint64).reshape(-1, 4)


def hashes_of(looks: Sequence[Sequence[bytes]]) -> tuple[list[int], Hashes]:
    """Return the hash of each page that has one, and before it the sample that each is of."""
    told = [(n, look) for n, each in enumerate(looks) for look in each if look]
    return [n for n, _ in told], as_hashes([look for _, look in told])


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
