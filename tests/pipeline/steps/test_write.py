"""Rejections name a row and the reason, but not its text."""

import pyarrow as pa

from pipeline.steps.write import list_rejections
from pipeline.tables import REJECTIONS


def test_rejection_names_the_row_but_not_its_text() -> None:
    text = {"sample_id": "s", "task": "caption", "text": "A secret.", "reason": "refusal"}
    image = {"source_row": "a.jpg", "reason": "truncated", "detail": "of 9 bytes"}
    tables = [list_rejections("read", pa.Table.from_pylist([row])) for row in (text, image)]
    assert tables[0].schema == REJECTIONS
    of_text, of_image = pa.concat_tables(tables).to_pylist()
    assert of_text.pop("content_digest") and not of_image.pop("content_digest")
    names = {"step": "read", "source_row": None, "sample_id": "s", "task": "caption", "reason": "refusal"}
    assert of_text == names
    other = {"source_row": "a.jpg", "sample_id": None, "task": None, "reason": "truncated"}
    assert of_image == names | other
