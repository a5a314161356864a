"""Find near pairs of hashes with faiss.IndexBinaryMultiHash; run by benchmarks/near_duplicates.py in an interpreter of its own.

`faiss_peer.py HASHES.npy BITS TABLES TABLE_BITS FLIPS` prints a JSON object: CPU seconds, and the rows of the pairs found.
"""

import json
import sys
import time

import faiss
import numpy as np


def main() -> None:
    """Search every hash among all, in blocks."""
    hashes = np.load(sys.argv[1]).view(np.uint8).reshape(-1, 32)
    bits, tables, table_bits, flips = map(int, sys.argv[2:])
    start = time.process_time()
    index = faiss.IndexBinaryMultiHash(256, tables, table_bits)
    index.nflip = flips
    index.add(hashes)
    pairs = set()
    for first in range(0, len(hashes), 10_000):
        limits, _, neighbors = index.range_search(hashes[first : first + 10_000], bits + 1)  # the radius is strict
        rows = first + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
        pairs.update((a, b) for a, b in zip(rows.tolist(), neighbors.tolist(), strict=True) if a < b)
    print(json.dumps({"cpu_s": time.process_time() - start, "pairs": sorted(pairs)}))


if __name__ == "__main__":
    main()
