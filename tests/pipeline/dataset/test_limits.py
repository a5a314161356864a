"""Limits of scores: the share of texts that each limit keeps, and their error rate."""

import pyarrow as pa

from pipeline.dataset.limits import SCORED, SCORES, score_curves
from pipeline.dataset.reviews import text_name
from tests.pipeline.dataset.test_audit import judge


def test_score_curve_has_kept_share_and_error_rates_for_each_tenth_of_the_texts() -> None:
    names = dict.fromkeys(SCORED)
    rows = [names | {"sample_id": f"{n:064x}", "task": "caption", "final_text": "A cat."} for n in range(20)]
    for n, row in enumerate(rows):
        row["coverage"] = n // 2 / 10
    strings = [name for name in SCORED if name not in SCORES]
    schema = pa.schema([(name, pa.string()) for name in strings] + [(name, pa.float64()) for name in SCORES])
    table = pa.Table.from_pylist(rows, schema=schema)
    verdicts = [judge(text_name(row), "wrong" if n < 4 else "right") for n, row in enumerate(rows) if n % 2]
    curves = score_curves([table.slice(10), table.slice(0, 10)], verdicts)
    assert curves.keys() == {"coverage"} and len(curves["coverage"]) == 10
    limit, kept, tenth, from_limit = curves["coverage"][1]
    assert (limit, kept) == (0.1, 0.9)
    assert tenth == "100.0 % wrong, 1 reviewed"
    assert from_limit == "11.1 % wrong, 9 reviewed"
    assert score_curves([table], []) == {}
