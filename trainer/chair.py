"""CHAIR (Rohrbach et al., 2018): how often captions name a thing that is not in the image.

It was made for the 80 objects of COCO, which people have marked in every image. Here a thing counts as seen if a reference
names it, a kind of it, or the kind that it is of, by WordNet (pipeline/text/objects.py). References leave things out, walls and
the sky above all: the shares are too high, and mean something beside those of people, and of the captions of other images.
"""

from collections.abc import Sequence

from pipeline.text.objects import is_kind_of, named_things


def chair(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of captions that name a thing which no reference names, and the share of such things.

    `things` is how many a caption names on average.
    """
    pairs = zip(captions, references, strict=True)
    unseen = [count_unseen(caption, of_image) for caption, of_image in pairs]
    named = [sum(1 for _ in named_things(caption)) for caption in captions]
    return {
        "captions": sum(map(bool, unseen)) / max(1, len(unseen)),
        "of_things": sum(unseen) / max(1, sum(named)),
        "things": sum(named) / max(1, len(named)),
    }


def chair_of_people(references: Sequence[Sequence[str]]) -> dict[str, float] | None:
    """Return CHAIR of the first reference of each image by the others; None if no image has several."""
    several = [of_image for of_image in references if len(of_image) > 1]
    return chair([of_image[0] for of_image in several], [of_image[1:] for of_image in several]) if several else None


def count_unseen(caption: str, references: Sequence[str]) -> int:
    """Return how many things a caption names that no reference names."""
    seen = {thing.concept for reference in references for thing in named_things(reference)}
    return sum(not any(is_kind_of(thing.concept, other) for other in seen) for thing in named_things(caption))
