"""Compare two versions: rows added, removed or changed, field by field, with the causes that are known."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import current_settings
from pipeline.dataset.version import LEDGER_FILE, Version
from pipeline.digests import annotation_digest, digest
from pipeline.storage.files import read_batches
from pipeline.tables import ADDED_FIELDS, PIXELS, REVIEWED
from pipeline.text.escape import on_one_line

LISTS = ("captions", "qa")
ROWS_AT_ONCE = 50_000  # of those that differ
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
                for mark, side in zip("-+", sides.values(), strict=True):
                    for item in side if isinstance(side, list) else [side]:
                        yield f"  {mark} {name}: {_short(item)}"
        if others := self.kinds.total() - len(shown):
            yield f"and {others} more rows; --rows shows more, --json all"


def _short(value: Any) -> str:
    """Return a value as a short line without control characters, since it may be model text."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items() if item not in (None, "") and name != "prompt_id")
    text = on_one_line(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def diff_versions(before: Version, after: Version, most: int | None = None) -> Diff:
    """Compare two versions, and keep `most` of their changes; None: all. Pixels are compared by `sample_id`.

    Memory holds a digest of each row, ROWS_AT_ONCE of the rows that differ, and why rows that differ were rejected.
    """
    columns = [c for c in before.manifest["columns"] if c in after.manifest["columns"] and c not in PIXELS]
    scores = {*before.manifest.get("scores", ())} ^ {*after.manifest.get("scores", ())}  # of one version alone
    old, new = _digests(before, columns, scores), _digests(after, columns, scores)
    differ = sorted(sample_id for sample_id in old.keys() | new.keys() if old.get(sample_id) != new.get(sample_id))
    settings = _settings(before.manifest, after.manifest)
    diff = Diff(before.name, after.name, len((old.keys() & new.keys()).difference(differ)), [], settings)
    old_ledger, new_ledger = _Ledger(before, differ), _Ledger(after, differ)
    for start in range(0, len(differ), ROWS_AT_ONCE):
        sample_ids = differ[start : start + ROWS_AT_ONCE]
        old_rows, new_rows = (_rows(version, columns, scores, sample_ids) for version in (before, after))
        for sample_id in sample_ids:
            old_row, new_row = old_rows.get(sample_id), new_rows.get(sample_id)
            if old_row is None:
                assert new_row is not None
                why = [f"was rejected: {reason}" for reason in old_ledger.about_sample(sample_id, new_row["source_row"])]
                change = Change(sample_id, new_row["source_row"], "added", why=why)
            elif new_row is None:
                why = new_ledger.about_sample(sample_id, old_row["source_row"]) or ["the source does not yield it any more"]
                change = Change(sample_id, old_row["source_row"], "removed", why=why)
            else:
                change = _changed(old_row, new_row, old_ledger, new_ledger, settings)
            diff.add(change, keep=most is None or len(diff.changes) < most)
    return diff


class _Ledger:
    """The rejections of a version of some samples, and of rows that are no sample, by sample, source row and content."""

    def __init__(self, version: Version, sample_ids: Sequence[str]) -> None:
        path, wanted = version.path / LEDGER_FILE, pa.array(sample_ids, pa.string())
        self.by_sample: dict[str, list[str]] = {}
        self.by_source_row: dict[str, list[str]] = {}
        self.by_content: dict[tuple[str, str], str] = {}
        for row in (row for table in (read_batches(path) if path.exists() else ()) for row in _select(table, wanted)):
            reason = f"{row['stage']}: {row['reason']}"
            if row["content_digest"]:
                self.by_content[row["sample_id"], row["content_digest"]] = reason
            if row["sample_id"]:
                self.by_sample.setdefault(row["sample_id"], []).append(reason)
            elif row["source_row"]:
                self.by_source_row.setdefault(row["source_row"], []).append(reason)

    def about_sample(self, sample_id: str, source_row: str) -> list[str]:
        """Return why a sample has no row."""
        return sorted(set(self.by_sample.get(sample_id) or self.by_source_row.get(source_row) or []))

    def about(self, sample_id: str, annotation: dict[str, Any]) -> str | None:
        """Return why an annotation was rejected, or None."""
        return self.by_content.get((sample_id, annotation_digest(annotation)))


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


def _digests(version: Version, columns: list[str], left_out: Collection[str]) -> dict[str, str]:
    """Return a digest of each row and its split, by sample; of annotations without the scores that are `left_out`."""
    return {
        row["sample_id"]: digest([split, _without(row, left_out)])
        for split, batch in version.batches(columns)
        for row in batch.to_pylist()
    }


def _rows(version: Version, columns: list[str], left_out: Collection[str], sample_ids: Sequence[str]) -> dict[str, Row]:
    """Return the rows of some samples, with their split."""
    wanted = pa.array(sample_ids, pa.string())
    batches = ((split, batch.filter(pc.is_in(batch["sample_id"], wanted))) for split, batch in version.batches(columns))
    rows = (_without(row, left_out) | {"split": split} for split, batch in batches for row in batch.to_pylist())
    return {row["sample_id"]: row for row in rows}


def _select(table: pa.Table, sample_ids: pa.Array) -> list[Row]:
    """Return the rows of a ledger that are about one of these samples, or about a row that is no sample."""
    ids = table["sample_id"]
    has_none = pc.equal(pc.fill_null(ids, ""), "")
    return list(table.filter(pc.or_(has_none, pc.is_in(ids, sample_ids))).to_pylist())


def _without(row: Row, left_out: Collection[str]) -> Row:
    """Return a row whose annotations lack some scores."""
    if not left_out:
        return row
    lists = {name: row[name] for name in LISTS if row.get(name)}
    return row | {
        name: [{key: value for key, value in item.items() if key not in left_out} for item in items]
        for name, items in lists.items()
    }


def _settings(before: dict[str, Any], after: dict[str, Any]) -> Settings:
    """Return the inputs of the versions that differ: source, model, prompts, columns, and settings by name."""
    old, new = (
        {name: manifest[name] for name in ("source", "model", "prompts", "columns")}
        | {"prompts": sorted(manifest["prompts"]), "scores": manifest.get("scores", [])}
        | _flat(current_settings(manifest["config"]))
        for manifest in (before, after)
    )
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def _flat(config: dict[str, Any], prefix: str = "config.") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
