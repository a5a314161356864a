"""Near-duplicate images: choose which to keep, and group images that must be in the same split.

Images are compared by their 256-bit PDQ hashes. Photos at most 24 bits apart are copies of one photo. If they
are up to 70 bits apart, one may be a crop of the other (docs/measurements.md). Slides and charts are never
rejected as copies, because two charts that differ in one number look the same.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables import IMAGE_GROUPS, SPLIT_RANK
from pipeline.types import ImageKind

HASH_BITS = 256
WORDS = HASH_BITS // 64
MAX_COPY_BITS = 24  # also for recompressed, halved, brightened, gray and mirrored copies
# A PDQ bit states whether one of 16 x 16 DCT coefficients is above their median, which is near 0. Mirroring
# an image negates the coefficients in odd columns, which flips their bits. In each of 29 photos, at most
# 22 bits broke this rule, also after JPEG of quality 75 and at half size. Rows of hashes hold the flipped
# bits in their first two words.
MIRRORED_WORDS = 2
BIT_ORDER = [*range(1, HASH_BITS, 2), *range(0, HASH_BITS, 2)]

MAX_NEAR_BITS: dict[str, int] = {"photos": 70, "graphics": 31}
BLOCK_HASHES, TILE_HASHES = 256, 512  # each hash of a block is compared with each hash of a tile
MAX_NEIGHBORS = 128

Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row per page
Bits = npt.NDArray[np.uint16]
Rows = npt.NDArray[np.int64]

LOOK_ALIKE_ADVICE = {
    "near_duplicate_image": "set dedupe.images: graphics for slides and charts, or none to keep all images",
    "near_held_out_image": "to keep similar images, set dedupe.images: none",
}
COMPARED_COLUMNS = ("sample_id", "split", "pdq_hashes", "width_px", "height_px")


# --- pairs of hashes


class NearPairs(NamedTuple):
    """Pairs of near rows. `bits` are their distances."""

    first: Rows
    second: Rows
    bits: Bits


def as_hashes(pdq_hashes: Sequence[bytes]) -> Hashes:
    """Return non-empty PDQ hashes as rows of four 64-bit words, [P, 4], with their bits in BIT_ORDER."""
    bits = np.unpackbits(np.frombuffer(b"".join(pdq_hashes), np.uint8).reshape(-1, HASH_BITS // 8), axis=1)
    return np.ascontiguousarray(np.packbits(bits[:, BIT_ORDER], axis=1)).view(np.uint64)


def image_distances(rows: Hashes, columns: Hashes, *, mirrored: bool) -> Bits:
    """Return the distance in bits between each row and each column, [len(rows), len(columns)].

    With `mirrored`, the distance to the mirrored image is returned if it is smaller.
    """
    flipped, others = np.zeros((2, len(rows), len(columns)), np.uint8)
    for word in range(WORDS):
        part = flipped if word < MIRRORED_WORDS else others
        part += np.bitwise_count(rows[:, word, None] ^ columns[None, :, word])
    if mirrored:
        flipped = np.minimum(flipped, np.uint8(HASH_BITS // 2) - flipped)
    return np.add(flipped, others, dtype=np.uint16)


def near_hashes(hashes: Hashes, kind: ImageKind, is_page: npt.NDArray[np.bool_]) -> NearPairs:
    """Return the pairs of near-duplicate hashes. Rows must be sorted from the best image to the worst.

    Each hash is paired with at most MAX_NEIGHBORS better hashes, to limit the memory. Pairs with a page of a
    document (`is_page`) are all returned, because documents are near if they share enough pages.
    """

    def compare(start: int) -> NearPairs:
        block = hashes[start : start + BLOCK_HASHES]
        tiles = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint16))]
        for tile in range(0, start + len(block), TILE_HASHES):
            bits = image_distances(hashes[tile : tile + TILE_HASHES], block, mirrored=kind == "photos")
            first, second = np.nonzero(bits <= MAX_NEAR_BITS[kind])
            is_better = tile + first < start + second
            first, second = first[is_better], second[is_better]
            tiles.append((tile + first, start + second, bits[first, second]))
        first, second, bits = (np.concatenate(parts) for parts in zip(*tiles, strict=True))
        order = np.lexsort((first, second))
        rank = np.arange(len(order)) - np.searchsorted(second[order], second[order])
        order = order[(rank < MAX_NEIGHBORS) | is_page[first[order]] | is_page[second[order]]]
        return NearPairs(first[order], second[order], bits[order])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        blocks = list(pool.map(compare, range(0, max(len(hashes), 1), BLOCK_HASHES)))
    return NearPairs(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


# --- images


def compare_samples(samples: pa.Table, kind: ImageKind) -> pa.Table:
    """Return each sample's group, and the reason if it is rejected (tables.IMAGE_GROUPS, sorted by id).

    Of the copies of a photo, the one in the last split (train, validation, test) is kept, or the largest of
    several in that split. Samples near a held-out sample in a later split are rejected too. `samples` has
    the columns COMPARED_COLUMNS.
    """
    samples = samples.sort_by("sample_id")
    ids = samples["sample_id"].combine_chunks()
    ranks = np.array([SPLIT_RANK[split] for split in samples["split"].to_pylist()], np.int64)
    width_px, height_px = (samples[name].cast(pa.int64()) for name in ("width_px", "height_px"))
    pixels = pc.multiply(width_px, height_px).to_numpy()
    best_first = np.lexsort((-pixels, -ranks))
    near = find_near_samples(samples["pdq_hashes"].combine_chunks(), kind, best_first)
    kept_instead = _choose(near, ranks, best_first, kind)
    is_kept = kept_instead < 0
    is_held_out = ~is_kept & (ranks[kept_instead] > np.maximum(ranks, SPLIT_RANK["train"]))
    reasons = pc.if_else(pa.array(is_held_out), "near_held_out_image", "near_duplicate_image")
    reasons = pc.if_else(pa.array(is_kept), None, reasons)
    groups, instead = ids.take(pa.array(_group_names(near, len(ids)))), pa.array(kept_instead, mask=is_kept)
    return pa.table([ids, groups, reasons, ids.take(instead)], schema=IMAGE_GROUPS)


def _choose(near: NearPairs, ranks: Rows, best_first: Rows, kind: ImageKind) -> Rows:
    """Return, for each sample, the index of the sample that is kept instead, or -1 if it is kept itself."""
    samples = np.concatenate([near.first, near.second])
    order = np.argsort(samples, kind="stable")
    neighbors, bits = np.concatenate([near.second, near.first])[order], np.tile(near.bits, 2)[order]
    bounds = np.r_[0, np.cumsum(np.bincount(samples, minlength=len(ranks)))]
    kept_instead, is_kept = np.full(len(ranks), -1), np.diff(bounds) == 0
    for sample in best_first[~is_kept[best_first]]:
        pairs = slice(bounds[sample], bounds[sample + 1])
        kept = is_kept[neighbors[pairs]]
        is_held_out = ranks[neighbors[pairs]] > max(ranks[sample], SPLIT_RANK["train"])
        chosen = neighbors[pairs][kept & is_held_out]
        if not len(chosen) and kind == "photos":
            chosen = neighbors[pairs][kept & (bits[pairs] <= MAX_COPY_BITS)]
        is_kept[sample] = not len(chosen)
        kept_instead[sample] = chosen.min(initial=len(ranks)) if len(chosen) else -1
    return kept_instead


def _group_names(near: NearPairs, count: int) -> Rows:
    """Return the first sample of each sample's group. A group is a connected component of near samples."""
    first = np.arange(count)
    while True:
        lower = np.minimum(first[near.first], first[near.second])
        if np.array_equal(first[near.first], lower) and np.array_equal(first[near.second], lower):
            return first
        np.minimum.at(first, near.first, lower)
        np.minimum.at(first, near.second, lower)
        first = first[first]


