"""Examples: rows of a version as texts to learn, their views, and the order of batches."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import TrainError
from trainer.config import usual_texts
from trainer.data import batches, count_words, limit_captions, limit_images, read_examples
from trainer.tokenizer import TargetText

ROW: dict[str, Any] = {
    "sample_id": "a",
    "captions": [{"text": "A ring.", "style": "brief", "prompt_id": "p"}],
    "references": ["One ring.", "A circle."],
    "qa": [{"question": "How many?", "answer": "1", "answer_type": "number"}],
    "reference_qa": [{"question": "What?", "answers": ["ring", "hoop", "ring"], "answer_type": "other"}],
}


IMAGES = {**{str(n): b"x" for n in range(50)}, "a": b"x"}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([ROW | row for row in rows])


def test_the_texts_of_the_model_those_of_people_or_both() -> None:
    synthetic = {TargetText("synthetic", "A ring.", style="brief"), TargetText("synthetic", "1", question="How many?")}
    human = {
        TargetText("human", "One ring.", style="brief"),
        TargetText("human", "A circle.", style="brief"),
        TargetText("human", "ring", question="What?"),
    }
    for mixture, expected in (("synthetic", synthetic), ("human", human), ("mixed", synthetic | human)):
        (example,) = read_examples(table({}), IMAGES, mixture)  # type: ignore[arg-type]
        assert set(example.texts) == expected


def test_texts_of_people_that_went_through_all_stages_are_learned_in_place_of_the_references() -> None:
    kept = {"text": "One ring.", "style": "human", "prompt_id": "human"}
    asked = {"question": "What?", "answer": "ring", "answer_type": "other", "prompt_id": "human"}
    row = {"captions": [*ROW["captions"], kept], "qa": [{**ROW["qa"][0], "prompt_id": "p"}, asked]}
    rejected = {"sample_id": "b", "captions": [], "qa": [], "references": ["x"]}
    human = {TargetText("human", "One ring.", style="brief"), TargetText("human", "ring", question="What?")}
    synthetic = {TargetText("synthetic", "A ring.", style="brief"), TargetText("synthetic", "1", question="How many?")}
    for mixture, expected in (("synthetic", synthetic), ("human", human), ("mixed", synthetic | human)):
        examples = read_examples(table(row, rejected), IMAGES | {"b": b"x"}, mixture, keeps_human=True)  # type: ignore[arg-type]
        assert [set(example.texts) for example in examples] == [expected]


def test_a_persons_text_that_a_review_has_changed_is_still_a_persons() -> None:
    edited = {"text": "Two rings.", "style": "human", "prompt_id": "review"}
    asked = {"question": "What?", "answer": "rings", "answer_type": "other", "prompt_id": "review"}
    row = {"captions": [edited], "qa": [asked]}
    (example,) = read_examples(table(row), IMAGES, "human", keeps_human=True)
    human = {TargetText("human", "Two rings.", style="brief"), TargetText("human", "rings", question="What?")}
    assert set(example.texts) == human
    row["captions"] = [{**edited, "style": "plain"}]  # of a model, before
    (example,) = read_examples(table(row), IMAGES, "synthetic", keeps_human=True)
    assert set(example.texts) == {TargetText("synthetic", "Two rings.", style="plain")}


@pytest.mark.parametrize(
    ("measured", "model", "expected"),
    [
        ({}, "m", "synthetic"),
        ({"human_captions": 3}, "none", "human"),
        ({"human_captions": 3}, "m", "mixed"),
        ({"human_questions": 3}, "m", "mixed"),
    ],
)
def test_a_version_says_whose_texts_are_learned_unless_the_user_does(
    measured: dict[str, int], model: str, expected: str
) -> None:
    assert usual_texts({"measured": measured, "model": {"name": model}}) == expected


def test_questions_can_be_left_out_of_learning_and_are_still_there_to_score() -> None:
    (example,) = read_examples(table({}), IMAGES, questions=False)
    assert [text.style for text in example.texts] == ["brief"]
    assert [(q.question, q.answers) for q in example.questions] == [("What?", ("ring", "hoop", "ring"))]


def test_without_questions_of_people_those_of_the_model_are_scored() -> None:
    (example,) = read_examples(table({"reference_qa": None}), IMAGES)
    assert [(q.question, q.answers, q.answer_type) for q in example.questions] == [("How many?", ("1",), "number")]


def test_styles_can_be_chosen_and_the_source_can_be_left_out_of_the_prompt() -> None:
    two = [*ROW["captions"], {"text": "A red ring.", "style": "detailed", "prompt_id": "p"}]
    (example,) = read_examples(table({"captions": two}), IMAGES, "mixed", styles=("brief",), source_in_prompt=False)
    captions = {(text.source, text.text) for text in example.texts if text.style}
    assert captions == {("any", "A ring."), ("any", "One ring."), ("any", "A circle.")}
    assert {text.source for text in example.texts} == {"any"} and len(example.texts) == 5
    (scored,) = read_examples(table({"captions": two}), IMAGES, styles=("alt",), to_score=True)  # by its references
    assert scored.references and not any(text.style for text in scored.texts)
    with pytest.raises(TrainError, match="no caption of the styles alt") as caught:
        read_examples(table({}), IMAGES, styles=("alt",))
    assert caught.value.hint.endswith("those that there are: brief")


def test_fewer_images_are_some_of_those_of_a_larger_choice_in_any_order() -> None:
    examples = read_examples(table(*({"sample_id": str(n)} for n in range(50))), IMAGES)
    few, more = limit_images(examples, 10), limit_images(examples, 20)
    assert len(few) == 10 and len(more) == 20 and set(few) < set(more)
    assert set(limit_images(examples[::-1], 10)) == set(few)
    assert limit_images(examples, 0) == limit_images(examples, 60) == examples


def test_captions_fit_a_number_of_words_and_each_image_keeps_one() -> None:
    captions = [{"text": f"A ring of {'very ' * n}gold.", "style": "brief", "prompt_id": "p"} for n in range(4)]
    examples = read_examples(table(*({"sample_id": str(n), "captions": captions} for n in range(30))), IMAGES)

    def words(chosen: list[Any]) -> int:
        return sum(count_words(text) for example in chosen for text in example.texts if text.style)

    assert words(examples) == 30 * (4 + 5 + 6 + 7)
    limited = limit_captions(examples, 400)
    assert 394 <= words(limited) <= 400 and all(any(t.style for t in example.texts) for example in limited)
    assert all(sum(not text.style for text in example.texts) == 1 for example in limited)  # answers are not counted
    assert [e.sample_id for e in limit_captions(examples, 1)] == [e.sample_id for e in examples]
    assert all(sum(bool(text.style) for text in example.texts) == 1 for example in limit_captions(examples, 1))
    assert limit_captions(examples, 0) == examples
    shortest = limit_captions(examples, 121)  # captions chosen at random would be longer
    assert words(shortest) == 30 * 4
    repeated = replace(examples[0], texts=(examples[0].texts[0],) * 2)
    assert len(limit_captions([repeated], 4)[0].texts) == 1


def test_nothing_of_that_kind_to_learn_is_an_error() -> None:
    with pytest.raises(TrainError, match="no human captions"):
        read_examples(table({"references": []}), IMAGES, "human")
    with pytest.raises(TrainError, match="are decks"):
        read_examples(table({}), None)


def test_every_example_comes_once_an_epoch_in_another_order_each_time() -> None:
    steps = list(islice(batches(count=10, size=5, seed=0, first_step=0), 4))
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == [*range(10)] and first != second
    assert next(batches(50, 50, 0, 0)) != next(batches(50, 50, 1, 0))


@pytest.mark.parametrize("size", [3, 5, 7])
def test_starting_late_gives_the_rest_of_the_same_order(size: int) -> None:
    whole = list(islice(batches(count=10, size=size, seed=1, first_step=0), 8))
    assert list(islice(batches(count=10, size=size, seed=1, first_step=5), 3)) == whole[5:]


def test_images_with_references_alone_can_be_scored_and_not_learned_from() -> None:
    row: dict[str, Any] = {"captions": [], "qa": []}
    with pytest.raises(TrainError, match="no synthetic captions to learn from"):
        read_examples(table(row), IMAGES)
    (example,) = read_examples(table(row), IMAGES, to_score=True)
    assert (example.texts, example.references) == ((), ("One ring.", "A circle."))
