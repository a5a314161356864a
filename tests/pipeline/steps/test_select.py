"""Of several captions of one image and style, the best is kept with the text of the worst."""

from typing import Any

import pyarrow as pa
import pytest

from pipeline.config.files import resolve
from pipeline.dataset.manifest import StepSummary
from pipeline.errors import ConfigError
from pipeline.executors.messages import describe_losses
from pipeline.steps.select import STEP
from pipeline.tables import FLOAT64, HUMAN, INT32, RUBRIC, STRING, fields
from tests.step_runs import numbered_table, run_step

TEXTS = ("annotation_id", "sample_id", "task", "style", "prompt_id", "clean_text", "clean_question")
SCHEMA = pa.schema(
    [*fields(STRING, *TEXTS), *fields(FLOAT64, "alignment", "logprob_mean"), *fields(INT32, *RUBRIC)]
)


def captions(*texts: str, **columns: Any) -> pa.Table:
    """Return captions of one image in one style; `columns` have a value for each, or one for all."""
    rows = []
    for n, text in enumerate(texts):
        values = {name: value[n] if isinstance(value, list) else value for name, value in columns.items()}
        rows.append({"clean_text": text, **values})
    return numbered_table(SCHEMA, rows, sample_id="s", task="caption", style="plain", prompt_id="p")


def selected(rows: pa.Table, by: str = "likelihood", shards: int = 1, **settings: Any) -> pa.Table:
    needed = {"clip": {"checks": ["alignment"]}, "judge": {"judge": "m@http://h/v1"}}
    settings = {"verify": needed.get(by, {}), "generate": {"samples": 4}, **settings}
    return run_step(STEP, rows, shards, select={"by": by}, **settings)


def kept(rows: pa.Table, **settings: Any) -> list[str]:
    return [row["clean_text"] for row in selected(rows, **settings).to_pylist() if not row["reason"]]


def test_most_likely_caption_is_kept() -> None:
    marked = selected(captions("A dog.", "A cat.", "A cow.", logprob_mean=[-0.5, -0.25, -1.0]))
    assert marked["reason"].to_pylist() == ["not_the_best", None, "not_the_best"]
    assert marked["rejected_text"].to_pylist() == [None, "A cow.", None]
    assert marked["selection_score"].to_pylist() == [-0.5, -0.25, -1.0]
    # A server may not return the log-probabilities, and an earlier run may not have asked for them.
    marked = selected(captions("A dog.", "A cat.", "A cow.", logprob_mean=[None, -0.25, -1.0]))
    assert marked["reason"].to_pylist() == [None, "not_the_best", "not_the_best"]
    assert marked["rejected_text"].null_count == 3


def test_best_caption_is_kept_by_clip_score_or_judge() -> None:
    marks = {name: [4, 5, 3] for name in RUBRIC} | {"form": [5, 1, 5]}
    assert kept(captions("One.", "Two.", "Three.", **marks), by="judge") == ["One."]
    # A caption without a score is not preferred.
    marked = selected(captions("A dog.", "A cat.", "A cow.", alignment=[None, 0.1, -0.2]), by="clip")
    assert marked["reason"].to_pylist() == ["not_the_best", None, "not_the_best"]
    assert marked["rejected_text"][1].as_py() == "A cow."
    assert kept(captions("One.", "Two."), by="clip") == ["One."]


def test_repeat_of_the_best_caption_is_rejected_with_a_separate_reason() -> None:
    texts = ("A dog.", "A cat.", "A dog.", "A dog.")
    marked = selected(captions(*texts, logprob_mean=[-1.0, -2.0, -1.0, -1.0]))
    assert marked["reason"].to_pylist() == [None, "not_the_best", "same_as_the_best", "same_as_the_best"]
    funnel = [StepSummary("select", "annotations", 6, 2, {"not_the_best": 1, "same_as_the_best": 3})]
    (text,) = describe_losses([STEP], funnel)
    assert text.startswith("3 of 4 unselected captions are the same as the selected caption: ")


def test_first_of_tied_captions_is_kept_without_a_rejected_text() -> None:
    marked = selected(captions("A dog.", "A cat.", "A cow.", logprob_mean=[-1.0, -1.0, -1.0]))
    assert marked["reason"].to_pylist() == [None, "not_the_best", "not_the_best"]
    assert marked["rejected_text"].null_count == 3
    # A caption with a lower score but the same words is not a rejected text.
    swapped = captions("A red ring, a star.", "A star, a red ring.", alignment=[0.2, 0.1])
    assert selected(swapped, by="clip")["rejected_text"].null_count == 2


@pytest.mark.parametrize("shards", [1, 3])
def test_only_captions_of_one_image_and_style_compete(shards: int) -> None:
    texts = ("A dog.", "A cat.", "", "A man.", "A woman.", "A tree.")
    styles = ["plain", "plain", "", "human", "human", "brief"]
    makers = ["p", "p", "p", HUMAN, HUMAN, "p"]
    rows = captions(*texts, sample_id=["a", "b", "b", "c", "c", "b"], style=styles, prompt_id=makers)
    # The third row is a question.
    rows = rows.set_column(5, "clean_text", pa.array([text or None for text in texts]))
    assert selected(rows, shards=shards)["reason"].null_count == 6


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"select": {"pairs": True}}, "needs several captions to choose from: pass --samples 4"),
        ({"select": {"by": "clip"}, "generate": {"samples": 2}}, "--verify alignment"),
        ({"select": {"by": "judge"}, "generate": {"samples": 2}}, "--judge MODEL@URL"),
    ],
)
def test_selection_rule_without_the_check_it_needs_is_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(source="scenes", **settings)
    assert what in str(caught.value)
