"""Near-duplicate images: choose which to keep, and group images that must be in the same split.

Images are compared by their 256-bit PDQ hashes (images/decode.py). Photos at most 20 bits apart are copies of
one photo. Up to 70 bits, one may be a crop of the other, or have a frame. Distinct photos are 88 or more bits
apart (docs/measurements.md). A mirrored photo is near, but not a copy. Slides and charts are never rejected
as copies, because two charts that differ in one number look the same.

Large sets are searched by bit sampling (Indyk and Motwani, 1998). Two hashes that differ in d of 256 bits
agree in k random bits with a probability of about (1 - d / 256)^k, and unrelated hashes with 2^-k. Each round
draws k bits, sorts the hashes by these bits, and compares hashes that agree in all of them.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables import IMAGE_GROUPS, SPLIT_RANK

HASH_BITS = 256
WORD_BITS = 64
WORDS = HASH_BITS // WORD_BITS
# Recompressed, halved, brightened and gray copies are at most this far apart (docs/measurements.md).
MAX_COPY_BITS = 20
# A PDQ bit states whether one of 16 x 16 DCT coefficients is above their median, which is near 0. Mirroring
# an image negates the coefficients in odd columns, which flips their bits. In each of 29 photos, at most
# 20 bits broke this rule.
MIRRORED_BITS = np.uint64(0x5555_5555_5555_5555)

ImageKind = Literal["photos", "graphics"]
MAX_NEAR_BITS: dict[str, int] = {"photos": 70, "graphics": 31}
# Pairs at most this far apart are found with a probability of at least RECALL in sets of any size.
RECALL_BITS = {"photos": 64, "graphics": 31}
RECALL = 0.995
# Sets up to this size are compared exhaustively, in blocks of BLOCK_HASHES rows.
ALL_PAIRS_HASHES = 20_000
BLOCK_HASHES = 256
# Average number of unrelated hashes that each hash is compared with in a round.
COMPARED_HASHES = 6.0
# If more than MAX_NEIGHBORS hashes agree, each one is compared only with the next MAX_NEIGHBORS and the first
# GROUP_HEADS hashes.
MAX_NEIGHBORS = 256
GROUP_HEADS = 16
PART_ROWS = 1 << 16
# Pairs from several rounds are merged when there are more than twice this many.
MERGED_PAIRS = 4_000_000
# Odd numbers that spread the bits of a word over the upper half of the product (multiply-shift hashing,
# Dietzfelbinger 1996).
FACTORS = np.random.default_rng(0).integers(0, 1 << 63, WORDS, np.uint64) << np.uint64(1) | np.uint64(1)

Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row per page
Bits = npt.NDArray[np.uint8 | np.uint16]
Words = npt.NDArray[np.uint64]  # [N]
Rows = npt.NDArray[np.int64]

LOOK_ALIKE_ADVICE = {  # reason -> setting to change if too many rows are rejected
    "near_duplicate_image": "for slides or charts, set dedupe.images: graphics (none keeps all images)",
    "near_held_out_image": "to keep similar images, set dedupe.images: none",
}
COMPARED_COLUMNS = ("sample_id", "split", "pdq_hashes", "width_px", "height_px")


# --- pairs of hashes


class NearPairs(NamedTuple):
    """Distinct, sorted pairs of near rows, with `first` < `second`. `bits` are their distances."""

    first: Rows
    second: Rows
    bits: Bits


def plan_search(count: int, recall_bits: int) -> tuple[int, int]:
    """Return (rounds, bits per round) to find pairs `recall_bits` apart with a probability of RECALL."""
    num_bits = max(2, round(math.log2(max(count, 2) / COMPARED_HASHES)) + 1)
    agreement = math.prod((HASH_BITS - recall_bits - n) / (HASH_BITS - n) for n in range(num_bits))
    return math.ceil(math.log(1 - RECALL) / math.log1p(-agreement)), num_bits


def find_near_pairs(hashes: Hashes, max_bits: int, recall_bits: int, *, mirrored: bool) -> NearPairs:
    """Return nearly all pairs of hashes that are at most `max_bits` apart. The result is deterministic.

    A pair at most `recall_bits` apart is found with a probability of at least RECALL. In a group of more than
    MAX_NEIGHBORS similar hashes, this holds only for the pairs with the first hashes.
    """
    rounds, num_bits = plan_search(len(hashes), recall_bits)
    search = partial(find_in_round, hashes, num_bits, max_bits, mirrored=mirrored)
    pending = [np.zeros(0, np.uint64)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for pairs in pool.map(search, range(rounds)):
            pending.append(pairs)
            if sum(map(len, pending)) > 2 * max(len(pending[0]), MERGED_PAIRS):
                pending = [np.unique(np.concatenate(pending))]
    first, second = _unpack(np.unique(np.concatenate(pending)))
    bits: list[Bits] = [np.zeros(0, np.uint16)]
    for start in range(0, len(first), PART_ROWS):
        part = slice(start, start + PART_ROWS)
        bits.append(row_distances(hashes[first[part]], hashes[second[part]], mirrored=mirrored))
    return NearPairs(first, second, np.concatenate(bits))


def find_in_round(hashes: Hashes, num_bits: int, max_bits: int, number: int, *, mirrored: bool) -> Words:
    """Return the near pairs that agree in the bits drawn for a round, packed as row << 32 | later row."""
    drawn_bits = np.random.default_rng(number).permutation(HASH_BITS).tolist()
    flips = np.zeros(len(hashes), np.uint64)
    if mirrored:
        # An image and its mirror image differ in this bit. The one that has a 0 represents both.
        flipped_bit = next(bit for bit in drawn_bits if int(MIRRORED_BITS) >> bit % WORD_BITS & 1)
        drawn_bits = [flipped_bit, *(bit for bit in drawn_bits if bit != flipped_bit)]
        is_flipped = hashes[:, flipped_bit // WORD_BITS] >> np.uint64(flipped_bit % WORD_BITS) & np.uint64(1)
        flips = (np.uint64(0) - is_flipped) & MIRRORED_BITS
    masks = _masks(drawn_bits[:num_bits])

    def canonical(rows: Rows | slice) -> Hashes:
        return hashes[rows] ^ flips[rows, None]

    starts = range(0, len(hashes), PART_ROWS)
    keys = np.zeros(len(hashes), np.uint64)
    for start in starts:
        keys[start : start + PART_ROWS] = _keys(canonical(slice(start, start + PART_ROWS)), masks)
    # Pack each 32-bit key with its row index, so that both are sorted together.
    keys = keys << np.uint64(32) | np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    sorted_keys, rows = _unpack(keys)
    near = [np.zeros(0, np.uint64)]
    for start in starts:
        part = slice(start, start + PART_ROWS + MAX_NEIGHBORS)
        first, second = _near_neighbors(canonical(rows[part]), sorted_keys[part], max_bits)
        near.append(_pack(rows[start + first], rows[start + second]))
    for heads, members in _large_groups(sorted_keys):
        distances = row_distances(canonical(rows[heads]), canonical(rows[members]), mirrored=False)
        near.append(_pack(rows[heads], rows[members])[distances <= max_bits])
    return np.unique(np.concatenate(near))


def _masks(bits: Sequence[int]) -> list[np.uint64]:
    """Return one mask per 64-bit word of a hash. `bits` are the indices (0 to 255) of the bits to set."""
    masks = [0] * WORDS
    for bit in bits:
        masks[bit // WORD_BITS] |= 1 << bit % WORD_BITS
    return [np.uint64(mask) for mask in masks]


def _keys(hashes: Hashes, masks: Sequence[np.uint64]) -> Words:
    """Return 32-bit keys of the masked bits. Different bits get equal keys with a probability of 2^-32."""
    keys = np.zeros(len(hashes), np.uint64)
    for word, mask, factor in zip(hashes.T, masks, FACTORS, strict=True):
        keys += (word & mask) * factor
    return keys >> np.uint64(32)


def _pack(rows: Rows, others: Rows) -> Words:
    first, second = np.minimum(rows, others).astype(np.uint64), np.maximum(rows, others).astype(np.uint64)
    return first << np.uint64(32) | second


def _unpack(words: Words) -> tuple[Rows, Rows]:
    return (words >> np.uint64(32)).astype(np.int64), (words & np.uint64(0xFFFF_FFFF)).astype(np.int64)


def _near_neighbors(hashes: Hashes, keys: Rows, max_bits: int) -> tuple[Rows, Rows]:
    """Return the positions of pairs of near hashes with equal keys. `keys` must be sorted."""
    first_parts, second_parts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    first = np.arange(min(len(keys), PART_ROWS))
    for step in range(1, MAX_NEIGHBORS + 1):
        first = first[: np.searchsorted(first, len(keys) - step)]
        first = first[keys[first] == keys[first + step]]
        if not len(first):
            break
        near = first[row_distances(hashes[first], hashes[first + step], mirrored=False) <= max_bits]
        first_parts.append(near)
        second_parts.append(near + step)
    return np.concatenate(first_parts), np.concatenate(second_parts)


def _large_groups(keys: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Yield positions of pairs in large groups: a first hash, and a member over MAX_NEIGHBORS later."""
    if not np.any(keys[MAX_NEIGHBORS + 1 :] == keys[: -MAX_NEIGHBORS - 1]):
        return
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    start_of_row = np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    for head in range(GROUP_HEADS):
        members = np.flatnonzero(np.arange(len(keys)) - start_of_row > MAX_NEIGHBORS + head)
        yield start_of_row[members] + head, members


