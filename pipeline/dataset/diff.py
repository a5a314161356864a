"""Compare two versions: added, removed and changed rows with their fields, and changed settings."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
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
    settings: Settings
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("same", "added", "removed", "changed"), 0)
    )
    fields: dict[str, int] = field(default_factory=dict)  # number of changed rows for each field
    changes: list[Change] = field(default_factory=list)

    def lines(self, rows: int) -> Iterator[str]:
        """Yield the lines of a report: row counts, changed fields and settings, and up to `rows` changes."""
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        yield f"{self.before} -> {self.after}: {counts}"
        if self.fields:
            yield "changed fields:"
            yield from (f"  {count:>7}  {name}" for name, count in self.fields.items())
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
        if others := sum(self.counts.values()) - self.counts["same"] - len(shown):
            yield f"and {others} more rows; --rows shows more, --json all"


def _short(value: Any) -> str:
    """Return a value as a short line without control characters. It may be text from a model."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {item}" for name, item in value.items() if item not in (None, ""))
    text = on_one_line(str(value))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 1]}…"


def diff_versions(before: Version, after: Version, max_changes: int | None = None) -> Diff:
    """Compare two versions, and keep the first `max_changes` changes. Raises StoreError if one is damaged.

    A column or score that only one version has is a changed setting, not a change of every row.
    """
    manifests = before.manifest, after.manifest
    columns = [name for name in before.manifest["columns"] if name in after.manifest["columns"]]
    columns = [name for name in columns if name not in PIXELS]
    scores = {*manifests[0].get("scores", ())} ^ {*manifests[1].get("scores", ())}

    hashes = {row["sample_id"]: hash(str(row)) for row in _read_rows(before, columns, scores)}
    diff = Diff(before.name, after.name, _changed_settings(*manifests))
    different: list[str] = []
    for row in _read_rows(after, columns, scores):
        if hashes.pop(row["sample_id"], None) == hash(str(row)):
            diff.counts["same"] += 1
        else:
            different.append(row["sample_id"])
    ids, changed = sorted({*different, *hashes}), Counter[str]()
    for start in range(0, len(ids), BATCH_ROWS):
        batch_ids = ids[start : start + BATCH_ROWS]
        old, new = (
            {row["sample_id"]: row for row in _read_rows(version, columns, scores, batch_ids)}
            for version in (before, after)
        )
        for sample_id in batch_ids:
            change = _compare(old.get(sample_id), new.get(sample_id))
            if change.what == "changed" and not change.fields:
                # Only the order of fields differs.
                diff.counts["same"] += 1
                continue
            diff.counts[change.what] += 1
            changed.update(change.fields.keys())
            if max_changes is None or len(diff.changes) < max_changes:
                diff.changes.append(change)
    diff.fields = dict(changed.most_common())
    return diff


def _read_rows(
    version: Version, columns: list[str], scores: set[str], sample_ids: Collection[str] | None = None
) -> Iterator[Row]:
    for split, batch in version.batches(columns, sample_ids=sample_ids):
        try:
            rows = batch.to_pylist()
        except ValueError as error:
            raise version.damage_error(error) from None
        for row in rows:
            for annotation in (one for name in LISTS if scores for one in row.get(name) or ()):
                for score in scores & annotation.keys():
                    del annotation[score]
            yield row | {"split": split}


def _compare(old: Row | None, new: Row | None) -> Change:
    row = new or old or {}
    what = "changed" if old and new else "added" if new else "removed"
    change = Change(row["sample_id"], row.get("source_row") or "", what)
    for name, before in (old or {}).items() if new else ():
        after = (new or {})[name]
        if before != after and name in LISTS:
            removed = [item for item in before or [] if item not in (after or [])]
            added = [item for item in after or [] if item not in (before or [])]
            change.fields[name] = {"removed": removed, "added": added}
        elif before != after:
            change.fields[name] = {"before": before, "after": after}
    return change


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
