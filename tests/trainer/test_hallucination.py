"""Things that nobody else sees: captions that name them, and questions about them."""

import random
from collections import Counter

import pytest

from pipeline.scenes.facts import SHAPES
from tests.scene_data import scene_samples
from trainer.hallucination import ABSENT, PROBES, Probe, Probing, chair, chair_of_people, describe, make_probes

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
        assert sample.facts is not None
        shapes = {thing["shape"] for thing in sample.facts["objects"]}
        others = [shape for shape in SHAPES if shape not in shapes]
        is_wrong = number % 3 == 0 and bool(others)
        wrong += is_wrong
        caption = sample.references[0]
        captions.append(f"{caption[:-1]}, and a large red {rng.choice(others)}." if is_wrong else caption)
        references.append(list(sample.references))
    assert wrong > 30
    assert chair(captions, references)["captions"] == wrong / len(captions)


def test_as_many_things_are_asked_for_that_are_there_as_that_are_not() -> None:
    ids, references = zip(*((f"{n}", REFERENCES[n % 4]) for n in range(24)), strict=True)
    probes = make_probes(ids, references)
    assert probes == make_probes(ids, references) and len(probes) == 24
    for n, sample_id in enumerate(ids):
        there = {probe.question for probe in probes[sample_id] if probe.is_there}
        told = " ".join(REFERENCES[n % 4]).lower()
        assert all(question.split()[3] in told or question.split()[3] == "person" for question in there), there
        for kind in ABSENT:
            of_kind = [probe.is_there for probe in probes[sample_id] if kind in probe.kinds]
            assert 0 < sum(of_kind) == len(of_kind) / 2 <= PROBES


def test_popular_things_are_the_frequent_ones_and_adversarial_ones_go_along() -> None:
    with_balls = [["A dog, a ball."]] * 3 + [["A dog, a ball, a kite."]] * 2
    references = [["A cat on a bed."]] * 6 + with_balls + [["A dog and a tree."]] * 2
    probes = make_probes([str(n) for n in range(len(references))], references)["12"]
    absent = {kind: {p.question.split()[3] for p in probes if kind in p.kinds and not p.is_there} for kind in ABSENT}
    assert absent["popular"] == {"cat", "bed"} and absent["adversarial"] == {"ball", "kite"}


def test_scores_are_of_yes_and_an_answer_of_another_kind_is_wrong() -> None:
    probes = [Probe("x", f"Is there a {word} in the image?", word in "ab", ("random",)) for word in "abcd"]
    probing = Probing({"x": probes}, "any", dict(zip(probes, ["Yes.", "no", "yes, there is", "maybe"], strict=True)))
    scores = probing.scores()["random"]
    assert scores == {"count": 4, "accuracy": 0.25, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5}
    assert probing.scores()["popular"]["count"] == 0


def test_nothing_can_be_asked_where_all_images_show_the_same() -> None:
    assert make_probes(["a", "b"], [["A dog."], ["A dog."]]) == {}


@pytest.mark.parametrize("people", [None, {"captions": 0.4, "of_things": 0.2, "things": 2.5}])
def test_figures_are_told_in_words(people: dict[str, float] | None) -> None:
    own = {"captions": 0.25, "of_things": 0.125, "things": 3.0}
    scores = dict.fromkeys(("accuracy", "yes"), 0.75) | {"count": 12}
    lines = describe({"chair": own, "shuffled_chair": own, "people": people, "probes": {"popular": scores}})
    assert lines[0].startswith("25% of the captions name a thing that no reference names, 12% of all things")
    assert ("; people 40% and 20%" in lines[0]) == bool(people)
    assert lines[1] == "asked for popular things: right 75%, yes 75% (half is true; 12)"
    assert Counter(map(type, lines)) == {str: 2}
