"""Rebuild the lists of this folder from WordNet's files: `python -m pipeline.text.wordnet.build FOLDER`.

FOLDER holds data.noun, index.noun, noun.exc and so on, such as `usr/share/wordnet` of Debian's package wordnet-base.
"""

import gzip
import sys
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")


def build(folder: Path, out: Path) -> dict[str, int]:
    """Write `names.txt.gz` and `words.txt.gz`, the same bytes from the same files; return how many lines each has."""
    names: set[str] = set()
    dictionary_words: set[str] = set()
    for part in PARTS:
        # A line of data: offset, file number, type, how many words (hexadecimal), first word, ...
        first = (line.split(" ", 5)[4].partition("(")[0] for line in _lines(folder / f"data.{part}"))  # adjectives: "afraid(p)"
        names |= {name.lower().partition(".")[0].replace("_", " ") for name in first}
        dictionary_words |= {line.split(" ", 1)[0] for line in _lines(folder / f"index.{part}")}
        dictionary_words |= {line.split(" ", 1)[0] for line in _lines(folder / f"{part}.exc")}
    lists = {"names": names - {""}, "words": {word.lower() for word in dictionary_words if word.isalpha()}}
    for name, entries in lists.items():
        packed = gzip.compress("\n".join(sorted(entries)).encode(), mtime=0)
        (out / f"{name}.txt.gz").write_bytes(packed)
    return {name: len(entries) for name, entries in lists.items()}


def _lines(path: Path) -> list[str]:
    """Return the lines of a file without its license, which is indented."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(" ")]


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]), Path(__file__).parent)}\n")
