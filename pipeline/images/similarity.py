"""Near-duplicate images: choose which to keep, and group those that must be in the same split.

Images are compared by their PDQ hashes (images/decode.py). Photos at most 20 of 256 bits apart are copies of one photo; up to
70 bits, one may be a crop of the other, or have a frame: distinct photos are 88 or more apart (docs/measurements.md).
A mirrored photo is near, and no copy. Slides and charts are never rejected as copies: two that differ in one number look the
same, and a mirrored one is another.
"""

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.images.near_pairs import MAX_COPY_BITS, Hashes, NearPairs, Rows, as_hashes, find_near_pairs, image_distances
from pipeline.tables import IMAGE_GROUPS, SPLIT_RANK

ImageKind = Literal["photos", "graphics"]
MAX_NEAR_BITS: dict[str, int] = {"photos": 70, "graphics": 31}
SURE_BITS = {"photos": 64, "graphics": 31}  # up to here 995 of 1,000 pairs are found among however many hashes
ALL_PAIRS_HASHES = 20_000
COMPARED_COLUMNS = ("sample_id", "split", "pdq_hashes", "width_px", "height_px")  # columns of samples that are compared
BLOCK_HASHES = 256  # rows of one block of distances
LOOK_ALIKE_ADVICE = {  # by reason: what to change if the images of too many rows look like others
    "near_duplicate_image": "for slides or charts, dedupe.images: graphics; none keeps all images that look alike",
    "near_held_out_image": "dedupe.images: none keeps images that look alike",
}


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

    Up to ALL_PAIRS_HASHES are compared each with each; of more, near_pairs.py finds nearly all pairs, the nearer the surer.
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
