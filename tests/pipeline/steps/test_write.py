"""Rejections name a row and the reason, but not its text."""

import pyarrow as pa

from pipeline.steps.write import list_rejections
from pipeline.tables import REJECTIONS
from tests.scene_data import scene_samples, true_captions


def test_rejections_contain_no_model_text() -> None:
    captions = true_captions(scene_samples(20))
    rejected = captions.append_column("reason", pa.array(["refusal"] * captions.num_rows))
    rejections = list_rejections("filter", rejected)
    assert rejections.schema == REJECTIONS
    assert rejections.num_rows == captions.num_rows
    text = captions["text"][0].as_py()
    assert not any(text in str(value) for row in rejections.to_pylist() for value in row.values())


def test_rejected_source_row_is_listed_by_source_row_without_digest() -> None:
    rejected = pa.Table.from_pylist([{"source_row": "a.jpg", "reason": "truncated", "detail": "of 9 bytes"}])
    (row,) = list_rejections("read", rejected).to_pylist()
    names = ("step", "source_row", "reason", "content_digest")
    assert [row[name] for name in names] == ["read", "a.jpg", "truncated", None]