def find_near_samples(pdq_hashes: pa.ListArray, kind: ImageKind, best_first: Rows) -> NearPairs:
    """Return the pairs of near-duplicate samples.

    Documents are near-duplicates if they share at least half of the pages of the smaller one. Their distance
    is the mean distance of the shared pages. An empty hash is near no other hash.
    """
    owners = pc.list_parent_indices(pdq_hashes).to_numpy().astype(np.int64)
    values = pdq_hashes.flatten()
    has_detail = pc.greater(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    hashes, owners = as_hashes(values.filter(pa.array(has_detail)).to_pylist()), owners[has_detail]
    best_pages_first = np.argsort(np.argsort(best_first)[owners], kind="stable")
    num_pages = pc.list_value_length(pdq_hashes).to_numpy(zero_copy_only=False)
    owners = owners[best_pages_first]
    near = near_hashes(hashes[best_pages_first], kind, num_pages[owners] > 1)
    first, second = owners[near.first], owners[near.second]
    is_single = (num_pages[first] == 1) & (num_pages[second] == 1)
    image_pairs = NearPairs(first[is_single], second[is_single], near.bits[is_single])
    is_deck = ~is_single & (first != second)
    deck_pairs = _near_decks(NearPairs(*(part[is_deck] for part in near)), owners, num_pages)
    return NearPairs(*(np.concatenate(parts) for parts in zip(*[image_pairs, deck_pairs], strict=True)))


def _near_decks(near: NearPairs, owners: Rows, num_pages: Rows) -> NearPairs:
    """Return the near-duplicate documents (decks) from pairs of near pages. `owners` has each page's deck."""
    decks, pair_of = np.unique(owners[near.first] * len(num_pages) + owners[near.second], return_inverse=True)
    first, second = decks // len(num_pages), decks % len(num_pages)
    # For each deck of a pair, count the pages near a page of the other deck, and sum their smallest
    # distances.
    num_shared, total_bits = np.zeros((2, len(decks)), np.int64), np.zeros(len(decks))
    for deck, pages in enumerate((near.first, near.second)):
        shared, index = np.unique(pair_of * len(owners) + pages, return_inverse=True)
        closest = np.full(len(shared), HASH_BITS, np.uint16)
        np.minimum.at(closest, index, near.bits)
        num_shared[deck] = np.bincount(shared // len(owners), minlength=len(decks))
        total_bits += np.bincount(shared // len(owners), closest, len(decks))
    is_near = 2 * num_shared.min(axis=0) >= np.minimum(num_pages[first], num_pages[second])
    bits = total_bits // num_shared.sum(axis=0)
    return NearPairs(first[is_near], second[is_near], bits[is_near].astype(np.uint16))
