"""Compare two versions: rows added, removed or changed, field by field, with the causes that are known."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.version import LEDGER_FILE, Version
from pipeline.digests import annotation_digest
from pipeline.storage.database import load, open_cursor, open_database, read
from pipeline.storage.files import read_batches
from pipeline.tables import ADDED_FIELDS, LEDGER, PIXELS, REVIEWED
from pipeline.text.escape import on_one_line

LISTS = ("captions", "qa")
ROWS_AT_ONCE = 10_000  # of those that differ
DIGESTS = "SELECT sample_id, md5_number(to_json(incoming)::VARCHAR) AS digest FROM incoming"  # of all values, and the split
DIFFERENT = """CREATE TABLE different AS
SELECT sample_id FROM old_digests o FULL JOIN new_digests n USING (sample_id) WHERE o.digest IS DISTINCT FROM n.digest"""
SAME = "SELECT count(*) FROM old_digests o JOIN new_digests n USING (sample_id) WHERE o.digest = n.digest"
ROWS_THAT_DIFFER = "SELECT * FROM incoming SEMI JOIN different USING (sample_id)"
REJECTIONS_THAT_MATTER = """SELECT * FROM incoming
WHERE coalesce(sample_id, '') = '' OR sample_id IN (SELECT sample_id FROM different)"""
PAIRS = """SELECT sample_id, o AS old, n AS new
FROM old_rows o FULL JOIN new_rows n USING (sample_id) ORDER BY sample_id"""
NOT_WRITTEN = ("pair_id", *ADDED_FIELDS)
MAX_SHOWN = 160  # characters of a value
Row = dict[str, Any]
Settings = dict[str, tuple[Any, Any]]  # name -> values before and after, of settings that differ


@dataclass(slots=True)
class Change:
    """One row that differs. `fields` maps columns to their values before and after; `why` lists the known causes."""

    sample_id: str
    source_row: str
    what: str  # added, removed or changed
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)  # before and after
    why: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Diff:
    """The differences from version `before` to version `after`: counts of all rows, and the first changes."""

    before: str
    after: str
    same: int
    changes: list[Change]
    settings: Settings
    kinds: Counter[str] = field(default_factory=Counter)  # rows by added, removed or changed
    names: Counter[str] = field(default_factory=Counter)  # rows by field that changed
    causes: Counter[str] = field(default_factory=Counter)

    def add(self, change: Change, *, keep: bool) -> None:
        """Count a change, and keep it if there is to be room for it."""
        self.kinds[change.what] += 1
        self.names.update(change.fields.keys())
        self.causes.update(change.why)
        if keep:
            self.changes.append(change)

    def counts(self) -> dict[str, int]:
        """Return the numbers of rows that are the same, added, removed and changed."""
        return {"same": self.same, **{what: self.kinds[what] for what in ("added", "removed", "changed")}}

    def fields(self) -> dict[str, int]:
        """Return in how many rows each field changed."""
        return dict(self.names.most_common())

    def reasons(self) -> dict[str, int]:
        """Return how often each cause is given."""
        return dict(self.causes.most_common())

    def lines(self, rows: int) -> Iterator[str]:
        """Yield the difference for a reader: counts, fields, reasons, settings, and some of the rows."""
        yield f"{self.before} -> {self.after}: " + ", ".join(f"{count} {what}" for what, count in self.counts().items())
        for title, counts in (("changed fields", self.fields()), ("why", self.reasons())):
            yield from [f"{title}:", *(f"  {count:>7}  {name}" for name, count in counts.items())] if counts else []
        if self.settings:
            yield "made otherwise:"
            yield from (f"  {name}: {_short(then)} -> {_short(now)}" for name, (then, now) in self.settings.items())
        shown = self.changes[:rows]
        for change in shown:
            yield f"{change.what} {change.sample_id[:12]} ({_short(change.source_row)}) {'; '.join(change.why)}".rstrip()
            for name, sides in change.fields.items():
                before, after = ([*map(_short, _listed(side))] for side in sides.values())
                if not {*before}.isdisjoint(after):  # equal texts of other prompts
                    before, after = ([_short(item, names_prompt=True) for item in _listed(side)] for side in sides.values())
                yield from (f"  - {name}: {item}" for item in before)
                yield from (f"  + {name}: {item}" for item in after)
        if others := self.kinds.total() - len(shown):
            yield f"and {others} more rows; --rows shows more, --json all"


def _listed(side: Any) -> list[Any]:
    return side if isinstance(side, list) else [side]


def _short(value: Any, *, names_prompt: bool = False) -> str:
    """Return a value as a short line without control characters, since it may be model text."""
    if isinstance(value, dict):
        shown = {name: item for name, item in value.items() if item not in (None, "") and name != "prompt_id"}
        value = ", ".join(f"{name} {item}" for name, item in shown.items()) + (
            f" [{value.get('prompt_id')}]" if names_prompt else ""
        )
    text = on_one_line(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def diff_versions(before: Version, after: Version, most: int | None = None) -> Diff:
    """Compare two versions, and keep `most` of their changes; None: all. Pixels are compared by `sample_id`.

    A digest of each row, rows that differ, and why they were rejected lie in a database in the temporary folder. Raises
    StoreError if that is full, or a version is damaged.
    """
    in_both = {*before.manifest["columns"]} & {*after.manifest["columns"]}
    columns = [name for name in before.manifest["columns"] if name in in_both and name not in PIXELS]
    own = {name: kind for version in (before, after) for name, kind in _own_columns(version).items() if name not in in_both}
    columns += own  # those of a task of one's own, which a version may lack
    scores = {*before.manifest.get("scores", ())} ^ {*after.manifest.get("scores", ())}  # of one version alone
    settings = _settings(before.manifest, after.manifest)
    with TemporaryDirectory(prefix="synth-diff-") as folder, open_database(Path(folder)) as db:
        for side, version in (("old", before), ("new", after)):
            _load(db, f"{side}_digests", DIGESTS, version, columns, own, scores)
        db.execute(DIFFERENT)
        for side, version in (("old", before), ("new", after)):
            _load(db, f"{side}_rows", ROWS_THAT_DIFFER, version, columns, own, scores)
        ledgers = _Ledger(db, "old", before), _Ledger(db, "new", after)
        ((same,),) = db.execute(SAME).fetchall()
        diff = Diff(before.name, after.name, same, [], settings)
        for batch in db.sql(PAIRS).to_arrow_reader(ROWS_AT_ONCE):
            for ledger in ledgers:
                ledger.look_up(batch["sample_id"])
            for pair in batch.to_pylist():
                change = _change(pair["old"], pair["new"], *ledgers, settings)
                if change is None:
                    diff.same += 1  # such as the same fields in another order
                else:
                    diff.add(change, keep=most is None or len(diff.changes) < most)
    return diff


def _own_columns(version: Version) -> dict[str, pa.DataType]:
    """Return the columns of own tasks with their types. Raises StoreError if its manifest does not say them."""
    try:
        return {name: version.schema.field(name).type for name in version.manifest.get("own_columns", {})}
    except (ValueError, LookupError) as error:
        raise version.damage_error(error) from None


def _tables(version: Version, columns: list[str], own: dict[str, pa.DataType], left_out: Collection[str]) -> Iterator[pa.Table]:
    """Yield the rows of a version with their split, without some scores; null in a column that it lacks."""
    there = [name for name in columns if name in version.manifest["columns"]]
    for split, batch in version.batches(there):
        table = pa.table(batch)
        for name in (name for name in columns if name not in there):
            table = table.append_column(name, pa.nulls(table.num_rows, own[name]))
        table = table.select(columns)
        for name in LISTS if left_out else ():
            if name in columns:
                table = table.set_column(columns.index(name), name, _without(table[name], left_out))
        yield table.append_column("split", pa.array([split] * table.num_rows, pa.string()))


def _without(lists: pa.ChunkedArray, left_out: Collection[str]) -> pa.Array:
    """Return lists of annotations that lack some scores."""
    array = lists.combine_chunks()
    values, fields = array.flatten(), [item for item in array.type.value_type if item.name not in left_out]
    kept = pa.StructArray.from_arrays([values.field(item.name) for item in fields], fields=fields)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32(), mask=np.r_[array.is_null(), False])
    return pa.ListArray.from_arrays(offsets, kept)


def _load(
    db: duckdb.DuckDBPyConnection,
    name: str,
    query: str,
    version: Version,
    columns: list[str],
    own: dict[str, pa.DataType],
    left_out: Collection[str],
) -> None:
    """Make a table of what a query takes from the rows of a version. Raises StoreError if its files do not fit together."""
    tables = _tables(version, columns, own, left_out)
    first = next(tables, pa.table({column: pa.array([], pa.string()) for column in [*columns, "split"]}))
    try:
        load(db, name, chain([first], tables), first.schema, query)
    except pa.ArrowException as error:
        raise version.damage_error(error) from None


class _Ledger:
    """The rejections of a version of some samples, and of rows that are no sample, by sample, source row and content."""

    def __init__(self, db: duckdb.DuckDBPyConnection, side: str, version: Version) -> None:
        path = version.path / LEDGER_FILE
        self._db, self._name = open_cursor(db), f"{side}_ledger"  # the rows that differ are read by the other one
        load(db, self._name, read_batches(path) if path.exists() else (), LEDGER, REJECTIONS_THAT_MATTER)
        self.by_source_row: dict[str, list[str]] = {}
        for row in self._rows("coalesce(sample_id, '') = '' AND source_row <> ''"):
            self.by_source_row.setdefault(row["source_row"], []).append(f"{row['stage']}: {row['reason']}")
        self.look_up(pa.array([], pa.string()))

    def look_up(self, sample_ids: pa.Array) -> None:
        """Read the rejections of these samples, in place of those before."""
        self.by_sample: dict[str, list[str]] = {}
        self.by_content: dict[tuple[str, str], str] = {}
        self._db.register("wanted", pa.table({"sample_id": sample_ids}))
        for row in self._rows("sample_id IN (SELECT sample_id FROM wanted)"):
            reason = f"{row['stage']}: {row['reason']}"
            if row["content_digest"]:
                self.by_content[row["sample_id"], row["content_digest"]] = reason
            self.by_sample.setdefault(row["sample_id"], []).append(reason)
        self._db.unregister("wanted")

    def _rows(self, condition: str) -> Iterator[Row]:
        for table in read(self._db.sql(f"SELECT * FROM {self._name} WHERE {condition}")):  # noqa: S608  # texts of ours
            yield from table.to_pylist()

    def about_sample(self, sample_id: str, source_row: str) -> list[str]:
        """Return why a sample has no row."""
        return sorted(set(self.by_sample.get(sample_id) or self.by_source_row.get(source_row) or []))

    def about(self, sample_id: str, annotation: dict[str, Any]) -> str | None:
        """Return why an annotation was rejected, or None."""
        return self.by_content.get((sample_id, annotation_digest(annotation)))


def _change(old_row: Row, new_row: Row, old: _Ledger, new: _Ledger, settings: Settings) -> Change | None:
    """Return the change of a row, whose values are all null in a version that lacks it; None if its values are equal."""
    if old_row["sample_id"] is None:
        sample_id, source_row = new_row["sample_id"], new_row["source_row"]
        why = [f"was rejected: {reason}" for reason in old.about_sample(sample_id, source_row)]
        return Change(sample_id, source_row, "added", why=why)
    if new_row["sample_id"] is None:
        sample_id, source_row = old_row["sample_id"], old_row["source_row"]
        why = new.about_sample(sample_id, source_row) or ["the source does not yield it any more"]
        return Change(sample_id, source_row, "removed", why=why)
    change = _changed(old_row, new_row, old, new, settings)
    return change if change.fields else None


def _changed(old_row: Row, new_row: Row, old: _Ledger, new: _Ledger, settings: Settings) -> Change:
    change = Change(new_row["sample_id"], new_row["source_row"], "changed")
    for name in old_row:
        if old_row[name] == new_row[name]:
            continue
        if name not in LISTS:
            change.fields[name] = {"before": old_row[name], "after": new_row[name]}
            continue
        removed = [item for item in old_row[name] or [] if item not in (new_row[name] or [])]
        added = [item for item in new_row[name] or [] if item not in (old_row[name] or [])]
        change.fields[name] = {"removed": removed, "added": added}
        same = [item for item in map(_as_written, removed) if item in map(_as_written, added)]
        pairs = [{item.get("pair_id") for item in items if _as_written(item) in same} for items in (removed, added)]
        if same:  # the same text is paired with another one, or checks were answered in another way
            change.why.append("another pair" if pairs[0] != pairs[1] else "other scores")
        removed, added = ([item for item in items if _as_written(item) not in same] for items in (removed, added))
        change.why += _why(change.sample_id, removed, added, old, new, settings)
    change.why = list(dict.fromkeys(change.why))
    return change


def _why(sample_id: str, removed: list[Row], added: list[Row], old: _Ledger, new: _Ledger, settings: Settings) -> list[str]:
    """Return why texts were removed and added: a stage rejected them, or another prompt, model or person wrote others."""
    reasons = [new.about(sample_id, item) for item in removed]
    reasons += [f"was rejected: {reason}" for item in added if (reason := old.about(sample_id, item))]
    prompts = {item["prompt_id"] for item in removed} ^ {item["prompt_id"] for item in added} if removed and added else set()
    if any(item["prompt_id"] == REVIEWED for item in added):
        reasons.append("edited in review")
    elif prompts:
        reasons.append("another prompt")
    elif "model" in settings and removed and added:
        reasons.append("another model")
    elif removed and added and not any(reasons):
        reasons.append("another reply")
    return [reason for reason in reasons if reason]


def _as_written(item: dict[str, Any]) -> dict[str, Any]:
    """Return an annotation without its scores and its pair, which may change while its text does not."""
    return {name: value for name, value in item.items() if name not in NOT_WRITTEN}


def _settings(before: dict[str, Any], after: dict[str, Any]) -> Settings:
    """Return the inputs of the versions that differ: source, model, prompts, columns, and settings by name."""
    old, new = (
        {name: manifest[name] for name in ("source", "model", "prompts", "columns")}
        | {"prompts": sorted(manifest["prompts"]), "scores": manifest.get("scores", [])}
        | _flat(manifest["config"])
        for manifest in (before, after)
    )
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def _flat(config: dict[str, Any], prefix: str = "config.") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
