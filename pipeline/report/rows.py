"""Read the rows of a report: the texts of a version with their ids for reviews, and the rejections.

All text is untrusted: long text is cut, and control characters are escaped.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.directory import NEAR_DUPLICATES_FILE, DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.dataset.reviews import EDITABLE, record_name, text_name
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from pipeline.storage.files import open_table
from pipeline.tables import SCORE_NAMES, final_value
from pipeline.tasks.boxes import BOX_FIELDS
from pipeline.text.escape import MAX_SHOWN_CHARACTERS, visible
from pipeline.text.pii import redact
from pipeline.text.reasons import in_short, in_words

# The page shows at most this many rejections per step and reason.
MAX_REJECTED = 1000
# The page enlarges images below this width without smoothing.
SMALL_WIDTH_PX = 200
# In these rejections of the read step, the detail is the id of another sample.
REPEATING = ("duplicate_image", "near_duplicate_image", "near_held_out_image")
_TEXT_FIELDS = ("text", "question", "answer", "record")


def read_rows(
    version: Version, splits: Sequence[str], chosen_ids: set[str] | None, batch_rows: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of rows for the page in the order of `splits`. Without `chosen_ids`, yield all rows."""
    columns, own_columns = version.manifest["columns"], version.manifest.get("own_columns", {})
    for split, batch in version.batches(columns, batch_rows, splits, chosen_ids):
        if batch.num_rows:
            yield [_row(row, split, own_columns) for row in to_pylist(batch)]


def write_rejected(folder: Path, path: Path) -> None:
    """Write all rejections of a dataset folder to a CSV file, one line each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["source_row", "step", "reason", "text"])
        for row in read_rejected(folder, sys.maxsize):
            writer.writerow([row["where"], row["step"], row["reason"], row["what"]])


def read_rejected(folder: Path, max_rows: int = MAX_REJECTED) -> Iterator[dict[str, str]]:
    """Yield the first `max_rows` rejections per step and reason, as dictionaries of strings.

    `where` is the source row, such as a file name. `id` is the sample id, or "" without one. `what` is the
    rejected text or the detail. `repeats` is the id of another sample with the same or a similar image.
    """
    rows = list(_first_rejected(folder, max_rows))
    unnamed = {row["id"] for row in rows if not row["where"]} | {row["repeats"] for row in rows}
    names = source_rows(DatasetDir(folder).step_files("read"), unnamed - {""})
    near = source_rows(DatasetDir(folder).step_files("read", NEAR_DUPLICATES_FILE))
    near_ids = {source_row: sample_id for sample_id, source_row in near.items()}
    for row in rows:
        row["where"] = row["where"] or visible(names.get(row["id"], row["id"]))
        row["id"] = row["id"] or near_ids.get(row["where"], "")
        if row["repeats"]:
            repeated = f"repeats {visible(names.get(row['repeats'], row['repeats']))}"
            row["what"] = ": ".join(filter(None, (repeated, row["what"])))
        yield row


def _first_rejected(folder: Path, max_rows: int) -> Iterator[dict[str, str]]:
    files = [*folder.glob("steps/*/rejected.parquet"), *folder.glob("shards/*/steps/*/rejected.parquet")]
    for step in sorted({path.parent.name for path in files}):
        counts: Counter[str] = Counter()
        for path in DatasetDir(folder).step_files(step, "rejected"):
            for row in _read_rejections(path):
                counts[row["reason"]] += 1
                if counts[row["reason"]] > max_rows:
                    continue
                text = " ".join(
                    row.get(f"clean_{name}") or row[name] for name in _TEXT_FIELDS if row.get(name)
                )
                is_repeated_row = row["reason"] in REPEATING and row.get("detail")
                repeats = row["detail"] if is_repeated_row else row.get("near_duplicate_of")
                detail = "" if is_repeated_row else row.get("detail")
                yield {
                    "step": step,
                    "reason": visible(in_words(row["reason"])),
                    "id": visible(row.get("sample_id") or ""),
                    "where": visible(row.get("source_row") or ""),
                    "what": visible(redact(text or row.get("reply_text") or detail or "")[0]),
                    "repeats": visible(repeats or ""),
                }


def _read_rejections(path: Path) -> Iterator[dict[str, Any]]:
    file = open_table(path, "reason")
    texts = [*_TEXT_FIELDS, *(f"clean_{name}" for name in _TEXT_FIELDS)]
    columns = ("reason", "sample_id", "source_row", *texts, "reply_text", "detail", "near_duplicate_of")
    for batch in file.iter_batches(columns=[name for name in columns if name in file.schema_arrow.names]):
        yield from to_pylist(batch)


def source_rows(files: Iterable[Path], ids: set[str] | None = None) -> dict[str, str]:
    """Return the source row of each sample, or of the samples with these ids, keyed by sample id."""
    names: dict[str, str] = {}
    for path in files if ids is None or ids else ():
        if path.exists():
            for batch in open_table(path, "sample_id").iter_batches(columns=["sample_id", "source_row"]):
                if ids is not None:
                    batch = batch.filter(pc.is_in(batch["sample_id"], pa.array(ids, pa.string())))
                names |= zip(batch["sample_id"].to_pylist(), batch["source_row"].to_pylist(), strict=True)
    return names


def to_pylist(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return rows as Python objects. Raises StoreError for text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        hint = "check it with `synth check`, or use another version"
        raise StoreError("a file has text that is not UTF-8", hint=hint) from None


def _row(row: dict[str, Any], split: str, own_columns: dict[str, Any]) -> dict[str, Any]:
    pages = row.get("pages") or ([row["image"]] if row.get("image") else [])
    texts = [_text(row, caption, caption.get("style") or "") for caption in row.get("captions") or ()]
    texts += [_text(row, pair, pair.get("answer_type") or "") for pair in row.get("qa") or ()]
    for name, column in own_columns.items():
        values = (row[name] or []) if column["is_list"] else [] if row[name] is None else [row[name]]
        texts += [_value(row, name, value) for value in values]
    context = row.get("context") or {}
    return {
        "id": row["sample_id"],
        "split": split,
        "from": visible(row.get("source_row") or ""),
        "small": (row.get("width_px") or 0) < SMALL_WIDTH_PX,
        "images": [page["bytes"] for page in pages],
        "references": [visible(text) for text in row.get("references") or ()],
        "context": [visible(f"{name}: {value}") for name, value in context.items() if value],
        "size": [row.get("width_px") or 0, row.get("height_px") or 0],
        "texts": texts,
    }


def _value(row: dict[str, Any], task: str, value: Any) -> dict[str, Any]:
    """Return a custom task's value for the page: its id for reviews, its text, and its box if it has one."""
    _, content = record_name(row["sample_id"], task, value)
    entry: dict[str, Any] = {"content": content, "kind": visible(task), "value": visible(in_short(value))}
    fields = value if isinstance(value, dict) else {}
    box = next((fields[name] for name in BOX_FIELDS if name in fields), None)
    if isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box):
        entry |= {"box": box, "label": visible(str(fields.get("label") or task))}
    return entry


