"""Near-duplicate images: choose which to keep, and group those that must be in the same split.

Images are compared by their PDQ hashes (images/decode.py). Photos at most 20 of 256 bits apart are copies of one photo; up to
70 bits, one may be a crop of the other, or have a frame: distinct photos are 88 or more apart (docs/measurements.md).
A mirrored photo is near, and no copy. Slides and charts are never rejected as copies: two that differ in one number look the
same, and a mirrored one is another.

Near pairs among many hashes are found without comparing each with each, by bit sampling (Indyk and Motwani, 1998): two hashes
that are d of 256 bits apart agree in k bits drawn at random with a probability of about (1 - d / 256)^k, two unrelated ones
with 2^-k. So the hashes are sorted by some drawn bits, those that agree in all of them are compared, and this is done again
with other bits until a near pair has very likely met once. Time grows with about the 1.4th power of the number of hashes.

Bits are drawn in two steps. Those of a round part the hashes, and each part is copied, so that the tables of this round (each
of more drawn bits) read memory that a core has at hand: 10 million hashes then take a third of the time. Most pairs that meet
are told apart by a quarter of their bits, and all but a few by a half, before all bits are compared.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.tables import IMAGE_GROUPS, SPLIT_RANK

HASH_BITS = 256
WORD_BITS = 64  # a hash is four words
MAX_COPY_BITS = 20  # recompressed, halved, brighter and gray copies are within (docs/measurements.md)
# PDQ's bits say which of 16 x 16 coefficients of a cosine transform are above their median, which is near 0. Mirroring an image
# negates those of the odd columns, and so turns these bits: of 29 photos, at most 20 bits were other than that.
MIRRORED_BITS = np.uint64(0x5555_5555_5555_5555)

Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row a page
Bits = npt.NDArray[np.uint8 | np.uint16]

WORDS = HASH_BITS // WORD_BITS
RECALL = 0.995  # of pairs that are as many bits apart as `find_near_pairs` is told; of nearer ones it is higher
MEETINGS = 6.0  # unrelated hashes that agree with a hash in all drawn bits, on average
MAX_MEETINGS = 256  # in a crowd of more that agree, each is compared with the next so many, and with the first of the crowd
CROWD_HEADS = 16
PART_ROWS = 1 << 16  # that the tables of a round work on at once
DENSE_STEPS = 6  # neighbors in a table that are compared for all rows at once: few rows have more of equal keys
ALL_PAIRS_ROWS = 256  # a part of so few rows is compared each with each
EXPECTED = 0.5  # tables of a round that find a pair which the round has not parted; more of them find the same pairs again
MET_PAIRS = 4 * PART_ROWS  # in memory, before those that are near are told from the others
LOOKED_AT = 0.99  # of near pairs that meet in a table, by a quarter of their bits, and then by a half
MERGED_PAIRS = 4_000_000  # in memory, before those that were found in several tables are merged

# Odd numbers that spread the bits of a word over the upper half of its product (multiply-shift hashing, Dietzfelbinger 1996).
FACTORS = (np.random.default_rng(0).integers(0, 1 << 63, WORDS, dtype=np.uint64) << np.uint64(1)) | np.uint64(1)

Words = npt.NDArray[np.uint64]  # [N]: pairs of rows as (row << 32 | later row), or keys
Rows = npt.NDArray[np.int64]
ImageKind = Literal["photos", "graphics"]
MAX_NEAR_BITS: dict[str, int] = {"photos": 70, "graphics": 31}
SURE_BITS = {"photos": 64, "graphics": 31}  # up to here 995 of 1,000 pairs are found among however many hashes
ALL_PAIRS_HASHES = 20_000
LOOK_ALIKE_ADVICE = {  # by reason: what to change if the images of too many rows look like others
    "near_duplicate_image": "for slides or charts, dedupe.images: graphics; none keeps all images that look alike",
    "near_held_out_image": "dedupe.images: none keeps images that look alike",
}
COMPARED_COLUMNS = ("sample_id", "split", "pdq_hashes", "width_px", "height_px")  # columns of samples that are compared
BLOCK_HASHES = 256  # rows of one block of distances


# --- pairs of hashes


class NearPairs(NamedTuple):
    """Pairs of rows that are near: the first of each pair is the earlier row, and each pair is there once, in order."""

    first: Rows
    second: Rows
    bits: Bits  # how many they are apart


@dataclass(frozen=True, slots=True)
class Plan:
    """How many bits are drawn, and how often, to find a pair with the probability RECALL."""

    round_bits: int
    table_bits: int
    rounds: int
    tables: int  # of each round
    quarter_bits: int  # that near hashes may differ in, of a fourth of their bits
    half_bits: int


def plan_search(count: int, recall_bits: int) -> Plan:
    """Return the plan to find pairs of `recall_bits` among `count` hashes."""
    all_bits = max(2, round(math.log2(max(count, 2) / MEETINGS)) + 1)
    round_bits = min(all_bits - 1, max(1, math.ceil(math.log2(max(count, 2) / PART_ROWS)) + 1))
    table_bits = all_bits - round_bits
    in_table = _agreeing(table_bits, recall_bits, HASH_BITS - round_bits)  # the others are drawn, of hashes that agree in these
    in_table *= LOOKED_AT**2
    tables = max(1, round(EXPECTED / in_table))
    in_round = _agreeing(round_bits, recall_bits, HASH_BITS) * (1 - (1 - in_table) ** tables)
    rounds = math.ceil(math.log(1 - RECALL) / math.log1p(-in_round))
    return Plan(round_bits, table_bits, rounds, tables, *(_most_apart(recall_bits, HASH_BITS // part) for part in (4, 2)))


def _agreeing(drawn: int, apart: int, bits: int) -> float:
    """Return the probability that two rows of `bits` bits, of which `apart` differ, agree in all of `drawn` ones."""
    return math.prod((bits - apart - n) / (bits - n) for n in range(drawn))


def _most_apart(apart: int, drawn: int) -> int:
    """Return in how many of `drawn` bits two hashes differ at most that are `apart`, with the probability LOOKED_AT."""
    likely, most = 0.0, -1
    while likely < LOOKED_AT:  # the hypergeometric distribution
        most += 1
        likely += math.comb(apart, most) * math.comb(HASH_BITS - apart, drawn - most) / math.comb(HASH_BITS, drawn)
    return most


def find_near_pairs(hashes: Hashes, max_bits: int, recall_bits: int, *, mirrored: bool) -> NearPairs:
    """Return the pairs of hashes that are at most `max_bits` apart.

    Each pair of at most `recall_bits` is found with a probability of RECALL or more; in a crowd of more than MAX_MEETINGS that
    are near each other, at least those with the first hashes. With `mirrored`, a pair is as far apart
    as the one image and the other one mirrored, if these are nearer. All cores work, and the same pairs are found each time.
    """
    if not len(hashes):
        return NearPairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint16))
    plan = plan_search(len(hashes), recall_bits)
    find = partial(find_in_round, hashes, plan, max_bits, mirrored=mirrored)
    pending: list[Words] = [np.zeros(0, np.uint64)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for pairs in pool.map(find, range(plan.rounds)):
            pending.append(pairs)
            if sum(map(len, pending)) > 2 * max(len(pending[0]), MERGED_PAIRS):
                pending = [np.unique(np.concatenate(pending))]
    merged = np.unique(np.concatenate(pending))
    first, second = (merged >> np.uint64(32)).astype(np.int64), (merged & np.uint64(0xFFFF_FFFF)).astype(np.int64)
    starts = range(0, len(merged), PART_ROWS)
    parts = [
        row_distances(hashes[first[n : n + PART_ROWS]], hashes[second[n : n + PART_ROWS]], mirrored=mirrored) for n in starts
    ]
    return NearPairs(first, second, np.concatenate([np.zeros(0, np.uint16), *parts]))


def find_in_round(hashes: Hashes, plan: Plan, max_bits: int, number: int, *, mirrored: bool) -> Words:
    """Return the near pairs that agree in the bits drawn for a round and for one of its tables."""
    rng = np.random.default_rng(number)
    order = rng.permutation(HASH_BITS).tolist()
    if mirrored:  # one of the bits of a round is turned by mirroring: whichever of the two hashes has 0 there is taken
        turned = next(bit for bit in order if int(MIRRORED_BITS) >> (bit % WORD_BITS) & 1)
        order = [turned, *(bit for bit in order if bit != turned)]
        is_turned = hashes[:, turned // WORD_BITS] >> np.uint64(turned % WORD_BITS) & np.uint64(1)
        flips = (np.uint64(0) - is_turned) & MIRRORED_BITS
    masks = _masks(order[: plan.round_bits])
    others = order[plan.round_bits :]
    tables = [_masks(rng.permutation(others)[: plan.table_bits].tolist()) for _ in range(plan.tables)]
    quarters = _two_quarters(rng)

    def unmirrored(rows: Rows | slice) -> Hashes:
        return hashes[rows] ^ flips[rows, None] if mirrored else hashes[rows]

    keys = np.concatenate([_keys(unmirrored(slice(n, n + PART_ROWS)).T, masks) for n in range(0, len(hashes), PART_ROWS)])
    by_key = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[by_key])) + 1
    near: list[Words] = [np.zeros(0, np.uint64)]
    for start, end in pairwise([0, *ends.tolist(), len(keys)]):
        rows = by_key[start:end]
        part = unmirrored(rows)
        for first, second in _near_in_part(part, tables, quarters, plan, max_bits, mirrored=mirrored):
            pairs = np.sort(np.stack([rows[first], rows[second]]), axis=0).astype(np.uint64)
            near.append(pairs[0] << np.uint64(32) | pairs[1])
    return np.unique(np.concatenate(near))


def _masks(bits: Sequence[int]) -> list[np.uint64]:
    """Return a mask of each word of a hash, with these of the 256 bits."""
    return [np.uint64(sum(1 << bit % WORD_BITS for bit in bits if bit // WORD_BITS == word)) for word in range(WORDS)]


def _two_quarters(rng: np.random.Generator) -> list[list[np.uint64]]:
    """Return masks of two quarters of the bits of a hash: sixteen of each word, and no bit in both."""
    sixteens = rng.permutation(WORD_BITS).reshape(4, -1)
    return [
        _masks([word * WORD_BITS + bit for word in range(WORDS) for bit in sixteens[(word + turn) % 4].tolist()])
        for turn in (0, 1)
    ]


def _keys(columns: Hashes, masks: Sequence[np.uint64]) -> Words:
    """Return a number for each hash ([4, N]), equal where the masked bits are; others are equal by chance once in 2^32."""
    keys = np.zeros(columns.shape[1], np.uint64)
    for word, mask, factor in zip(columns, masks, FACTORS, strict=True):
        keys += (word & mask) * factor
    return keys >> np.uint64(32)


def _near_in_part(
    part: Hashes,
    tables: Sequence[Sequence[np.uint64]],
    quarters: Sequence[Sequence[np.uint64]],
    plan: Plan,
    max_bits: int,
    *,
    mirrored: bool,
) -> Iterator[tuple[Rows, Rows]]:
    """Yield rows of a part and rows that are near them, of those that agree in the bits of a table; in a small part, of all."""
    count = len(part)
    if count < 2:
        return
    if count <= ALL_PAIRS_ROWS:
        first, second = np.triu_indices(count, 1)
        is_near = row_distances(part[first], part[second], mirrored=mirrored) <= max_bits
        yield first[is_near], second[is_near]
        return
    columns = np.ascontiguousarray(part.T)
    quarter, other_quarter = (_union(columns, masks) for masks in quarters)
    row_bits = np.uint64((count - 1).bit_length())
    numbers = np.arange(count, dtype=np.uint64)
    met: list[Rows] = []

    def near_of_met() -> Iterator[tuple[Rows, Rows]]:
        pairs = np.concatenate(met, axis=1)
        met.clear()
        for start in range(0, pairs.shape[1], PART_ROWS):
            first, second = pairs[:, start : start + PART_ROWS]
            apart = np.bitwise_count(quarter.take(first) ^ quarter.take(second))
            apart += np.bitwise_count(other_quarter.take(first) ^ other_quarter.take(second))
            may_be_near = np.flatnonzero(apart <= plan.half_bits)
            first, second = first.take(may_be_near), second.take(may_be_near)
            is_near = row_distances(part.take(first, axis=0), part.take(second, axis=0), mirrored=mirrored) <= max_bits
            yield first[is_near], second[is_near]

    for masks in tables:
        keys = _keys(columns, masks) << row_bits | numbers
        keys.sort()
        rows = (keys & (np.uint64(1) << row_bits) - np.uint64(1)).astype(np.int64)
        keys >>= row_bits
        met.append(rows.take(_near_in_order(keys, quarter.take(rows), plan.quarter_bits)))
        if sum(pairs.shape[1] for pairs in met) > MET_PAIRS:  # in a crowd, all are near each other
            yield from near_of_met()
        if np.any(keys[MAX_MEETINGS + 1 :] == keys[: -MAX_MEETINGS - 1]):
            yield from _near_heads(part.take(rows, axis=0), keys, rows, max_bits, mirrored=mirrored)
    if met:
        yield from near_of_met()


def _union(columns: Hashes, masks: Sequence[np.uint64]) -> Words:
    """Return the masked bits of hashes ([4, N]) in one word; no two of the masks have a bit in common."""
    united = np.zeros(columns.shape[1], np.uint64)
    for word, mask in zip(columns, masks, strict=True):
        united |= word & mask
    return united


def _near_in_order(keys: Words, quarter: Words, most_bits: int) -> Rows:
    """Return pairs of positions, [2, P], of equal keys in order whose quarters of hashes differ in so many bits at most."""
    first_of, second_of = [], []
    for step in range(1, DENSE_STEPS + 1):
        is_near = np.bitwise_count(quarter[step:] ^ quarter[:-step]) <= most_bits
        is_near &= keys[step:] == keys[:-step]
        first_of.append(np.flatnonzero(is_near))
        second_of.append(first_of[-1] + step)
    step = DENSE_STEPS + 1
    first = np.flatnonzero(keys[step:] == keys[:-step])
    while len(first) and step <= MAX_MEETINGS:
        is_near = np.bitwise_count(quarter.take(first) ^ quarter.take(first + step)) <= most_bits
        first_of.append(first.take(np.flatnonzero(is_near)))
        second_of.append(first_of[-1] + step)
        step += 1
        first = first[: np.searchsorted(first, len(keys) - step)]
        first = first.take(np.flatnonzero(keys.take(first) == keys.take(first + step)))
    return np.stack([np.concatenate(first_of), np.concatenate(second_of)])


def _near_heads(in_order: Hashes, keys: Words, rows: Rows, max_bits: int, *, mirrored: bool) -> Iterator[tuple[Rows, Rows]]:
    """Yield the first rows of each crowd of equal keys, and the rows of the crowd that are near them."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    start_of = np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    for head in range(CROWD_HEADS):
        members = np.flatnonzero(np.arange(len(keys)) - start_of > MAX_MEETINGS + head)
        heads = start_of[members] + head
        distances = row_distances(in_order.take(heads, axis=0), in_order.take(members, axis=0), mirrored=mirrored)
        is_near = distances <= max_bits
        yield rows[heads[is_near]], rows[members[is_near]]