def as_hashes(pdq_hashes: Sequence[bytes]) -> Hashes:
    """Return non-empty PDQ hashes as rows of four 64-bit words, [P, 4]."""
    return np.frombuffer(b"".join(pdq_hashes), dtype=np.uint64).reshape(-1, WORDS)


def image_distances(rows: Hashes, columns: Hashes, *, mirrored: bool) -> Bits:
    """Return the distance in bits between each row and each column, [len(rows), len(columns)].

    With `mirrored`, the distance to the mirrored image is returned if it is smaller, but never less than
    MAX_COPY_BITS + 1, because a mirrored photo is not a copy.
    """
    if not mirrored:
        return _pair_distances(rows, columns)
    flipped = _pair_distances(rows & MIRRORED_BITS, columns & MIRRORED_BITS)
    others = _pair_distances(rows & ~MIRRORED_BITS, columns & ~MIRRORED_BITS)
    return _nearer(flipped, others)


def row_distances(rows: Hashes, others: Hashes, *, mirrored: bool) -> Bits:
    """Return the distance in bits between each row and the same row of `others` (see `image_distances`)."""
    different = rows ^ others
    if mirrored:
        return _nearer(_count_bits(different & MIRRORED_BITS), _count_bits(different & ~MIRRORED_BITS))
    return _count_bits(different)


