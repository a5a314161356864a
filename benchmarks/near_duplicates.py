"""Measure the search for near-duplicate photos on random hashes of 256 bits.

    python benchmarks/near_duplicates.py [--hashes 100000 ...]

One hash in fifty has a near copy at a distance of 8, 20, 48, 56, 64 or 70 bits. Half of the copies are
mirrored. For each number of hashes, prints CPU seconds and peak memory, and checks that all pairs are found.
"""

import argparse
import os
import platform
import resource
import time

import numpy as np

from pipeline.images.near_duplicates import Hashes, near_hashes

# XOR with this value gives the hash of the mirrored image.
FLIPS = np.array([2**64 - 1, 2**64 - 1, 0, 0], np.uint64)
BITS = (8, 20, 48, 56, 64, 70)


def plant(count: int) -> tuple[Hashes, dict[tuple[int, int], int]]:
    """Return random hashes, and the pairs that were made similar, with their distances in bits."""
    rng = np.random.default_rng(count)
    hashes = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    planted = {}
    for n in range(count // 50):
        row, bits = hashes[n].copy(), BITS[n % len(BITS)]
        for bit in rng.choice(256, bits, replace=False).tolist():
            row[bit // 64] ^= np.uint64(1 << bit % 64)
        hashes[count - 1 - n] = row ^ (FLIPS if n // len(BITS) % 2 else np.uint64(0))
        planted[n, count - 1 - n] = bits
    return hashes, planted


def main() -> None:
    """Print one line for each number of hashes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hashes", type=int, nargs="+", default=[10_000, 100_000])
    options = parser.parse_args()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, numpy {np.__version__}")
    for count in options.hashes:
        hashes, planted = plant(count)
        start = time.process_time()
        pairs = near_hashes(hashes, "photos", np.zeros(count, bool))
        seconds = time.process_time() - start
        assert planted.keys() <= set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{count:,} hashes: {seconds:,.1f} CPU s, {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
