"""Compare a version with the version before it, such as after a change of a limit.

The verdicts of an audit show whether the texts that are left out were wrong more often than the others.
"""

from collections.abc import Iterator, Sequence

from pipeline.dataset.audit import COLUMNS, named_texts, wrong_in_words, wrong_shares
from pipeline.dataset.reviews import TextName, Verdict
from pipeline.dataset.version import Version


def describe_changes(before: Version, after: Version, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield lines about the number of texts in two versions, and about the reviewed texts in `before`."""
    counts = f"{_count_texts(after):,} captions and questions, {before.name} {_count_texts(before):,}"
    yield f"{after.name} has {counts}"
    wrong = wrong_shares(verdicts)
    sample_ids = {sample_id for sample_id, _ in wrong}
    was, now = _reviewed_names(before, sample_ids), _reviewed_names(after, sample_ids)
    for which, names in (("kept", was & now), ("left out", was - now)):
        if shares := [share for name, share in wrong.items() if name in names]:
            yield f"  texts of {before.name} that are {which}: {wrong_in_words(shares)}"


def _count_texts(version: Version) -> int:
    measured = version.manifest["measured"]
    return sum(part["count"] for name in ("captions", "answers") for part in measured.get(name, {}).values())


def _reviewed_names(version: Version, sample_ids: set[str]) -> set[TextName]:
    own = version.manifest.get("own_columns", {})
    columns = [name for name in (*COLUMNS, *own) if name in version.manifest["columns"]]
    batches = version.batches(columns, sample_ids=sample_ids) if sample_ids else ()
    return {name for _, batch in batches for row in batch.to_pylist() for _, name in named_texts(row, own)}
