"""How fast captions are matched with the entries they are balanced over: `python benchmarks/balance.py [--captions 200000]`.

All 86,654 names of WordNet and numbers, captions of benchmarks/dedupe.py; beside a table of n-grams, which is what one would
write without a library, on the same captions in the same run. CPU seconds of one process; both must find the same entries.
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
    """Look up every run of words of a text that is as long as some entry."""
    numbers = {spaced(entry).strip(): number for number, entry in enumerate(entries)}
    longest = max(entry.count(" ") + 1 for entry in numbers)
    found = []
    for text in texts:
        words = spaced(text).split()
        runs = {" ".join(words[at:end]) for at in range(len(words)) for end in range(at + 1, min(len(words), at + longest) + 1)}
        found.append(sorted(numbers[run] for run in runs & numbers.keys()))
    return found


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
    mine, found = timed(lambda: match_entries(texts, entries))
    peer, wanted = timed(lambda: by_ngrams(texts, entries))
    assert found == wanted, "the two disagree"
    print(f"  build once {build:.2f} CPU s; {sum(map(len, found)) / len(found):.1f} entries a caption")
    print(f"  Aho-Corasick {len(texts) / mine:>9,.0f} captions/CPU s")
    print(f"  n-gram table {len(texts) / peer:>9,.0f} captions/CPU s   ratio {peer / mine:.1f}")


if __name__ == "__main__":
    main()