def annotation_text(row: dict[str, Any]) -> dict[str, Any]:
    """Return the final text of an annotation for a page, as in a row of a version."""
    if (record := final_value(row, "record")) is not None:
        return _value(row, row["task"], json.loads(record))
    final = {name: final_value(row, name) for name in EDITABLE}
    return _text(row, final, (row["style"] if final["text"] else row["answer_type"]) or "")


def _text(row: dict[str, Any], annotation: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a text for the page: its id for reviews, its escaped fields, and `raw` unescaped fields."""
    _, content = text_name(annotation | {"sample_id": row["sample_id"]})
    fields = {name: annotation[name] for name in (*_TEXT_FIELDS, "expression") if annotation.get(name)}
    shown = {name: visible(text) for name, text in fields.items()}
    entry: dict[str, Any] = {"content": content, "kind": visible(kind)} | shown
    if raw := {name: text for name, text in fields.items() if shown[name] != text}:
        # The editor on the page starts from this text.
        entry["raw"] = {name: text[:MAX_SHOWN_CHARACTERS] for name, text in raw.items()}
    if scores := {name: annotation[name] for name in SCORE_NAMES if annotation.get(name) is not None}:
        entry["scores"] = {name: round(score, 3) for name, score in scores.items()}
    if annotation.get("evidence_pages"):
        entry["evidence_pages"] = annotation["evidence_pages"]
    if any(len(text) > MAX_SHOWN_CHARACTERS for text in fields.values()):
        entry["cut"] = True
    return entry


def steps_match(folder: Path, manifest: dict[str, Any]) -> bool:
    """Return whether the step files in a dataset folder have the row counts in the manifest of a version."""
    dataset = DatasetDir(folder)
    steps = [step for step in manifest.get("funnel", []) if step["unit"] == "annotations"]
    return bool(steps) and all(
        sum(open_table(path).metadata.num_rows for path in dataset.step_files(step["step"])) == step["kept"]
        for step in steps
    )


def images_of(folder: Path, ids: set[str]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield (sample id, images) for samples, including rejected ones. Skip missing images."""
    store = ImageStore(folder)
    for sample_id in store.in_order(ids) if ids else ():
        with suppress(StoreError):
            yield sample_id, store.read([sample_id])[0].as_py()
