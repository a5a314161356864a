"""Turn true statements into false ones: replace an object, color, number or relation by another one."""

from collections.abc import Callable, Collection, Iterator

from pipeline.text import WORDS
from pipeline.text.normalize import words_of

_COLORS = "red orange yellow green blue purple pink black white gray brown"
_NUMBERS = ("two three four five six", "2 3 4 5 6")
_OPPOSITES = (
    *("left right", "above below", "under over", "inside outside"),
    *("open closed", "standing sitting", "day night", "small large"),
)
GROUPS = {
    "object": [line.split()[1:] for line in WORDS["objects"].strip().splitlines()],
    "color": [_COLORS.split()],
    "number": [line.split() for line in _NUMBERS],
    "relation": [pair.split() for pair in _OPPOSITES],
}


def plant_falsehoods(
    statement: str, said: Collection[str], rank: Callable[[str], float]
) -> Iterator[tuple[str, str]]:
    """Yield (kind, false statement) for each kind of falsehood that fits.

    `said` has the words of all texts about the image. These words are never used as replacements, because the
    result could be true. The candidates with the lowest `rank` are used.
    """
    words = statement.split(" ")
    keys = ["".join(words_of(word)) for word in words]
    for kind, groups in GROUPS.items():
        places = [(n, swap) for n, key in enumerate(keys) if (swap := _swap(key, groups, said, rank))]
        if places:
            place, new = min(places, key=lambda found: rank(f"{kind} {found[0]}"))
            old = keys[place]
            changed = [*words]
            changed[place] = words[place].lower().replace(old, new)
            if place and keys[place - 1] in ("a", "an"):
                article = "an" if new[0] in "aeiou" else "a"
                changed[place - 1] = article.capitalize() if place == 1 else article
            text = " ".join(changed)
            yield kind, text[:1].upper() + text[1:] if statement[:1].isupper() else text


def _swap(
    word: str, groups: list[list[str]], said: Collection[str], rank: Callable[[str], float]
) -> str | None:
    """Return another word of the same group, in the plural if `word` is a plural, or None."""
    is_plural = not any(word in group for group in groups) and word.endswith("s")
    singular = word[:-1] if is_plural else word
    group = next((group for group in groups if singular in group), [])
    candidates = [name for name in group if name != singular and not {name, _plural(name)} & {*said}]
    if not candidates:
        return None
    best = min(candidates, key=rank)
    return _plural(best) if is_plural else best


def _plural(name: str) -> str:
    return name + ("es" if name.endswith(("s", "ch", "sh")) else "s")
