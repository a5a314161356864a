"""Rebuild the word lists in `pipeline/text/wordnet` from WordNet's files.

    python -m benchmarks.wordnet_lists FOLDER

FOLDER contains data.noun, index.noun, noun.exc, cntlist.rev and so on, such as `usr/share/wordnet` in
Debian's package wordnet-base.
"""

import gzip
import sys
from pathlib import Path

LISTS = Path(__file__).parents[1] / "pipeline/text/wordnet"
PARTS = ("noun", "verb", "adj", "adv")
# Lexicographer files of words for visible things, such as animals, food and shapes.
VISIBLE = {"noun": {4, 5, 6, 7, 8, 13, 15, 17, 18, 19, 20, 25, 27, 28}, "adj": {0, 1, 44}}

TYPES = {"noun": "1", "adj": "35"}
# A word has at most three frequent meanings, each at least a tenth as frequent as its most frequent one.
MAX_MEANINGS, MIN_FRAC = 3, 0.1


def build(folder: Path, out: Path = LISTS) -> dict[str, int]:
    """Write the lists deterministically. Returns the number of lines in each."""
    words = {
        line.split(" ", 1)[0]
        for part in PARTS
        for name in (f"index.{part}", f"{part}.exc")
        for line in _lines(folder / name)
    }
    synonyms: set[str] = set()
    frequent = {part: _frequent_senses(folder, part) for part in VISIBLE}
    for part, numbers in VISIBLE.items():
        # The fields are offset, file number, type, number of words (hexadecimal), first word, ...
        for fields in (line.split(" ") for line in _lines(folder / f"data.{part}")):
            # Adjectives may have a marker: "afraid(p)".
            names = {name.partition("(")[0].lower() for name in fields[4 : 4 + 2 * int(fields[3], 16) : 2]}
            names = {name for name in names if (name, fields[0]) in frequent[part]}
            names = {name.replace("_", " ") for name in names if name.replace("_", "").isalpha()}
            if int(fields[1]) in numbers and len(names) > 1:
                synonyms.add("|".join(sorted(names)))
    lists = {
        "synonyms": sorted(synonyms),
        "words": sorted({word.lower() for word in words if word.isalpha()}),
    }
    for name, lines in lists.items():
        (out / f"{name}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return {name: len(lines) for name, lines in lists.items()}


def _frequent_senses(folder: Path, part: str) -> set[tuple[str, str]]:
    """Return (word, offset) for the frequent meanings of the words of a part of speech.

    The first meaning is always included, the second and third only if they are not much rarer.
    """
    counts: dict[tuple[str, int], int] = {}
    for key, number, count in (line.split(" ") for line in _lines(folder / "cntlist.rev")):
        word, _, rest = key.partition("%")
        if rest[0] in TYPES[part]:
            counts[word, int(number)] = int(count)
    frequent = set()
    for word, _, number, *others in map(str.split, _lines(folder / f"index.{part}")):
        offsets = others[-int(number) :]
        times = [1 + counts.get((word, n), 0) for n in range(1, len(offsets) + 1)]
        pairs = zip(offsets[:MAX_MEANINGS], times, strict=False)
        frequent |= {
            (word, offset) for offset, n in pairs if offset == offsets[0] or n >= MIN_FRAC * max(times)
        }
    return frequent


def _lines(path: Path) -> list[str]:
    """Return the lines of a file without the license, whose lines are indented."""
    return [
        line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(" ")
    ]


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
