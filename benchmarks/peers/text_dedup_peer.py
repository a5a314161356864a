"""Drives rensa or datasketch as their documentation shows: PYTHON text_dedup_peer.py ENGINE TEXTS.txt FLAGS.txt.

One text a line goes in; one line a text comes out: 1 where it is kept, 0 where it is a duplicate of an earlier one.
"""

import sys
from pathlib import Path

THRESHOLD, PERMUTATIONS = 0.8, 128


def rensa(texts: list[str]) -> list[bool]:
    """Its README, "Keep unique documents"."""
    from rensa import RMinHashDeduplicator

    dedup = RMinHashDeduplicator(threshold=THRESHOLD, num_perm=PERMUTATIONS, use_lsh=True)
    return list(dedup.add_pairs((str(i), text.split()) for i, text in enumerate(texts)))


def rensa_tuned(texts: list[str]) -> list[bool]:
    """The same at a threshold and with bands that find as much as the content words do."""
    from rensa import RMinHashDeduplicator

    dedup = RMinHashDeduplicator(threshold=0.55, num_perm=PERMUTATIONS, use_lsh=True, num_bands=32)
    return list(dedup.add_pairs((str(i), text.lower().split()) for i, text in enumerate(texts)))


def datasketch(texts: list[str]) -> list[bool]:
    """Its documentation, "MinHash LSH": update with each token, query, insert."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    kept = []
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=PERMUTATIONS)
        for token in set(text.split()):
            sketch.update(token.encode("utf8"))
        kept.append(not lsh.query(sketch))
        if kept[-1]:
            lsh.insert(number, sketch)
    return kept


if __name__ == "__main__":
    engine, source, out = sys.argv[1:]
    lines = Path(source).read_text(encoding="utf-8").split("\n")
    kept = {"rensa": rensa, "rensa-tuned": rensa_tuned, "datasketch": datasketch}[engine](lines)
    Path(out).write_text("\n".join("1" if each else "0" for each in kept), encoding="utf-8")
