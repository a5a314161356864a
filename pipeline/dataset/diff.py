"""Compare two versions: added, removed and changed rows with their fields, and changed settings."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.dataset.version import Version
from pipeline.tables import PIXELS
from pipeline.text.escape import on_one_line

LISTS = ("captions", "qa")
BATCH_ROWS = 10_000  # number of differing rows in memory at once
MAX_SHOWN_CHARACTERS = 160
Row = dict[str, Any]
Settings = dict[str, tuple[Any, Any]]  # changed settings by name, with old and new value


@dataclass(slots=True)
class Change:
    """A row that differs. `what` is added, removed or changed. `fields` has old and new values by name."""

    sample_id: str
    source_row: str
    what: str
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Diff:
    """The differences between two versions. All rows are counted, and the first changes are kept in full."""

    before: str
    after: str
    same: int
    changes: list[Change]
    settings: Settings
    _changes_by_kind: Counter[str] = field(default_factory=Counter)
    _changes_by_field: Counter[str] = field(default_factory=Counter)

    def add(self, change: Change, *, keep: bool) -> None:
        """Count a change. With `keep`, also store it in `changes`."""
        self._changes_by_kind[change.what] += 1
        self._changes_by_field.update(change.fields.keys())
        if keep:
            self.changes.append(change)

    def counts(self) -> dict[str, int]:
        """Return how many rows are the same, added, removed and changed."""
        kinds = ("added", "removed", "changed")
        return {"same": self.same, **{kind: self._changes_by_kind[kind] for kind in kinds}}

    def fields(self) -> dict[str, int]:
        """Return the number of changed rows for each field."""
        return dict(self._changes_by_field.most_common())

    def lines(self, rows: int) -> Iterator[str]:
        """Yield the lines of a report: row counts, changed fields and settings, and up to `rows` changes."""
        counts = ", ".join(f"{count} {what}" for what, count in self.counts().items())
        yield f"{self.before} -> {self.after}: {counts}"
        if fields := self.fields():
            yield from ["changed fields:", *(f"  {count:>7}  {name}" for name, count in fields.items())]
        if self.settings:
            yield "changed settings:"
            for name, (old, new) in self.settings.items():
                yield f"  {name}: {_short(old)} -> {_short(new)}"
        shown = self.changes[:rows]
        for change in shown:
            yield f"{change.what} {change.sample_id[:12]} ({_short(change.source_row)})"
            for name, sides in change.fields.items():
                for sign, side in zip("-+", sides.values(), strict=True):
                    items = side if isinstance(side, list) else [side]
                    yield from (f"  {sign} {name}: {_short(item)}" for item in items)
        if others := self._changes_by_kind.total() - len(shown):
            yield f"and {others} more rows; --rows shows more, --json all"


def _short(value: Any) -> str:
    """Return a value as a short line without control characters. It may be text from a model."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items() if item not in (None, ""))
    text = on_one_line(str(value))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"


def diff_versions(before: Version, after: Version, max_changes: int | None = None) -> Diff:
    """Compare two versions, and keep the first `max_changes` changes. Raises StoreError if one is damaged."""
    own_columns = {*before.manifest.get("own_columns", ()), *after.manifest.get("own_columns", ())}
    names = dict.fromkeys([*before.manifest["columns"], *after.manifest["columns"]])
    in_both = {*before.manifest["columns"]} & {*after.manifest["columns"]}
    columns = [name for name in names if name in in_both | own_columns and name not in PIXELS]
    # A score that only one version has is listed as a changed setting, not as a change of every row.
    scores = {*before.manifest.get("scores", ())} ^ {*after.manifest.get("scores", ())}
    read = partial(_read_rows, columns=columns, scores=scores)

    hashes = {row["sample_id"]: hash(str(row)) for row in read(before)}
    diff = Diff(before.name, after.name, 0, [], _changed_settings(before.manifest, after.manifest))
    different: list[str] = []
    for row in read(after):
        if hashes.pop(row["sample_id"], None) == hash(str(row)):
            diff.same += 1
        else:
            different.append(row["sample_id"])
    ids = sorted({*different, *hashes})
    for start in range(0, len(ids), BATCH_ROWS):
        batch_ids = ids[start : start + BATCH_ROWS]
        old, new = ({row["sample_id"]: row for row in read(v, batch_ids)} for v in (before, after))
        for sample_id in batch_ids:
            if change := _compare(old.get(sample_id), new.get(sample_id)):
                diff.add(change, keep=max_changes is None or len(diff.changes) < max_changes)
            else:
                # The hashes differ only because the order of fields differs.
                diff.same += 1
    return diff


def _read_rows(
    version: Version, sample_ids: Collection[str] | None = None, *, columns: list[str], scores: set[str]
) -> Iterator[Row]:
    names = [name for name in columns if name in version.manifest["columns"]]
    batches = version.batches(names) if sample_ids is None else version.find(names, sample_ids)
    for split, batch in batches:
        try:
            rows = batch.to_pylist()
        except ValueError as error:
            raise version.damage_error(error) from None
        for row in rows:
            row = {name: row.get(name) for name in columns} | {"split": split}
            for name in LISTS if scores else ():
                for annotation in row.get(name) or ():
                    for score in scores & annotation.keys():
                        del annotation[score]
            yield row


def _compare(old: Row | None, new: Row | None) -> Change | None:
    """Return the change from one row to the other, or None if only the order of fields differs."""
    row = new or old or {}
    change = Change(row["sample_id"], row.get("source_row") or "", "changed")
    if old is None or new is None:
        change.what = "added" if old is None else "removed"
        return change
    for name, before in old.items():
        after = new[name]
        if before == after:
            continue
        if name in LISTS:
            removed = [item for item in before or [] if item not in (after or [])]
            added = [item for item in after or [] if item not in (before or [])]
            change.fields[name] = {"removed": removed, "added": added}
        else:
            change.fields[name] = {"before": before, "after": after}
    return change if change.fields else None


def _changed_settings(before: dict[str, Any], after: dict[str, Any]) -> Settings:
    old, new = (
        {name: manifest[name] for name in ("source", "model", "columns")}
        | {"prompts": sorted(manifest["prompts"]), "scores": manifest.get("scores", [])}
        | _flatten(manifest["config"])
        for manifest in (before, after)
    )
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}


def _flatten(config: dict[str, Any], prefix: str = "config.") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        is_section = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat
