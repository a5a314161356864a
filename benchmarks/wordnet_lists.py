"""Rebuild the word lists in `pipeline/text/wordnet` from WordNet's files.

    python -m benchmarks.wordnet_lists FOLDER

FOLDER contains data.noun, index.noun, noun.exc and so on, such as `usr/share/wordnet` in Debian's package
wordnet-base.
"""

import gzip
import sys
from pathlib import Path

LISTS = Path(__file__).parents[1] / "pipeline/text/wordnet"
PARTS = ("noun", "verb", "adj", "adv")


def build(folder: Path, out: Path = LISTS) -> dict[str, int]:
    """Write the lists deterministically. Returns the number of lines in each."""
    names: set[str] = set()
    words: set[str] = set()
    for part in PARTS:
        # Fields of a data line: offset, file number, type, number of words (hexadecimal), first word, ...
        first = (
            line.split(" ", 5)[4].partition("(")[0] for line in _lines(folder / f"data.{part}")
        )  # adjectives may have a marker: "afraid(p)"
        names |= {name.lower().partition(".")[0].replace("_", " ") for name in first}
        words |= {
            line.split(" ", 1)[0]
            for name in (f"index.{part}", f"{part}.exc")
            for line in _lines(folder / name)
        }
    lists = {
        "names": sorted(names - {""}),
        "words": sorted({word.lower() for word in words if word.isalpha()}),
    }
    for name, lines in lists.items():
        (out / f"{name}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return {name: len(lines) for name, lines in lists.items()}


def _lines(path: Path) -> list[str]:
    """Return the lines of a file without the license, whose lines are indented."""
    return [
        line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(" ")
    ]


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
