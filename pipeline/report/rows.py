"""Read the rows that a report shows: texts of a version with their names in reviews, and what each step rejected.

All text is untrusted: long text is cut, and control characters are written out.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from pipeline.storage.files import open_table
from pipeline.tables import SCORE_NAMES
from pipeline.tasks.boxes import BOX_FIELDS
from pipeline.text.escape import MAX_SHOWN_CHARACTERS, visible
from pipeline.text.pii import redact
from pipeline.text.reasons import in_short, in_words

MAX_REJECTED = 1000  # shown for each reason of each step


def read_rows(version: Version, splits: Sequence[str], chosen: set[str] | None, at_once: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows for the page, `at_once` at a time, of `splits` in their order; `chosen` are sample ids, None: all."""
    columns = version.manifest["columns"]
    batches = version.batches(columns, at_once, splits) if chosen is None else version.find(columns, chosen, splits)
    for split, batch in batches:
        for start in range(0, batch.num_rows, at_once):
            rows = to_pylist(batch.slice(start, at_once))
            yield [_row(row, split, version.manifest.get("own_columns", {})) for row in rows]


def read_rejected(folder: Path) -> Iterator[dict[str, str]]:
    """Yield what each step rejected: `step`, `reason`, `id`, `where` and `what`; the first MAX_REJECTED of each reason.

    `where` is the row of the source, such as the name of a file; `id` that of the sample, if it got so far.
    """
    rows = list(_first_rejected(folder))
    names = _source_rows(folder, {row["id"] for row in rows if not row["where"]})
    for row in rows:
        yield row | {"where": row["where"] or visible(names.get(row["id"], row["id"]))}


def _first_rejected(folder: Path) -> Iterator[dict[str, str]]:
    files = [*folder.glob("steps/*/rejected.parquet"), *folder.glob("shards/*/steps/*/rejected.parquet")]
    for step in sorted({path.parent.name for path in files}):
        counts: Counter[str] = Counter()
        for path in DatasetDir(folder).step_files(step, "rejected"):
            for row in _rejected(path):
                counts[row["reason"]] += 1
                if counts[row["reason"]] <= MAX_REJECTED:
                    text = " ".join(row.get(f"clean_{name}") or row[name] for name in _TEXT_FIELDS if row.get(name))
                    yield {
                        "step": step,
                        "reason": visible(in_words(row["reason"])),
                        "id": visible(row.get("sample_id") or ""),
                        "where": visible(row.get("source_row") or ""),
                        "what": visible(redact(text or row.get("reply_text") or row.get("detail") or "")[0]),
                    }


def _source_rows(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Return the rows of the source of some samples, by their ids."""
    names: dict[str, str] = {}
    for path in DatasetDir(folder).step_files("read") if wanted else ():
        if path.exists():
            for batch in open_table(path, "sample_id").iter_batches(columns=["sample_id", "source_row"]):
                named = batch.filter(pc.is_in(batch["sample_id"], pa.array(wanted, pa.string())))
                names |= zip(named["sample_id"].to_pylist(), named["source_row"].to_pylist(), strict=True)
    return names


def _rejected(path: Path) -> Iterator[dict[str, Any]]:
    file = open_table(path, "reason")
    texts = [*_TEXT_FIELDS, *(f"clean_{name}" for name in _TEXT_FIELDS)]
    columns = ("reason", "sample_id", "source_row", "task", *texts, "reply_text", "detail")
    for batch in file.iter_batches(columns=[name for name in columns if name in file.schema_arrow.names]):
        yield from to_pylist(batch)


_TEXT_FIELDS = ("text", "question", "answer", "record")


def to_pylist(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return rows as Python objects. Raise StoreError for text that is not UTF-8: a version may be a stranger's."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        raise StoreError("a file holds text that is not UTF-8", hint="do not use this dataset") from None


def _row(row: dict[str, Any], split: str, own: dict[str, Any]) -> dict[str, Any]:
    pages = row.get("pages") or ([row["image"]] if row.get("image") else [])
    captions = [_text(row, caption, caption.get("style") or "") for caption in row.get("captions") or ()]
    pairs = [_text(row, pair, pair.get("answer_type") or "") for pair in row.get("qa") or ()]
    return {
        "id": row["sample_id"],
        "split": split,
        "from": visible(row.get("source_row") or ""),
        "small": (row.get("width_px") or 0) < 200,
        "images": [page["bytes"] for page in pages],
        "references": [visible(text) for text in row.get("references") or ()],
        "context": [visible(f"{name}: {value}") for name, value in (row.get("context") or {}).items() if value],
        "size": [row.get("width_px") or 0, row.get("height_px") or 0],
        "texts": captions + pairs + [_value(row, name, value) for name, of in own.items() for value in _values(row[name], of)],
    }


def _values(cell: Any, own: dict[str, Any]) -> list[Any]:
    """Return the annotations in a cell of an own task's column."""
    return (cell or []) if own["is_list"] else [] if cell is None else [cell]


def _value(row: dict[str, Any], task: str, value: Any) -> dict[str, Any]:
    """Return a value of an own task for the page: its name in reviews, its words, and the box that it draws, if it is one."""
    _, content = text_name({"sample_id": row["sample_id"], "task": task, "record": json.dumps(value)})
    entry: dict[str, Any] = {"content": content, "kind": visible(task), "value": visible(in_short(value))}
    box = next((value[name] for name in BOX_FIELDS if name in value), None) if isinstance(value, dict) else None
    return entry | ({"box": box, "label": visible(str(value.get("label") or task))} if _is_box(box) else {})


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)


def _text(row: dict[str, Any], annotation: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a text for the page: its name in reviews, kind, fields as shown, `raw` fields that differ, whether it is `cut`."""
    _, content = text_name(annotation | {"sample_id": row["sample_id"]})
    fields = {name: annotation[name] for name in (*_TEXT_FIELDS, "expression") if annotation.get(name)}
    shown = {name: visible(text) for name, text in fields.items()}
    entry: dict[str, Any] = {"content": content, "kind": visible(kind)} | shown
    if raw := {name: text for name, text in fields.items() if shown[name] != text}:
        entry["raw"] = {name: text[:MAX_SHOWN_CHARACTERS] for name, text in raw.items()}  # an edit starts from the raw text
    scores = {name: annotation[name] for name in SCORE_NAMES if annotation.get(name) is not None}
    if scores:
        entry["scores"] = {name: round(score, 3) for name, score in scores.items()}
    if annotation.get("evidence_pages"):
        entry["evidence_pages"] = annotation["evidence_pages"]
    if any(len(text) > MAX_SHOWN_CHARACTERS for text in fields.values()):
        entry["cut"] = True
    return entry