def as_hashes(pdq_hashes: Sequence[bytes]) -> Hashes:
    """Return PDQ hashes, none of them empty, as rows of four 64-bit words, [P, 4]."""
    return np.frombuffer(b"".join(pdq_hashes), dtype=np.uint64).reshape(-1, 4)


def image_distances(rows: Hashes, columns: Hashes, *, mirrored: bool) -> Bits:
    """Return the bits apart of each pair, [len(rows), len(columns)].

    With `mirrored`: of the one image and the other one mirrored, where that is less. A mirrored photo is never a copy: it is
    more than MAX_COPY_BITS apart.
    """
    if not mirrored:
        return hamming_distances(rows, columns)
    turned = hamming_distances(rows & MIRRORED_BITS, columns & MIRRORED_BITS)
    return _nearer(turned, hamming_distances(rows & ~MIRRORED_BITS, columns & ~MIRRORED_BITS))


def row_distances(rows: Hashes, others: Hashes, *, mirrored: bool) -> Bits:
    """Return the bits apart of each row and the row of `others` in its place, [len(rows)]; see `image_distances`."""
    apart = rows ^ others
    return _nearer(_count(apart & MIRRORED_BITS), _count(apart & ~MIRRORED_BITS)) if mirrored else _count(apart)


def hamming_distances(rows: Hashes, columns: Hashes) -> Bits:
    """Return the number of differing bits of each pair, [len(rows), len(columns)]."""
    distances = np.zeros((len(rows), len(columns)), np.uint16)
    for word in range(rows.shape[1]):
        distances += np.bitwise_count(rows[:, word, None] ^ columns[None, :, word])
    return distances


