"""Rebuild the lists of this folder from WordNet's files: `python -m pipeline.text.wordnet.build FOLDER`.

FOLDER holds data.noun, index.noun, noun.exc, cntlist.rev and so on, such as `usr/share/wordnet` of Debian's package
wordnet-base.
"""

import gzip
import sys
from collections import Counter
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
PERSON = 18
# Lexicographer files of what can be seen: animals, artifacts, food, natural objects, people, plants, shapes.
SEEN = frozenset((5, 6, 13, 17, PERSON, 20, 25))
MAX_OBJECT_WORDS = 3
OTHERWISE = "\t-"
# Words whose most frequent sense is none that can be seen, and which mean a thing in captions of COCO (read by eye).
_IN_CAPTIONS = """
table sign food water baseball light kite court board racket glass tv television book microwave seat meter swing forest park
market church branch ring van mug notebook magazine basketball football trash soda jersey newspaper poster home cup plate cross
square star glove stage oven skateboard surfboard tray shade step bar counter stand cloud model set
"""
IN_CAPTIONS = frozenset(_IN_CAPTIONS.split())
MAX_SENSES = 4  # of such a word that are looked at, the most frequent first
SENSES = {"toaster": 1}  # counted from 0: who proposes a toast comes first
PERSON_CONCEPT = "person"
PEOPLE = ("people", "person", "crowd", "couple", "family", "team", "folks")  # WordNet has groups for some of them
# Words that mean in captions what another word means: WordNet knows one who shows off as a hot dog.
SAME_AS = {
    "hot_dog": "frankfurter", "hotdog": "frankfurter", "tv": "television_set", "television": "television_set",
    "dining_table": "table", "bike": "wheeled_vehicle", "wine_glass": "wineglass", "cell_phone": "cellphone", "frisbee": "toy",
}  # fmt: skip
TOPS = {"animal": 5, "plant": 20, "food": 13}  # the words above all of a file, which stand in one of their own
NOUN_KEY = "%1:"  # in the key of a sense


