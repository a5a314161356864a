"""Measure how fast captions are matched with balance entries: `python benchmarks/balance.py [--captions 200000]`.

All 86,654 names of WordNet and numbers, and captions of benchmarks/dedupe.py. The baseline is a table of n-grams, the usual way
without a library, on the same captions in the same run. CPU seconds of one process; both must find the same entries.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

from dedupe import plant

from pipeline.stages.balance import match_entries, spaced
from pipeline.text.wordnet import names


def by_ngrams(texts: list[str], entries: tuple[str, ...]) -> list[list[int]]:
    """Match entries by looking up every n-gram of a text, up to the length of the longest entry."""
    numbers = {spaced(entry).strip(): number for number, entry in enumerate(entries)}
    longest = max(entry.count(" ") + 1 for entry in numbers)
    matches = []
    for text in texts:
        words = spaced(text).split()
        runs = {" ".join(words[i:end]) for i in range(len(words)) for end in range(i + 1, min(len(words), i + longest) + 1)}
        matches.append(sorted(numbers[run] for run in runs & numbers.keys()))
    return matches


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Return CPU seconds and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def main() -> None:
    """Print captions a CPU second, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    arguments = parser.parse_args()
    texts, entries = plant(arguments.captions, 11)[0], names()
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {len(texts):,} captions, {len(entries):,} entries")
    build, _ = timed(lambda: match_entries([], entries))
    own_seconds, matches = timed(lambda: match_entries(texts, entries))
    peer_seconds, expected = timed(lambda: by_ngrams(texts, entries))
    assert matches == expected, "the two disagree"
    print(f"  build once {build:.2f} CPU s; {sum(map(len, matches)) / len(matches):.1f} entries a caption")
    print(f"  Aho-Corasick {len(texts) / own_seconds:>9,.0f} captions/CPU s")
    print(f"  n-gram table {len(texts) / peer_seconds:>9,.0f} captions/CPU s   ratio {peer_seconds / own_seconds:.1f}")


if __name__ == "__main__":
    main()
