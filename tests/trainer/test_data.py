"""Examples: the texts to learn, limits on images and captions, and the order of batches."""

from itertools import islice
from typing import Any

import pyarrow as pa
import pytest

from pipeline.errors import TrainError
from trainer.config import default_texts
from trainer.data import Question, batches, read_examples
from trainer.tokenizer import TargetText

ROW: dict[str, Any] = {
    "sample_id": "a",
    "captions": [{"text": "A ring.", "style": "brief", "prompt_id": "p"}],
    "references": ["One ring.", "A circle."],
    "qa": [{"question": "How many?", "answer": "1", "answer_type": "number"}],
    "reference_qa": [{"question": "What?", "answers": ["ring", "hoop", "ring"], "answer_type": "other"}],
}


SYNTHETIC = {
    TargetText("synthetic", "A ring.", style="brief"),
    TargetText("synthetic", "1", question="How many?"),
}
IMAGES = {**{str(n): b"x" for n in range(50)}, "a": b"x"}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([ROW | row for row in rows])


@pytest.mark.parametrize("keeps_human", [False, True])
def test_mixture_selects_synthetic_human_or_both_texts(*, keeps_human: bool) -> None:
    kept = {"text": "One ring.", "style": "human", "prompt_id": "human"}
    asked = {"question": "What?", "answer": "ring", "answer_type": "other", "prompt_id": "human"}
    row = {"captions": [*ROW["captions"], kept], "qa": [{**ROW["qa"][0], "prompt_id": "p"}, asked]}
    rejected = {"sample_id": "b", "captions": [], "qa": [], "references": ["x"]}
    rows = table(row, rejected) if keeps_human else table({})
    human = {TargetText("human", "One ring.", style="brief"), TargetText("human", "ring", question="What?")}
    if not keeps_human:
        human |= {TargetText("human", "A circle.", style="brief")}
    mixtures: dict[Any, set[TargetText]]
    mixtures = {"synthetic": SYNTHETIC, "human": human, "mixed": SYNTHETIC | human}
    for mixture, expected in mixtures.items():
        examples = read_examples(rows, IMAGES | {"b": b"x"}, mixture, keeps_human=keeps_human)
        assert [set(example.texts) for example in examples] == [expected]


def test_human_text_that_a_review_edited_stays_human() -> None:
    edited = {"text": "Two rings.", "style": "human", "prompt_id": "review"}
    asked = {"question": "What?", "answer": "rings", "answer_type": "other", "prompt_id": "review"}
    row = {"captions": [edited], "qa": [asked]}
    (example,) = read_examples(table(row), IMAGES, "human", keeps_human=True)
    human = {TargetText("human", "Two rings.", style="brief"), TargetText("human", "rings", question="What?")}
    assert set(example.texts) == human
    row["captions"] = [{**edited, "style": "plain"}]
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
def test_default_mixture_depends_on_the_version(measured: dict[str, int], model: str, expected: str) -> None:
    assert default_texts({"measured": measured, "model": {"name": model}}) == expected


def test_synthetic_questions_are_scored_if_there_are_no_human_questions() -> None:
    (example,) = read_examples(table({"reference_qa": None}), IMAGES)
    assert example.questions == (Question("How many?", ("1",), "number"),)


def test_dataset_without_texts_or_with_decks_is_refused() -> None:
    with pytest.raises(TrainError, match="no human captions"):
        read_examples(table({"references": []}), IMAGES, "human")
    with pytest.raises(TrainError, match="are decks"):
        read_examples(table({}), None)


def test_each_epoch_has_every_example_once_in_a_new_order() -> None:
    steps = list(islice(batches(count=10, size=5, seed=0, first_step=0), 4))
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == [*range(10)] and first != second
    assert next(batches(50, 50, 0, 0)) != next(batches(50, 50, 1, 0))


@pytest.mark.parametrize("size", [3, 5, 7])
def test_batches_from_a_later_step_continue_the_same_order(size: int) -> None:
    whole = list(islice(batches(count=10, size=size, seed=1, first_step=0), 8))
    assert list(islice(batches(count=10, size=size, seed=1, first_step=5), 3)) == whole[5:]


def test_image_with_only_references_is_scored_but_not_trained_on() -> None:
    row: dict[str, Any] = {"captions": [], "qa": []}
    with pytest.raises(TrainError, match="no synthetic captions to train on"):
        read_examples(table(row), IMAGES)
    (example,) = read_examples(table(row), IMAGES, to_score=True)
    assert (example.texts, example.references) == ((), ("One ring.", "A circle."))
