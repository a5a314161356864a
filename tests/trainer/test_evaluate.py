"""Evaluate: references of the source come first, and shuffled images lay a blind captioner bare."""

import pytest

from pipeline.errors import TrainError
from trainer.data import Example
from trainer.evaluate import _references, derangement, scored_style


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_shuffling_leaves_no_image_at_its_place(count: int) -> None:
    order = derangement(count)
    assert sorted(order) == list(range(count))
    assert all(there != here for here, there in enumerate(order))


def example(references: tuple[str, ...], style: str = "brief") -> Example:
    return Example(sample_id="x", image=b"", captions=((style, "A ring."),), references=references)


def test_scores_are_against_the_references_where_there_are_some() -> None:
    examples = [example(("A circle.", "One circle.")), example(())]
    against, scored, references = _references(examples, "brief")
    assert (against, references) == ("references of the source", [[["a", "circle"], ["one", "circle"]]])
    assert scored == examples[:1]


def test_without_references_they_are_against_the_teacher_and_say_so() -> None:
    examples = [example(()), example((), style="detailed"), example(())]
    against, scored, references = _references(examples, "brief")
    assert (against, references) == ("captions of the teacher", [[["a", "ring"]], [["a", "ring"]]])
    assert scored == [examples[0], examples[2]]


def test_images_with_nothing_to_score_against_are_an_error() -> None:
    with pytest.raises(TrainError, match="no held-out image has a reference or a brief caption"):
        _references([example((), style="detailed")], "brief")


def test_brief_captions_are_scored_where_there_are_some() -> None:
    assert scored_style(["brief", "detailed"]) == "brief"
    assert scored_style(["detailed"]) == "detailed"
