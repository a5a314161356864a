"""Compare two versions: rows added, removed or changed, field by field, and settings that differ."""

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

from pipeline.dataset.version import Version
from pipeline.storage.database import load, open_database
from pipeline.tables import PIXELS
from pipeline.text.escape import on_one_line

LISTS = ("captions", "qa")
ROWS_AT_ONCE = 10_000  # of those that differ
DIGESTS = "SELECT sample_id, md5_number(to_json(incoming)::VARCHAR) AS digest FROM incoming"  # of all values, and the split
DIFFERENT = """CREATE TABLE different AS
SELECT sample_id FROM old_digests o FULL JOIN new_digests n USING (sample_id) WHERE o.digest IS DISTINCT FROM n.digest"""
SAME = "SELECT count(*) FROM old_digests o JOIN new_digests n USING (sample_id) WHERE o.digest = n.digest"
ROWS_THAT_DIFFER = "SELECT * FROM incoming SEMI JOIN different USING (sample_id)"
PAIRS = """SELECT sample_id, o AS old, n AS new
FROM old_rows o FULL JOIN new_rows n USING (sample_id) ORDER BY sample_id"""
MAX_SHOWN = 160  # characters of a value
Row = dict[str, Any]
Settings = dict[str, tuple[Any, Any]]  # name -> values before and after, of settings that differ


@dataclass(slots=True)
class Change:
    """One row that differs. `fields` maps columns to their values before and after."""

    sample_id: str
    source_row: str
    what: str  # added, removed or changed
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)  # before and after


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

    def add(self, change: Change, *, keep: bool) -> None:
        """Count a change, and keep it if there is to be room for it."""
        self.kinds[change.what] += 1
        self.names.update(change.fields.keys())
        if keep:
            self.changes.append(change)

    def counts(self) -> dict[str, int]:
        """Return the numbers of rows that are the same, added, removed and changed."""
        return {"same": self.same, **{what: self.kinds[what] for what in ("added", "removed", "changed")}}

    def fields(self) -> dict[str, int]:
        """Return in how many rows each field changed."""
        return dict(self.names.most_common())

    def lines(self, rows: int) -> Iterator[str]:
        """Yield the difference for a reader: counts, fields, settings, and some of the rows."""
        yield f"{self.before} -> {self.after}: " + ", ".join(f"{count} {what}" for what, count in self.counts().items())
        if fields := self.fields():
            yield from ["changed fields:", *(f"  {count:>7}  {name}" for name, count in fields.items())]
        if self.settings:
            yield "made otherwise:"
            yield from (f"  {name}: {_short(then)} -> {_short(now)}" for name, (then, now) in self.settings.items())
        shown = self.changes[:rows]
        for change in shown:
            yield f"{change.what} {change.sample_id[:12]} ({_short(change.source_row)})"
            for name, sides in change.fields.items():
                for sign, side in zip("-+", sides.values(), strict=True):
                    items = side if isinstance(side, list) else [side]
                    yield from (f"  {sign} {name}: {_short(item)}" for item in items)
        if others := self.kinds.total() - len(shown):
            yield f"and {others} more rows; --rows shows more, --json all"


def _short(value: Any) -> str:
    """Return a value as a short line without control characters, since it may be model text."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items() if item not in (None, ""))
    text = on_one_line(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def diff_versions(before: Version, after: Version, most: int | None = None) -> Diff:
    """Compare two versions, and keep `most` of their changes; None: all. Pixels are compared by `sample_id`.

    A digest of each row, and rows that differ, are stored in a database in the temporary folder. Raises StoreError if that is
    full, or a version is damaged.
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
        ((same,),) = db.execute(SAME).fetchall()
        diff = Diff(before.name, after.name, same, [], settings)
        for batch in db.sql(PAIRS).to_arrow_reader(ROWS_AT_ONCE):
            for pair in batch.to_pylist():
                change = _change(pair["old"], pair["new"])
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


def _change(old_row: Row, new_row: Row) -> Change | None:
    """Return the change of a row, whose values are all null in a version that lacks it; None if its values are equal."""
    if old_row["sample_id"] is None:
        return Change(new_row["sample_id"], new_row["source_row"], "added")
    if new_row["sample_id"] is None:
        return Change(old_row["sample_id"], old_row["source_row"], "removed")
    change = Change(new_row["sample_id"], new_row["source_row"], "changed")
    for name in old_row:
        before, after = old_row[name], new_row[name]
        if before == after:
            continue
        if name in LISTS:
            removed, added = (
                [item for item in one or [] if item not in (other or [])] for one, other in ((before, after), (after, before))
            )
            change.fields[name] = {"removed": removed, "added": added}
        else:
            change.fields[name] = {"before": before, "after": after}
    return change if change.fields else None


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
