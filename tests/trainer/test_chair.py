"""Captions that name things which no reference names."""

import random

from pipeline.config import SCENES
from pipeline.scenes.scene import SHAPES, scenes_of
from tests.scene_data import scene_samples
from trainer.chair import chair, chair_of_people, count_unseen

REFERENCES = [
    ["A dog sits on a couch.", "A puppy lies on a sofa beside a lamp."],
    ["A man rides a horse on the beach.", "Someone on a horse near the ocean."],
    ["A cat sleeps on a bed.", "A cat in a bed."],
    ["A bus drives down the street.", "A red bus, and two cars."],
]


def test_a_thing_that_no_reference_names_counts_and_a_kind_of_it_does_not() -> None:
    captions = ["An animal on a sofa.", "A woman on a horse with a dog.", "A cat and a dog and a bowl.", "A vehicle."]
    assert chair(captions, REFERENCES) == {"captions": 0.5, "of_things": 3 / 9, "things": 9 / 4}
    assert chair([""], [["A dog."]]) == {"captions": 0.0, "of_things": 0.0, "things": 0.0}


def test_people_are_judged_by_each_other() -> None:
    of_people = chair_of_people(REFERENCES)
    assert of_people and of_people["captions"] == 0.5  # the beach, the street
    assert chair_of_people([["A dog."], ["A cat."]]) is None


def test_on_drawn_scenes_the_share_is_exact() -> None:
    """The facts of a scene say which shapes are there: one caption in three gets another one."""
    rng, captions, references, wrong = random.Random(3), [], [], 0
    for number, sample in enumerate(scene_samples(120)):
        (scene,) = scenes_of(SCENES, sample.source_row)
        shapes = {thing.shape for thing in scene.objects}
        others = [shape for shape in SHAPES if shape not in shapes]
        is_wrong = number % 3 == 0 and bool(others)
        wrong += is_wrong
        caption = sample.references[0]
        captions.append(f"{caption[:-1]}, and a large red {rng.choice(others)}." if is_wrong else caption)
        references.append(list(sample.references))
    assert wrong > 30
    assert chair(captions, references)["captions"] == wrong / len(captions)


def test_a_kind_and_what_it_is_a_kind_of_are_seen_and_a_sibling_is_not() -> None:
    assert count_unseen("An animal, a puppy and a cat.", ["A dog."]) == 1
    assert count_unseen("A dog.", ["An animal."]) == 0
    assert count_unseen("A woman.", ["Some people."]) == 0