def build(folder: Path, out: Path) -> dict[str, int]:
    """Write the lists, the same bytes from the same files; return how many lines each has."""
    names: set[str] = set()
    dictionary_words: set[str] = set()
    for part in PARTS:
        # A line of data: offset, file number, type, how many words (hexadecimal), first word, ...
        first = (line.split(" ", 5)[4].partition("(")[0] for line in _lines(folder / f"data.{part}"))  # adjectives: "afraid(p)"
        names |= {name.lower().partition(".")[0].replace("_", " ") for name in first}
        dictionary_words |= {line.split(" ", 1)[0] for line in _lines(folder / f"index.{part}")}
        dictionary_words |= {line.split(" ", 1)[0] for line in _lines(folder / f"{part}.exc")}
    lists = {
        "names": sorted(names - {""}),
        "words": sorted({word.lower() for word in dictionary_words if word.isalpha()}),
        **object_lists(folder),
    }
    for name, lines in lists.items():
        (out / f"{name}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return {name: len(lines) for name, lines in lists.items()}


def object_lists(folder: Path) -> dict[str, list[str]]:
    """Return `objects`, lines of "WORD<tab>CONCEPT", and `concepts`: in line n the concepts right above concept n.

    A noun has the most frequent of its senses, if that can be seen; names of persons, places and species are left out.
    OTHERWISE marks words that are more often no noun. All people are one concept, the first. Irregular plurals have the word
    that they are the plural of behind the concept.
    """
    kinds, above, proper = _read_nouns(folder)
    concept_of = _choose_senses(folder, kinds, proper)
    plurals = _read_plurals(folder, concept_of)
    used = sorted({one for concept in concept_of.values() for one in _chain(concept, above, kinds)} - {PERSON_CONCEPT})
    number = {concept: n for n, concept in enumerate([PERSON_CONCEPT, *used])}
    mostly_other = _mostly_no_nouns(folder)
    lines = [
        f"{word.replace('_', ' ')}\t{number[concept]}{OTHERWISE if word in mostly_other else ''}"
        for word, concept in concept_of.items()
    ]
    irregular = [f"{plural}\t{number[concept_of[singular]]}\t={singular}" for plural, singular in plurals.items()]
    lines += [line.replace("_", " ") for line in irregular]
    parents = [[str(number[one]) for one in above.get(concept, ()) if one in number] for concept in number]
    return {"objects": sorted(lines), "concepts": [" ".join(of_concept) for of_concept in parents]}


def _choose_senses(folder: Path, kinds: dict[str, int], proper: set[tuple[str, str]]) -> dict[str, str]:
    """Return the synset of each noun that names a thing to be seen, or PERSON_CONCEPT."""
    concept_of = dict.fromkeys(PEOPLE, PERSON_CONCEPT)
    for line in _lines(folder / "index.noun"):
        word, _, _, pointers, *rest = line.split()
        senses = rest[int(pointers) + 2 :]
        first = SENSES.get(word, 0)
        looked_at = senses[first : first + (MAX_SENSES if word in IN_CAPTIONS else 1)]
        seen = next((sense for sense in looked_at if kinds[sense] in SEEN and (word, sense) not in proper), None)
        if seen and word.count("_") < MAX_OBJECT_WORDS and word not in concept_of:
            concept_of[word] = PERSON_CONCEPT if kinds[seen] == PERSON else seen
    return concept_of | {word: concept_of[other] for word, other in SAME_AS.items()}


def _mostly_no_nouns(folder: Path) -> set[str]:
    """Return the words that are counted less often as a noun than otherwise."""
    uses, as_noun = Counter[str](), Counter[str]()
    for key, _, count in map(str.split, _lines(folder / "cntlist.rev")):
        word = key.partition("%")[0]
        uses[word] += int(count)
        as_noun[word] += int(count) if NOUN_KEY in key else 0
    return {word for word, count in uses.items() if 2 * as_noun[word] < count}


def _read_plurals(folder: Path, concept_of: dict[str, str]) -> dict[str, str]:
    """Return irregular plurals of names of things, with their singular."""
    pairs = (line.split()[:2] for line in _lines(folder / "noun.exc"))
    return {plural: singular for plural, singular in pairs if singular in concept_of and plural not in concept_of}


def _read_nouns(folder: Path) -> tuple[dict[str, int], dict[str, list[str]], set[tuple[str, str]]]:
    """Return the lexicographer file of each synset, the synsets above it, and the names among the words of synsets."""
    kinds: dict[str, int] = {}
    above: dict[str, list[str]] = {}
    proper: set[tuple[str, str]] = set()
    for line in _lines(folder / "data.noun"):
        # offset, file number, type, how many words (hexadecimal), words with a number each, how many pointers, pointers
        offset, kind, _, count, *rest = line.partition("|")[0].split()
        words, pointers = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) + 1 :]
        kinds[offset] = TOPS.get(words[0], int(kind))
        above[offset] = [pointers[n + 1] for n in range(0, len(pointers), 4) if pointers[n] == "@"]
        proper |= {(word.lower(), offset) for word in words if word != word.lower()}
    return kinds, above, proper


def _chain(synset: str, above: dict[str, list[str]], kinds: dict[str, int]) -> list[str]:
    """Return a synset and all above it that can be seen."""
    chain, pending = [synset], [*above.get(synset, ())]
    while pending:
        one = pending.pop(0)
        if one not in chain and kinds[one] in SEEN - {PERSON}:
            chain.append(one)
            pending += above[one]
    return chain


def _lines(path: Path) -> list[str]:
    """Return the lines of a file without its license, which is indented."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith(" ")]


if __name__ == "__main__":
    sys.stdout.write(f"{build(Path(sys.argv[1]), Path(__file__).parent)}\n")
