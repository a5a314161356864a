"""One HTML file that shows a dataset: the way from source to split, pictures with their texts, what was rejected, curves.

It needs no server and asks nothing of the network. Text of a model is data: the template escapes all of it.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.page import chart, points, render_page, thumbnail_uri
from pipeline.store import Folder, Version, aside
from pipeline.tables import SPLITS

MAX_SHOWN = 300
MAX_REJECTED = 100


def write_report(version: Version, folder: Path, checkpoint: Path | None = None) -> Path:
    """Write `report.html` into the dataset folder and return its path; the training of `checkpoint` is shown if given."""
    rows = _rows(version)
    page = render_page(
        "pipeline",
        "report.html.j2",
        manifest=version.manifest,
        rows=rows,
        uris={row["sample_id"]: row["uris"] for row in rows},
        total=sum(version.manifest["rows"].values()),
        answers=_answers(version),
        rejected=_rejected(folder),
        training=_training(checkpoint) if checkpoint else None,
    )
    with aside(folder / "report.html") as temporary:
        # A lone surrogate cannot be written as UTF-8; it is shown as a question mark.
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return folder / "report.html"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint under a dataset folder that was scored last, if any."""
    found = sorted((folder / "checkpoints").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None


def _rows(version: Version) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for split in reversed(SPLITS):  # held-out images first: they are what scores are about
        for shard in version.shards(split):
            for batch in pq.ParquetFile(shard).iter_batches(batch_size=64):
                if len(rows) >= MAX_SHOWN:
                    return rows
                rows += [
                    row
                    | {"split": split, "uris": [thumbnail_uri(image["bytes"]) for image in row.get("pages") or [row["image"]]]}
                    for row in batch.to_pylist()
                ]
    return rows[:MAX_SHOWN]


def _answers(version: Version) -> dict[str, list[tuple[str, int]]]:
    """Return the most frequent answers by type, over all splits."""
    counts: dict[str, Counter[str]] = {}
    for split in SPLITS:
        if version.shards(split):
            for pairs in version.read(split, ["qa"])["qa"].to_pylist():
                for pair in pairs:
                    counts.setdefault(pair["answer_type"], Counter())[pair["answer"]] += 1
    return {kind: found.most_common(8) for kind, found in sorted(counts.items())}


def _rejected(folder: Path) -> list[dict[str, Any]]:
    """Return some of the rows that each stage rejected."""
    found: list[dict[str, Any]] = []
    for path in sorted(Folder(folder).path.glob("stages/*/rejected.parquet")):
        rows = pq.read_table(path).slice(0, MAX_REJECTED).to_pylist()
        for row in rows:
            what = row.get("text") or row.get("question") or row.get("detail") or ""
            more = f" {row['answer']}" if row.get("answer") else ""
            where = row.get("sample_id", "")[:12] or row.get("source_row", "")
            found.append({"stage": path.parent.name, "reason": row["reason"], "where": where, "what": what + more})
    return found


def _training(checkpoint: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (checkpoint / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    return {
        "metrics": metrics,
        "curves": [
            chart("Loss", {"training": points(lines, "loss"), "validation": points(lines, "validation_loss")}),
            chart(
                "CIDEr-D on the validation split",
                {"own image": points(lines, "validation_cider_d"), "shuffled": points(lines, "validation_shuffled_cider_d")},
            ),
        ],
    }
