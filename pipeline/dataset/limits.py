"""Show the effect of a limit on a score: how many texts it keeps, and the share of wrong texts among them.

The shares are unweighted shares of reviewed texts, so they may differ from those of an audit (audit.py).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from math import inf

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.audit import COLUMNS, named_texts, wrong_shares
from pipeline.dataset.reviews import TextName, Verdict, text_name
from pipeline.dataset.statistics import percent
from pipeline.dataset.version import Version
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


def describe_changes(before: Version, after: Version, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield lines about the number of texts in two versions, and about the reviewed texts in `before`.

    Nothing is yielded if both versions have the same rows.
    """
    if before.manifest["digest"] == after.manifest["digest"]:
        return
    counts = f"{_count_texts(after):,} captions and questions, {before.name} has {_count_texts(before):,}"
    yield f"{after.name} has {counts}"
    wrong = wrong_shares(verdicts)
    sample_ids = {sample_id for sample_id, _ in wrong}
    was, now = _reviewed_names(before, sample_ids), _reviewed_names(after, sample_ids)
    for which, names in (("kept", was & now), ("left out", was - now)):
        if shares := [share for name, share in wrong.items() if name in names]:
            yield f"  texts of {before.name} that are {which}: {_wrong_in_words(shares)}"


def _count_texts(version: Version) -> int:
    measured = version.manifest["measured"]
    return sum(part["count"] for name in ("captions", "answers") for part in measured.get(name, {}).values())


def _reviewed_names(version: Version, sample_ids: set[str]) -> set[TextName]:
    own = version.manifest.get("own_columns", {})
    columns = [name for name in (*COLUMNS, *own) if name in version.manifest["columns"]]
    batches = version.batches(columns, sample_ids=sample_ids) if sample_ids else ()
    return {name for _, batch in batches for row in batch.to_pylist() for _, name in named_texts(row, own)}


def _wrong_in_words(shares: Collection[float]) -> str:
    if not shares:
        return "none reviewed"
    return f"{percent(sum(shares) / len(shares))} % wrong, {len(shares)} reviewed"
