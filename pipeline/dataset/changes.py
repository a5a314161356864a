"""Compare a version with its parent: texts that a changed setting keeps, leaves out or adds.

The verdicts of an audit of the parent show whether the texts that are left out were wrong more often.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.audit import COLUMNS, named_texts, wrong_in_words, wrong_shares
from pipeline.dataset.reviews import TextName, Verdict
from pipeline.dataset.version import Version
from pipeline.storage.database import load, open_database
from pipeline.tables import BOOL, STRING, fields

FIELDS = {"captions": ["text"], "qa": ["question", "answer"]}
TEXTS = pa.schema([*fields(STRING, "sample_id", "text"), *fields(BOOL, "is_new")])
COUNT = """
SELECT count(*) FILTER (was AND is_now), count(*) FILTER (NOT is_now), count(*) FILTER (NOT was)
FROM (SELECT bool_or(NOT is_new) AS was, bool_or(is_new) AS is_now FROM texts GROUP BY sample_id, text)
"""


def describe_changes(before: Version, after: Version, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield lines about the captions and questions that two versions share, and about the others.

    The caller holds the lock of the dataset folder.
    """
    with open_database(after.dataset_dir) as db:
        load(db, "texts", (part for version in (before, after) for part in _texts(version, after)), TEXTS)
        kept, left_out, added = db.sql(COUNT).fetchall()[0]
    if left_out or added:
        yield f"compared with {before.name}: {kept:,} texts kept, {left_out:,} left out, {added:,} added"
        wrong = wrong_shares(verdicts)
        was, now = (_names(version, {sample_id for sample_id, _ in wrong}) for version in (before, after))
        for which, names in (("kept", was & now), ("left out", was - now)):
            if shares := [share for name, share in wrong.items() if name in names]:
                yield f"  of the texts {which}: {wrong_in_words(shares)}"


def _texts(version: Version, after: Version) -> Iterator[pa.Table]:
    columns = {name: FIELDS[name] for name in FIELDS if name in version.manifest["columns"]}
    for _, batch in version.batches(["sample_id", *columns]):
        for name, words in columns.items():
            sample_ids = batch["sample_id"].take(pc.list_parent_indices(batch[name]))
            texts = (pc.struct_field(pc.list_flatten(batch[name]), word) for word in words)
            is_new = pa.array([version is after] * len(sample_ids))
            yield pa.table([sample_ids, pc.binary_join_element_wise(*texts, " "), is_new], schema=TEXTS)


def _names(version: Version, sample_ids: set[str]) -> set[TextName]:
    own = version.manifest.get("own_columns", {})
    columns = [name for name in (*COLUMNS, *own) if name in version.manifest["columns"]]
    rows = (row for _, batch in version.batches(columns, sample_ids=sample_ids) for row in batch.to_pylist())
    return {name for row in rows for _, name in named_texts(row, own)}
