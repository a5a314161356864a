"""Select: of several captions of one image and style the best is kept, by each of its measures, with the worst beside it."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.dataset.manifest import StepSummary
from pipeline.errors import ConfigError
from pipeline.executors.messages import describe_losses
from pipeline.steps.select import STEP
from pipeline.tables import HUMAN, RUBRIC
from tests.step_runs import run_step

TEXTS = ("annotation_id", "sample_id", "task", "style", "prompt_id", "clean_text", "clean_question")
SCHEMA = pa.schema(
    [(name, pa.string()) for name in TEXTS]
    + [("word_count", pa.int32()), ("alignment", pa.float64()), ("agreement", pa.float64())]
    + [(name, pa.int32()) for name in RUBRIC]
)


def captions(*texts: str, **columns: Any) -> pa.Table:
    """Return captions of one image in one style; `columns` have a value for each, or one for all."""
    usual = {"sample_id": "s", "task": "caption", "style": "plain", "prompt_id": "p", "clean_question": None}
    rows = []
    for n, text in enumerate(texts):
        own = {name: value[n] if isinstance(value, list) else value for name, value in columns.items()}
        rows.append({"annotation_id": f"{n:06d}", "clean_text": text, "word_count": len(text.split()), **usual, **own})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def selected(rows: pa.Table, by: str = "consistency", shards: int = 1, **settings: Any) -> pa.Table:
    verify = {"clip": {"checks": ["alignment"]}, "longest": {"checks": ["claims"]}, "judge": {"judge": "m@http://h/v1"}}
    settings = {"verify": verify.get(by, {}), "generate": {"samples": 4}, **settings}
    return run_step(STEP, rows, shards, select={"by": by}, **settings)


def kept(rows: pa.Table, **settings: Any) -> list[str]:
    marked = selected(rows, **settings)
    return [
        text for text, reason in zip(marked["clean_text"].to_pylist(), marked["reason"].to_pylist(), strict=True) if not reason
    ]


def test_what_one_caption_alone_says_is_likely_made_up() -> None:
    rows = captions("A dog on grass.", "A dog runs on grass.", "A dog runs on grass with a red ball.", "A cat sleeps.")
    marked = selected(rows)
    assert marked["reason"].to_pylist() == ["not_the_best", None, "not_the_best", "not_the_best"]
    assert marked["rejected_text"].to_pylist() == [None, "A cat sleeps.", None, None]
    # Content words: {dog, on, grass}, {dog, runs, on, grass}, {..., red, ball}, and F1 with each of the others.
    assert marked["selection_score"][1].as_py() == pytest.approx((6 / 7 + 8 / 10 + 0) / 3)
    assert kept(captions("A dog.", "A cat sleeps on a mat.", "A cat sleeps on a mat.")) == ["A cat sleeps on a mat."]


def test_the_best_is_the_best_aligned_the_best_rated_or_the_longest() -> None:
    rows = captions("A dog here.", "A dog on grass.", "A dog.", alignment=[0.2, 0.1, 0.3])
    assert kept(rows, by="clip") == ["A dog."]
    long = captions("A dog here.", "A dog on grass.", "A dog and a horse on grass.", agreement=[1.0, 1.0, 0.5])
    assert kept(long, by="longest") == ["A dog on grass."]  # of a longer one not all was confirmed
    unread = captions("A dog on grass.", "A dog.", agreement=[None, 1.0])
    assert kept(unread, by="longest") == ["A dog."]
    marks = {name: [4, 5, 3] for name in RUBRIC} | {"form": [5, 1, 5]}
    assert kept(captions("One.", "Two.", "Three.", **marks), by="judge") == ["One."]


def test_a_caption_that_was_not_measured_is_no_better_than_one_that_was() -> None:
    rows = captions("A dog.", "A cat.", "A cow.", alignment=[None, 0.1, -0.2])
    marked = selected(rows, by="clip")
    assert marked["reason"].to_pylist() == ["not_the_best", None, "not_the_best"]
    assert marked["rejected_text"][1].as_py() == "A cow."
    assert kept(captions("One.", "Two."), by="clip") == ["One."]  # none was: the first is kept


def test_what_the_model_wrote_again_is_told_from_what_is_worse() -> None:
    marked = selected(captions("A dog.", "A cat.", "A dog.", "A dog."))
    assert marked["reason"].to_pylist() == [None, "not_the_best", "same_as_the_best", "same_as_the_best"]
    funnel = [StepSummary("select", "annotations", 6, 2, {"not_the_best": 1, "same_as_the_best": 3})]
    (text,) = describe_losses([STEP], funnel)
    assert text.startswith("3 of 4 captions that were not selected equal the selected one: ")


def test_of_equal_ones_the_first_is_kept_and_none_is_the_worse() -> None:
    marked = selected(captions("A dog.", "The dog.", "A dog!"))
    assert marked["reason"].to_pylist() == [None, "not_the_best", "not_the_best"]
    assert marked["rejected_text"].null_count == 3
    for texts in (
        ("A red dog runs.", "A cat sits on a mat.", "The dog runs fast here."),
        ("One.", "Two three.", "Three four."),
    ):
        twins = [*texts, *texts]  # the same numbers are added up in another order
        marked = selected(captions(*twins))
        assert marked["reason"].to_pylist().index(None) < len(texts)
        scores = marked["selection_score"].to_pylist()
        assert scores[: len(texts)] == scores[len(texts) :]
    swapped = captions("A red ring, a star.", "A star, a red ring.", alignment=[0.2, 0.1])
    assert selected(swapped, by="clip")["rejected_text"].null_count == 2  # it has a lower score, and the same words


@pytest.mark.parametrize("shards", [1, 3])
def test_captions_of_other_images_and_styles_people_and_questions_are_left_alone(shards: int) -> None:
    texts = ("A dog.", "A cat.", "", "A man.", "A woman.", "A tree.")
    styles = ["plain", "plain", "", "human", "human", "brief"]
    makers = ["p", "p", "p", HUMAN, HUMAN, "p"]
    rows = captions(*texts, sample_id=["a", "b", "b", "c", "c", "b"], style=styles, prompt_id=makers)
    rows = rows.set_column(5, "clean_text", pa.array([text or None for text in texts]))  # the third is a question
    assert selected(rows, shards=shards)["reason"].null_count == 6


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"select": {"pairs": True}}, "chooses among several captions: --samples 4"),
        ({"select": {"by": "clip"}, "generate": {"samples": 2}}, "--verify alignment"),
        ({"select": {"by": "judge"}, "generate": {"samples": 2}}, "--judge MODEL@URL"),
        ({"select": {"by": "longest"}, "generate": {"samples": 2}}, "--verify claims"),
    ],
)
def test_a_measure_that_nothing_measures_is_an_error_before_anything_is_asked(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(source="scenes", **settings)
    assert what in str(caught.value)