def _nearer(turned: Bits, others: Bits) -> Bits:
    """Return the bits apart of images, or of one and the other mirrored, by what differs in the bits that mirroring turns."""
    half = turned.dtype.type(HASH_BITS // 2)
    nearer: Bits = np.minimum(others + turned, np.maximum(others + (half - turned), turned.dtype.type(MAX_COPY_BITS + 1)))
    return nearer


def _count(words: Hashes) -> Bits:
    """Return the number of bits that are set in each row, as 16-bit numbers: all 256 may be."""
    counts = np.bitwise_count(words).astype(np.uint16)
    total: Bits = counts[:, 0] + counts[:, 1] + counts[:, 2] + counts[:, 3]  # np.sum over so short an axis is ten times slower
    return total


# --- images


def compare_samples(samples: pa.Table, kind: ImageKind) -> pa.Table:
    """Return the group of each sample, and the reason for its rejection, if any (tables.IMAGE_GROUPS), in the order of ids.

    Among copies of a photo, the one in the most held-out split is kept, then the largest, then the first by id. A sample near
    a sample of a more held-out split is rejected, whatever its kind. The first id of a group is its name. `samples` has the
    columns COMPARED_COLUMNS.
    """
    samples = samples.sort_by("sample_id")
    ids = samples["sample_id"].combine_chunks()
    ranks = np.array([SPLIT_RANK[split] for split in samples["split"].to_pylist()], np.int64)
    pixels = pc.multiply(samples["width_px"].cast(pa.int64()), samples["height_px"].cast(pa.int64())).to_numpy()
    best_first = np.lexsort((-pixels, -ranks))  # of equal ones, the first by id
    images = find_near_samples(samples["pdq_hashes"].combine_chunks(), kind, best_first)
    kept_instead = _choose(images, ranks, best_first, kind)
    is_kept = kept_instead < 0
    is_held_out = ~is_kept & (ranks[kept_instead] > np.maximum(ranks, SPLIT_RANK["train"]))
    reasons = pc.if_else(pa.array(is_held_out), "near_held_out_image", "near_duplicate_image")
    groups, instead = ids.take(pa.array(_first_of_groups(images))), pa.array(kept_instead, mask=is_kept)
    return pa.table([ids, groups, pc.if_else(pa.array(is_kept), None, reasons), ids.take(instead)], schema=IMAGE_GROUPS)


class DistinctImages(NamedTuple):
    """Images by their hashes: samples with one hash are one image, so that thousands of copies are not millions of pairs."""

    of_sample: Rows  # the image of each sample
    near: NearPairs  # pairs of images


def _choose(images: DistinctImages, ranks: Rows, best_first: Rows, kind: ImageKind) -> Rows:
    """Return for each sample, in the order of their ids, the one that is kept instead of it; -1 for one that is kept."""
    count, near = len(ranks), images.near
    ends_of_pairs, neighbors = np.concatenate([near.first, near.second]), np.concatenate([near.second, near.first])
    by_image = np.argsort(ends_of_pairs, kind="stable")
    neighbors, bits = neighbors[by_image], np.concatenate([near.bits, near.bits])[by_image]
    sizes = np.bincount(images.of_sample)
    bounds = np.r_[0, np.cumsum(np.bincount(ends_of_pairs, minlength=len(sizes)))]
    first_kept = np.full((len(sizes), len(SPLIT_RANK)), count)  # the first sample of an image and a rank that is kept
    kept_instead = np.full(count, -1)
    is_alone = (sizes[images.of_sample] == 1) & (np.diff(bounds)[images.of_sample] == 0)
    for sample in best_first[~is_alone[best_first]]:
        image = images.of_sample[sample]
        of_image = slice(bounds[image], bounds[image + 1])
        nearby = np.append(neighbors[of_image], image)
        chosen = first_kept[nearby, max(ranks[sample], SPLIT_RANK["train"]) + 1 :].min(initial=count)
        if chosen == count and kind == "photos":
            is_copy = np.append(bits[of_image] <= MAX_COPY_BITS, True)
            chosen = first_kept[nearby[is_copy]].min()
        if chosen < count:
            kept_instead[sample] = chosen
        else:
            first_kept[image, ranks[sample]] = min(first_kept[image, ranks[sample]], sample)
    return kept_instead


def _first_of_groups(images: DistinctImages) -> Rows:
    """Return the first sample of the group of each; groups are the connected components of near images."""
    first = np.full(int(images.of_sample.max(initial=-1)) + 1, len(images.of_sample))
    np.minimum.at(first, images.of_sample, np.arange(len(images.of_sample)))
    near = images.near
    while True:
        lower = np.minimum(first[near.first], first[near.second])
        if np.array_equal(first[near.first], lower) and np.array_equal(first[near.second], lower):
            return first[images.of_sample]
        np.minimum.at(first, near.first, lower)
        np.minimum.at(first, near.second, lower)
        first = first[images.of_sample[first]]  # the first one's first: a chain of images is halved each time


def find_near_samples(pdq_hashes: pa.ListArray, kind: ImageKind, best_first: Rows) -> DistinctImages:
    """Return which samples are near: near images, or decks of which half the pages have a near page.

    The bits of two decks are those of the median page. An empty hash is near no other hash. If there are
    decks, each sample is an image of its own. `best_first` orders the samples: in a crowd of thousands that are near, not all
    pairs are found, but those with the best ones are.
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
    pages = pc.list_value_length(pdq_hashes).to_numpy(zero_copy_only=False)
    if (pages == 1).all():
        _, first, of_hash = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
        by_first = np.argsort(first)
        of_sample = np.full(count, -1)
        of_sample[owners] = np.argsort(by_first)[of_hash.ravel()]
        is_flat = of_sample < 0  # without a hash: each is an image of its own
        of_sample[is_flat] = len(first) + np.arange(is_flat.sum())
        return DistinctImages(of_sample, near_hashes(hashes[first[by_first]], kind))
    near = near_hashes(hashes, kind)
    first, second = owners[near.first], owners[near.second]
    is_single = (pages[first] == 1) & (pages[second] == 1)
    of_decks = _near_decks(near, owners, np.flatnonzero(~is_single & (first != second)), pages)
    images = (first[is_single], second[is_single], near.bits[is_single])
    pairs = NearPairs(*(np.concatenate(parts) for parts in zip(images, of_decks, strict=True)))
    return DistinctImages(np.arange(count), pairs)


def _near_decks(near: NearPairs, owners: Rows, pairs: Rows, pages: Rows) -> NearPairs:
    """Return the pairs of samples of which half the pages are near, by these pairs of near pages."""
    closest: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = defaultdict(lambda: ({}, {}))
    for p, q, bits in zip(*(part[pairs].tolist() for part in near), strict=True):
        for of_sample, page in zip(closest[int(owners[p]), int(owners[q])], (p, q), strict=True):
            of_sample[page] = min(bits, of_sample.get(page, bits))
    decks = []
    for (a, b), sides in closest.items():
        if 2 * min(map(len, sides)) >= min(pages[a], pages[b]):
            distances = sorted([*sides[0].values(), *sides[1].values()])
            decks.append((a, b, distances[len(distances) // 2]))
    first, second, bits_apart = np.array(decks, np.int64).reshape(-1, 3).T
    return NearPairs(first, second, bits_apart.astype(np.uint16))


def near_hashes(hashes: Hashes, kind: ImageKind) -> NearPairs:
    """Return the pairs of hashes that are near.

    Up to ALL_PAIRS_HASHES are compared each with each; of more, find_near_pairs finds nearly all pairs, the nearer the surer.
    All cores work.
    """
    mirrored = kind == "photos"
    if len(hashes) > ALL_PAIRS_HASHES:
        return find_near_pairs(hashes, MAX_NEAR_BITS[kind], SURE_BITS[kind], mirrored=mirrored)

    def compare_block(start: int) -> NearPairs:
        distances = image_distances(hashes[start : start + BLOCK_HASHES], hashes[start:], mirrored=mirrored)
        rows, columns = np.nonzero(np.triu(distances <= MAX_NEAR_BITS[kind], 1))
        return NearPairs(start + rows, start + columns, distances[rows, columns])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        blocks = list(pool.map(compare_block, range(0, max(len(hashes), 1), BLOCK_HASHES)))
    return NearPairs(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
