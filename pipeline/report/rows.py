"""The rows that a page shows: texts of a version with what a mark calls them, and what each stage rejected.

Everything here may be hostile. Text is cut where it is too long for a page, control characters are shown instead of obeyed,
and bytes that are no UTF-8 do not end the report.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import text_name
from pipeline.dataset.version import Version
from pipeline.storage.files import open_table
from pipeline.tables import PIXELS

MAX_SHOWN_CHARACTERS = 2000
MAX_REJECTED = 1000  # shown for each reason of each stage
# Characters that move the cursor, turn the direction of writing or hide; joiners (200c, 200d) are part of scripts and emoji.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text as a page may show it: of bounded length, with control characters written out."""
    cut = text[:MAX_SHOWN_CHARACTERS]
    shown = _CONTROLS.sub(lambda found: f"[U+{ord(found[0]):04X}]", cut)
    return shown if len(text) <= MAX_SHOWN_CHARACTERS else f"{shown}… ({len(text):,} characters)"


def read_rows(version: Version, splits: Sequence[str], chosen: set[str] | None, at_once: int) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of a version: `id`, `split`, `from` (its source), `images` (bytes), `small`, `references` and `texts`.

    Args:
        version: the version.
        splits: in which order.
        chosen: the sample ids that are wanted; None: all.
        at_once: how many rows at a time.
    """
    for split, batch in version.batches(version.manifest["columns"], at_once, splits):
        if chosen is not None:
            wanted = [n for n, sample_id in enumerate(batch["sample_id"].to_pylist()) if sample_id in chosen]
            batch = batch.take(pa.array(wanted, pa.int64()))
        yield [_row(row, split) for row in to_pylist(batch)]


def read_rejected(folder: Path) -> Iterator[dict[str, str]]:
    """Yield what each stage rejected: `stage`, `reason`, `where` and `what`; of each reason the first ones."""
    files = [*folder.glob("stages/*/rejected.parquet"), *folder.glob("shards/*/stages/*/rejected.parquet")]
    for stage in sorted({path.parent.name for path in files}):
        shown: Counter[str] = Counter()
        for path in DatasetDir(folder).stage_files(stage, "rejected"):
            for row in _rejected(path):
                shown[row["reason"]] += 1
                if shown[row["reason"]] <= MAX_REJECTED:
                    said = " ".join(row[name] for name in _SAID if row.get(name))
                    yield {
                        "stage": stage,
                        "reason": visible(row["reason"]),
                        "where": visible(row.get("sample_id") or row.get("source_row") or ""),
                        "what": visible(said or row.get("reply_text") or row.get("detail") or ""),
                    }


def _rejected(path: Path) -> Iterator[dict[str, Any]]:
    file = open_table(path, "reason")
    wanted = ("reason", "sample_id", "source_row", "task", *_SAID, "reply_text", "detail")
    for batch in file.iter_batches(columns=[name for name in wanted if name in file.schema_arrow.names]):
        yield from to_pylist(batch)


_SAID = ("text", "question", "answer")


def to_pylist(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return rows as Python objects, with a question mark for each byte that is no UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        table = pa.Table.from_batches([batch])
        as_bytes = table.cast(pa.schema([field.with_type(_binary(field.type)) for field in table.schema]))
        return [
            {name: value if name in (*PIXELS, "images") else _decoded(value) for name, value in row.items()}
            for row in as_bytes.to_pylist()
        ]


def _binary(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_list(kind):
        return pa.list_(_binary(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(n).with_type(_binary(kind.field(n).type)) for n in range(kind.num_fields)])
    return kind


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return {name: _decoded(item) for name, item in value.items()} if isinstance(value, dict) else value


def _row(row: dict[str, Any], split: str) -> dict[str, Any]:
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
        "texts": captions + pairs,
    }


def _text(row: dict[str, Any], said: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a text: what a mark calls it, of which kind it is, its words as they are shown, those that are really others
    (`raw`), and whether they were `cut`.
    """
    _, content = text_name(said | {"sample_id": row["sample_id"]})
    words = {name: said[name] for name in (*_SAID, "expression") if said.get(name)}
    shown = {name: visible(text) for name, text in words.items()}
    found: dict[str, Any] = {"content": content, "kind": visible(kind)} | shown
    if raw := {name: text for name, text in words.items() if shown[name] != text}:
        found["raw"] = {name: text[:MAX_SHOWN_CHARACTERS] for name, text in raw.items()}  # what is edited is not what is shown
    if said.get("evidence_pages"):
        found["evidence_pages"] = said["evidence_pages"]
    if any(len(text) > MAX_SHOWN_CHARACTERS for text in words.values()):
        found["cut"] = True
    return found
