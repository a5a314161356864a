"""Things that a text names: by whatever word, in singular and plural, and no words that look like them."""

import pytest

from pipeline.scenes.scene import SHAPES
from pipeline.text.objects import is_kind_of, named_things


def words(text: str) -> list[str]:
    return [thing.word for thing in named_things(text)]


def is_same(one: str, other: str) -> bool:
    ((first,), (second,)) = (list(named_things(f"a {word}")) for word in (one, other))
    return is_kind_of(first.concept, second.concept)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs run past a fire hydrant.", ["dog", "fire hydrant"]),
        ("A man flies a kite while boys watch.", ["man", "kite", "boy"]),
        ("Men train for a race beside a train.", ["man", "train"]),
        ("The man trains with a large red watch.", ["man", "watch"]),
        ("A train station with benches and puppies.", ["train station", "bench", "puppy"]),
        ("There are two women; some people eat hot dogs.", ["woman", "people", "hot dog"]),
        ("The picture shows the top of a mountain.", ["mountain"]),
        ("A small red car in the background of the image.", ["car"]),
        ("A couple of dogs, a crowd of sheep and a couple on a bench.", ["dog", "sheep", "couple", "bench"]),
        ("It is beautiful, isn't it?", []),
        ("", []),
    ],
)
def test_things_are_found_and_other_words_are_not(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dog", "puppy"), ("couch", "sofa"), ("man", "skateboarder"), ("bike", "bicycle"), ("dog", "animal"), ("men", "person"),
        ("dining table", "table"), ("tv", "television"), ("hot dog", "hotdog"), ("mice", "mouse"), ("plane", "airplane"),
    ],
)  # fmt: skip
def test_a_thing_is_the_same_by_another_word_or_as_a_kind(one: str, other: str) -> None:
    assert is_same(one, other) and is_same(other, one)


COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, fire hydrant, parking meter, bench, bird, cat, dog,
horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, ski, snowboard,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""


@pytest.mark.parametrize("name", COCO.strip().replace("\n", " ").split(", "))
def test_each_object_of_coco_is_one_thing_and_only_persons_are_people(name: str) -> None:
    """Four of the eighty have a name of two words that is none of WordNet's: a traffic light is a light."""
    (thing,) = named_things(f"There is a {name} here.")
    assert thing.word == name
    assert (thing.concept == 0) == (name == "person")


@pytest.mark.parametrize(
    ("one", "other"), [("dog", "cat"), ("car", "bus"), ("table", "chair"), ("man", "dog"), ("fork", "spoon")]
)
def test_other_things_are_others(one: str, other: str) -> None:
    assert not is_same(one, other)


def test_the_shapes_of_drawn_scenes_are_things_and_all_different() -> None:
    concepts = [thing.concept for shape in SHAPES for thing in named_things(f"A small blue {shape}.")]
    assert len(concepts) == len(SHAPES)
    assert not [(one, other) for one in concepts for other in concepts if one != other and is_kind_of(one, other)]
