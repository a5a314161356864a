"""Step version: rejections name what was rejected, and why, without its words."""

import pyarrow as pa

from pipeline.steps.write import list_rejections
from pipeline.tables import REJECTIONS
from tests.scene_data import scene_samples, true_captions


def test_rejections_hold_no_words_of_a_model() -> None:
    captions = true_captions(scene_samples(20))
    rejections = list_rejections("filter", captions.append_column("reason", pa.array(["refusal"] * captions.num_rows)))
    assert rejections.schema == REJECTIONS
    assert rejections.num_rows == captions.num_rows
    text = captions["text"][0].as_py()
    assert not any(text in str(value) for row in rejections.to_pylist() for value in row.values())


def test_rejected_row_of_a_source_is_named_by_its_source_row() -> None:
    rejected = pa.Table.from_pylist([{"source_row": "a.jpg", "reason": "truncated", "detail": "of 9 bytes"}])
    (row,) = list_rejections("read", rejected).to_pylist()
    assert (row["step"], row["source_row"], row["reason"], row["content_digest"]) == ("read", "a.jpg", "truncated", None)
