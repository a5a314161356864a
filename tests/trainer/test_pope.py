"""Questions for things that are in an image, and for as many that are not."""

from pipeline.text.objects import is_kind_of, named_things
from trainer.pope import ABSENT_KINDS, MAX_PROBES, PopeEvaluation, Probe, make_probes

REFERENCES = [
    ["A dog sits on a couch.", "A puppy lies on a sofa beside a lamp."],
    ["A man rides a horse on the beach.", "Someone on a horse near the ocean."],
    ["A woman and a cat on a bed.", "A cat in a bed."],
    ["A bus drives down the street.", "A red bus, and two cars."],
]


def test_as_many_things_are_asked_for_that_are_there_as_that_are_not() -> None:
    ids, references = zip(*((f"{n}", REFERENCES[n % 4]) for n in range(24)), strict=True)
    probes = make_probes(ids, references)
    assert probes == make_probes(ids, references) and len(probes) == 24
    for n, sample_id in enumerate(ids):
        concepts = {thing.concept for text in REFERENCES[n % 4] for thing in named_things(text)}
        for probe in probes[sample_id]:
            (thing,) = named_things(probe.question.removesuffix(" in the image?"))
            assert any(is_kind_of(thing.concept, one) for one in concepts) == probe.is_there, probe
        for kind in ABSENT_KINDS:
            of_kind = [probe.is_there for probe in probes[sample_id] if kind in probe.kinds]
            assert 0 < sum(of_kind) == len(of_kind) / 2 <= MAX_PROBES


def test_popular_things_are_the_frequent_ones_and_adversarial_ones_go_along() -> None:
    with_balls = [["A dog, a ball."]] * 3 + [["A dog, a ball, a kite."]] * 2
    references = [["A cat on a bed."]] * 6 + with_balls + [["A dog and a tree."]] * 2
    probes = make_probes([str(n) for n in range(len(references))], references)["12"]
    absent = {kind: {p.question.split()[3] for p in probes if kind in p.kinds and not p.is_there} for kind in ABSENT_KINDS}
    assert absent["popular"] == {"cat", "bed"} and absent["adversarial"] == {"ball", "kite"}


def test_scores_are_of_yes_and_an_answer_of_another_kind_is_wrong() -> None:
    probes = [Probe("x", f"Is there a {word} in the image?", word in "ab", ("random",)) for word in "abcd"]
    probing = PopeEvaluation({"x": probes}, "any", dict(zip(probes, ["Yes.", "no", "yes, there is", "maybe"], strict=True)))
    scores = probing.scores()["random"]
    assert scores == {"count": 4, "accuracy": 0.25, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5, "neither": 0.25}
    assert probing.scores()["popular"]["count"] == 0


def test_nothing_can_be_asked_where_all_images_show_the_same() -> None:
    assert make_probes(["a", "b"], [["A dog."], ["A dog."]]) == {}


def test_people_are_asked_for_as_a_person_and_plurals_in_the_singular() -> None:
    references = [["A man and two buses on the grass."], ["Women beside a bus on grass."], ["A cat."], ["Cats."]]
    questions = {probe.question for of_image in make_probes(list("abcd"), references).values() for probe in of_image}
    assert questions == {f"Is there {what} in the image?" for what in ("a person", "a bus", "any grass", "a cat")}


def test_a_thing_of_one_image_alone_is_not_asked_for() -> None:
    references = [["A dog and a zebra."], ["A dog."], ["A cat."], ["A cat."]]
    questions = {probe.question for of_image in make_probes(list("abcd"), references).values() for probe in of_image}
    assert questions == {"Is there a dog in the image?", "Is there a cat in the image?"}
