"""Show the effect of a limit on a score: how many texts it keeps, and the share of wrong texts among them.

The shares are unweighted shares of reviewed texts. The checks doubted a third of these, so the shares are
higher than those of an audit (audit.py). Compare them with each other.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from math import inf

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.audit import wrong_shares
from pipeline.dataset.reviews import Verdict, text_name
from pipeline.dataset.statistics import percent
from pipeline.tables import FINAL, RUBRIC

SCORES = ("coverage", "alignment", *RUBRIC)
SCORED = ("sample_id", "task", *FINAL.names, *SCORES)


def score_curves(
    tables: Iterable[pa.Table], verdicts: Iterable[Verdict]
) -> dict[str, list[tuple[float, float, str, str]]]:
    """Return a curve for each score, with one row for each tenth of the texts, ordered by score.

    A row has the lowest score of the tenth, and the share of texts that are kept if this score is the limit.
    Two strings follow: the shares of wrong texts in the tenth, and among the kept texts. Scores without
    reviewed texts are left out. `tables` have the columns SCORED.
    """
    shares = wrong_shares(verdicts)
    reviewed = pa.array({sample_id for sample_id, _ in shares}, pa.string())
    values: dict[str, list[float]] = defaultdict(list)
    known: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for table in tables:
        for score in SCORES:
            values[score] += table[score].drop_null().to_pylist()
        for row in table.filter(pc.is_in(table["sample_id"], reviewed)).to_pylist():
            if (wrong := shares.get(text_name(row))) is not None:
                for score in SCORES:
                    known[score] += [] if row[score] is None else [(row[score], wrong)]
    return {score: list(_curve(sorted(values[score]), pairs)) for score, pairs in known.items() if pairs}


def _curve(
    values: Sequence[float], known: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float, str, str]]:
    limits = sorted({values[len(values) * n // 10] for n in range(10)})
    for limit, end in pairwise([*limits, inf]):
        kept = 1 - bisect_left(values, limit) / len(values)
        kept_texts = [(value, wrong) for value, wrong in known if value >= limit]
        in_tenth = _wrong_in_words([wrong for value, wrong in kept_texts if value < end])
        yield limit, kept, in_tenth, _wrong_in_words([wrong for _, wrong in kept_texts])


def _wrong_in_words(shares: Collection[float]) -> str:
    if not shares:
        return "none reviewed"
    return f"{percent(sum(shares) / len(shares))} % wrong, {len(shares)} reviewed"
