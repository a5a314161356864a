"""Step: trim. Keep the annotations of the first `images` images, and reject all others."""

import duckdb
import pyarrow as pa

from pipeline.steps.base import ROW, Comparison, RowStep
from pipeline.storage.database import load
from pipeline.tables import STRING, fields

IMAGES = pa.schema([ROW, *fields(STRING, "sample_id")])
QUERY = """
SELECT row, 'beyond_images' AS reason FROM images
WHERE sample_id NOT IN (SELECT sample_id FROM images GROUP BY sample_id ORDER BY min(row) LIMIT {limit})
"""


def find_surplus(comparison: Comparison) -> duckdb.DuckDBPyRelation:
    """Return the rows of images beyond the limit."""
    load(comparison.db, "images", comparison.rows.batches("sample_id"), IMAGES)
    return comparison.db.sql(QUERY.format(limit=comparison.settings))


STEP = RowStep(
    "trim",
    is_wanted=lambda plan: plan.config.images is not None,
    settings=lambda plan: plan.config.images,
    is_choice=True,
    compare=find_surplus,
    adds=pa.schema({"reason": STRING}),
)