def _pair_distances(rows: Hashes, columns: Hashes) -> Bits:
    distances = np.zeros((len(rows), len(columns)), np.uint16)
    for word in range(WORDS):
        distances += np.bitwise_count(rows[:, word, None] ^ columns[None, :, word])
    return distances


def _nearer(flipped: Bits, others: Bits) -> Bits:
    """Return the smaller of the plain and mirrored distances. `flipped` counts only the MIRRORED_BITS."""
    half = flipped.dtype.type(HASH_BITS // 2)
    mirrored_distances = np.maximum(others + (half - flipped), flipped.dtype.type(MAX_COPY_BITS + 1))
    nearer: Bits = np.minimum(others + flipped, mirrored_distances)
    return nearer


def _count_bits(hashes: Hashes) -> Bits:
    counts = np.bitwise_count(hashes).astype(np.uint16)
    # np.sum over an axis of length 4 is ten times slower.
    total: Bits = counts[:, 0] + counts[:, 1] + counts[:, 2] + counts[:, 3]
    return total


def near_hashes(hashes: Hashes, kind: ImageKind) -> NearPairs:
    """Return all near pairs, or nearly all if there are more than ALL_PAIRS_HASHES hashes."""
    mirrored = kind == "photos"
    if len(hashes) > ALL_PAIRS_HASHES:
        return find_near_pairs(hashes, MAX_NEAR_BITS[kind], RECALL_BITS[kind], mirrored=mirrored)

    def compare_block(start: int) -> NearPairs:
        distances = image_distances(hashes[start : start + BLOCK_HASHES], hashes[start:], mirrored=mirrored)
        rows, columns = np.nonzero(np.triu(distances <= MAX_NEAR_BITS[kind], 1))
        return NearPairs(start + rows, start + columns, distances[rows, columns])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        blocks = list(pool.map(compare_block, range(0, max(len(hashes), 1), BLOCK_HASHES)))
    return NearPairs(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


# --- images


def compare_samples(samples: pa.Table, kind: ImageKind) -> pa.Table:
    """Return each sample's group, and the reason if it is rejected (tables.IMAGE_GROUPS, sorted by id).

    Of copies of a photo, the one in the most held-out split is kept, then the largest, then the first by id.
    Photos and graphics are also rejected if they are near a sample in a more held-out split. `samples` has
    the columns COMPARED_COLUMNS.
    """
    samples = samples.sort_by("sample_id")
    ids = samples["sample_id"].combine_chunks()
    ranks = np.array([SPLIT_RANK[split] for split in samples["split"].to_pylist()], np.int64)
    width_px, height_px = (samples[name].cast(pa.int64()) for name in ("width_px", "height_px"))
    pixels = pc.multiply(width_px, height_px).to_numpy()
    best_first = np.lexsort((-pixels, -ranks))
    images = find_near_samples(samples["pdq_hashes"].combine_chunks(), kind, best_first)
    kept_instead = _choose(images, ranks, best_first, kind)
    is_kept = kept_instead < 0
    is_held_out = ~is_kept & (ranks[kept_instead] > np.maximum(ranks, SPLIT_RANK["train"]))
    reasons = pc.if_else(pa.array(is_held_out), "near_held_out_image", "near_duplicate_image")
    reasons = pc.if_else(pa.array(is_kept), None, reasons)
    groups, instead = ids.take(pa.array(_group_names(images))), pa.array(kept_instead, mask=is_kept)
    return pa.table([ids, groups, reasons, ids.take(instead)], schema=IMAGE_GROUPS)


class DistinctImages(NamedTuple):
    """Images with distinct hashes. Samples with equal hashes share an image, so copies add no pairs."""

    image_of_sample: Rows
    near: NearPairs  # pairs of images


def _choose(images: DistinctImages, ranks: Rows, best_first: Rows, kind: ImageKind) -> Rows:
    """Return, for each sample, the index of the sample that is kept instead, or -1 if it is kept itself."""
    count, near = len(ranks), images.near
    pair_images = np.concatenate([near.first, near.second])
    neighbors = np.concatenate([near.second, near.first])
    by_image = np.argsort(pair_images, kind="stable")
    neighbors, bits = neighbors[by_image], np.concatenate([near.bits, near.bits])[by_image]
    sizes = np.bincount(images.image_of_sample)
    bounds = np.r_[0, np.cumsum(np.bincount(pair_images, minlength=len(sizes)))]
    # First kept sample for each image and split rank. `count` means no sample.
    first_kept = np.full((len(sizes), len(SPLIT_RANK)), count)
    kept_instead = np.full(count, -1)
    is_alone = (sizes[images.image_of_sample] == 1) & (np.diff(bounds)[images.image_of_sample] == 0)
    for sample in best_first[~is_alone[best_first]]:
        image = images.image_of_sample[sample]
        pairs = slice(bounds[image], bounds[image + 1])
        nearby = np.append(neighbors[pairs], image)
        chosen = first_kept[nearby, max(ranks[sample], SPLIT_RANK["train"]) + 1 :].min(initial=count)
        if chosen == count and kind == "photos":
            is_copy = np.append(bits[pairs] <= MAX_COPY_BITS, True)
            chosen = first_kept[nearby[is_copy]].min()
        if chosen < count:
            kept_instead[sample] = chosen
        else:
            first_kept[image, ranks[sample]] = min(first_kept[image, ranks[sample]], sample)
    return kept_instead


def _group_names(images: DistinctImages) -> Rows:
    """Return the first sample of each sample's group. A group is a connected component of near images."""
    first = np.full(int(images.image_of_sample.max(initial=-1)) + 1, len(images.image_of_sample))
    np.minimum.at(first, images.image_of_sample, np.arange(len(images.image_of_sample)))
    near = images.near
    while True:
        lower = np.minimum(first[near.first], first[near.second])
        if np.array_equal(first[near.first], lower) and np.array_equal(first[near.second], lower):
            return first[images.image_of_sample]
        np.minimum.at(first, near.first, lower)
        np.minimum.at(first, near.second, lower)
        # Pointer jumping: replacing each first sample by its own first sample halves chains of images.
        first = first[images.image_of_sample[first]]


def find_near_samples(pdq_hashes: pa.ListArray, kind: ImageKind, best_first: Rows) -> DistinctImages:
    """Return the near images or decks. Near decks share at least half of the smaller deck's pages.

    The distance between two decks is the median distance of the shared pages. An empty hash is near no other
    hash. If there are decks, each sample counts as a separate image. `best_first` puts the best samples
    first, because in large groups only pairs with the first samples are sure to be compared.
    """
    count = len(pdq_hashes)
    owners = pc.list_parent_indices(pdq_hashes).to_numpy().astype(np.int64)
    values = pdq_hashes.flatten()
    has_detail = pc.greater(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    hashes, owners = as_hashes(values.filter(pa.array(has_detail)).to_pylist()), owners[has_detail]
    places = np.empty(count, np.int64)
    places[best_first] = np.arange(count)
    in_order = np.argsort(places[owners], kind="stable")
    hashes, owners = hashes[in_order], owners[in_order]
    num_pages = pc.list_value_length(pdq_hashes).to_numpy(zero_copy_only=False)
    if (num_pages == 1).all():
        _, first, image_of_hash = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
        by_first = np.argsort(first)
        image_of_sample = np.full(count, -1)
        image_of_sample[owners] = np.argsort(by_first)[image_of_hash.ravel()]
        is_flat = image_of_sample < 0  # no hash
        image_of_sample[is_flat] = len(first) + np.arange(is_flat.sum())
        return DistinctImages(image_of_sample, near_hashes(hashes[first[by_first]], kind))
    near = near_hashes(hashes, kind)
    first, second = owners[near.first], owners[near.second]
    is_single = (num_pages[first] == 1) & (num_pages[second] == 1)
    deck_pairs = _near_decks(near, owners, np.flatnonzero(~is_single & (first != second)), num_pages)
    image_pairs = (first[is_single], second[is_single], near.bits[is_single])
    pairs = NearPairs(*(np.concatenate(parts) for parts in zip(image_pairs, deck_pairs, strict=True)))
    return DistinctImages(np.arange(count), pairs)


def _near_decks(near: NearPairs, owners: Rows, pairs: Rows, num_pages: Rows) -> NearPairs:
    """Return the near pairs of samples that have at least one deck. `pairs` selects page pairs of `near`."""
    closest: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = defaultdict(lambda: ({}, {}))
    for p, q, bits in zip(*(part[pairs].tolist() for part in near), strict=True):
        for page_bits, page in zip(closest[int(owners[p]), int(owners[q])], (p, q), strict=True):
            page_bits[page] = min(bits, page_bits.get(page, bits))
    decks = []
    for (a, b), sides in closest.items():
        if 2 * min(map(len, sides)) >= min(num_pages[a], num_pages[b]):
            distances = sorted([*sides[0].values(), *sides[1].values()])
            decks.append((a, b, distances[len(distances) // 2]))
    first, second, bits_apart = np.array(decks, np.int64).reshape(-1, 3).T
    return NearPairs(first, second, bits_apart.astype(np.uint16))
