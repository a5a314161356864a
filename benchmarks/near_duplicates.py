"""Measure the search for near-duplicate photos on random hashes of 256 bits.

    python benchmarks/near_duplicates.py [--hashes 100000 ...]

One hash in fifty has a near copy at a distance of 8, 20, 48, 56, 64 or 70 bits. Half of the copies are
mirrored. For each number of hashes, prints CPU seconds and peak memory of `find_near_pairs`, its recall of
the planted pairs by distance, and the CPU seconds for a comparison of all pairs (measured on 20,000 hashes
and scaled by the number of pairs).

With --rounds N, only N rounds of the search run, and their time is scaled to all rounds. Recall is not
measured.
"""

import argparse
import os
import platform
import resource
import time
from collections import Counter

import numpy as np

from pipeline.images.near_duplicates import (
    ALL_PAIRS_HASHES,
    MAX_NEAR_BITS,
    MIRRORED_BITS,
    RECALL_BITS,
    Hashes,
    find_in_round,
    find_near_pairs,
    near_hashes,
    plan_search,
)

BITS = (8, 20, 48, 56, 64, 70)


def plant(count: int) -> tuple[Hashes, dict[tuple[int, int], int]]:
    """Return hashes, and the planted pairs among them with their distances in bits."""
    rng = np.random.default_rng(count)
    hashes = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    planted = {}
    for n in range(count // 50):
        row, bits = hashes[n].copy(), BITS[n % len(BITS)]
        for bit in rng.choice(256, bits, replace=False).tolist():
            row[bit // 64] ^= np.uint64(1 << bit % 64)
        hashes[count - 1 - n] = row ^ (MIRRORED_BITS if n // len(BITS) % 2 else np.uint64(0))
        planted[n, count - 1 - n] = bits
    return hashes, planted


def describe_recall(pairs: set[tuple[int, int]], planted: dict[tuple[int, int], int]) -> str:
    """Return the recall of planted pairs by distance, as text."""
    all_of = Counter(planted.values())
    near_of = Counter(bits for pair, bits in planted.items() if pair in pairs)
    return ", ".join(f"{bits}: {near_of[bits] / all_of[bits]:.4f}" for bits in BITS)


def main() -> None:
    """Print one line for each number of hashes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hashes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, help="run only this number of rounds")
    options = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, numpy {np.__version__}")
    few, _ = plant(ALL_PAIRS_HASHES)
    start = time.process_time()
    near_hashes(few, "photos")
    pair_s = (time.process_time() - start) / (len(few) ** 2 / 2)
    for count in options.hashes:
        hashes, planted = plant(count)
        (rounds, num_bits), start = plan_search(count, RECALL_BITS["photos"]), time.process_time()
        recall = "not measured"
        if options.rounds:
            for number in range(options.rounds):
                find_in_round(hashes, num_bits, MAX_NEAR_BITS["photos"], number, mirrored=True)
            seconds = (time.process_time() - start) * rounds / options.rounds
        else:
            pairs = find_near_pairs(hashes, MAX_NEAR_BITS["photos"], RECALL_BITS["photos"], mirrored=True)
            seconds = time.process_time() - start
            recall = describe_recall(
                set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)), planted
            )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        each = pair_s * count**2 / 2
        print(
            f"{count:,} hashes: {seconds:,.1f} CPU s, {memory:.2f} GB; each with each {each:,.1f} CPU s; "
            f"recall {recall}",
            flush=True,
        )


if __name__ == "__main__":
    main()
