"""Stage: version. Group annotations by image and write one immutable, content-addressed dataset.

Rows stay in the order of the source, and shards are cut at a size, so that a later version shares most of its bytes with
this one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import TableError
from pipeline.fingerprint import digest, file_digest
from pipeline.store import Folder, Version, publish, scratch_folder, write_json, write_text
from pipeline.tables import CAPTION, OPTIONAL, PIXELS, QA, ROW, SPLITS, TABLE_VERSION, features, with_features

SHARD_BYTES = 300_000_000
FIRST = "v1.0.0"


@dataclass(slots=True)
class Rows:
    """What a pass over the rows of a version learns: one digest a row, by sample, and what was left out."""

    digests: dict[str, str] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)
    licences: set[str] = field(default_factory=set)


def build_rows(annotations: pa.Table, samples: Iterable[pa.RecordBatch], source: str, rows: Rows) -> Iterator[pa.Table]:
    """Join each batch of samples (tables.SAMPLE) with its annotations; yield rows (tables.ROW) with their `split`.

    A sample whose annotations were all rejected is noted in `rows.rejected`.
    """
    of_sample: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations.to_pylist():
        of_sample[annotation["sample_id"]].append(annotation)
    for batch in samples:
        kept = []
        for sample in batch.to_pylist():
            mine = of_sample.get(sample["sample_id"])
            if not mine:
                rows.rejected.append({"sample_id": sample["sample_id"], "reason": "no_annotation_left"})
                continue
            row = _row(sample, mine, source)
            rows.digests[row["sample_id"]] = row_digest(row)
            rows.licences.add(row["licence"])
            kept.append(row)
        yield pa.Table.from_pylist(kept, schema=ROW.append(pa.field("split", pa.string())))


def row_digest(row: dict[str, Any]) -> str:
    """Return the digest of a row and its split; `sample_id` stands for the pixels."""
    return digest({name: value for name, value in row.items() if name not in PIXELS})


def version_digest(rows: dict[str, str], columns: list[str]) -> str:
    """Return the name of a version's content: its columns and its rows in order."""
    return digest([TABLE_VERSION, columns, list(rows.items())])


def next_version(parent: Version | None, rows: dict[str, str], columns: list[str]) -> str:
    """Return the name that follows: major when columns change, minor when rows are added, else patch."""
    if parent is None:
        return FIRST
    major, minor, patch = parent.number
    if parent.manifest["columns"] != columns:
        return f"v{major + 1}.0.0"
    if rows.keys() - sample_ids(parent):
        return f"v{major}.{minor + 1}.0"
    return f"v{major}.{minor}.{patch + 1}"


def sample_ids(version: Version) -> set[str]:
    """Return the ids of all images of a version."""
    tables = [version.read(split, ["sample_id"]) for split in SPLITS if version.shards(split)]
    return {sample_id for table in tables for sample_id in table["sample_id"].to_pylist()}


def write_version(
    folder: Folder,
    tables: Iterable[pa.Table],
    rows: Rows,
    manifest: dict[str, Any],
    funnel: Callable[[], list[dict[str, Any]]],
    render_card: Callable[[dict[str, Any]], str],
) -> tuple[Version, bool]:
    """Write the next version, or return the newest one (and False) if it holds the very same rows.

    Args:
        folder: the dataset folder.
        tables: rows with their split, from `build_rows`; read once.
        rows: filled by `tables` as it is read.
        manifest: what made this version; counts, files, digest and names are added here.
        funnel: called when all rows are written; returns what every stage kept and rejected.
        render_card: a function from the finished manifest to the text of README.md.

    Raises:
        TableError: no row is left.
    """
    known = folder.versions()
    parent = known[-1] if known else None
    with scratch_folder(folder.path / "versions") as aside:
        columns, counts = _write_shards(aside, tables)
        if not rows.digests:
            raise TableError("no row is left to make a version of", hint="stages/*/rejected.parquet hold the reasons")
        content = version_digest(rows.digests, columns)
        steps = funnel()
        if parent is not None and parent.manifest["digest"] == content:
            return parent, False
        name = next_version(parent, rows.digests, columns)
        files = {
            path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size, "rows": pq.read_metadata(path).num_rows}
            for path in sorted(aside.iterdir())
        }
        whole = {
            "version": name,
            "digest": content,
            "parent": parent.name if parent else None,
            "table_version": TABLE_VERSION,
            "columns": columns,
            "features": features(_schema(columns)),
            "licences": sorted(rows.licences),
            "rows": counts,
            **manifest,
            "funnel": steps,
            "files": files,
        }
        write_text(aside / "README.md", render_card(whole))
        write_json(aside / "manifest.json", whole)
        final = folder.path / "versions" / name
        publish(aside, final)
    return Version(final, whole), True


def _row(sample: dict[str, Any], annotations: list[dict[str, Any]], source: str) -> dict[str, Any]:
    captions = [a for a in annotations if a["task"] == "caption"]
    pairs = [a for a in annotations if a["task"] in ("qa", "deck_qa")]
    images = [{"bytes": image, "path": None} for image in sample["images"]]
    is_deck = len(images) > 1
    return {
        "sample_id": sample["sample_id"],
        "image": None if is_deck else images[0],
        "pages": images if is_deck else None,
        "width_px": sample["width_px"],
        "height_px": sample["height_px"],
        "source": source,
        "source_row": sample["source_row"],
        "licence": sample["licence"],
        "references": sample["references"],
        "reference_qa": sample["reference_qa"],
        "captions": [{field.name: a[field.name] for field in CAPTION} for a in captions],
        "qa": [{field.name: a[field.name] for field in QA} for a in pairs],
        "facts": sample["facts"],
        "page_facts": sample["page_facts"],
        "split": annotations[0]["split"],
    }


def _schema(columns: list[str]) -> pa.Schema:
    return pa.schema([ROW.field(name) for name in columns])


def _write_shards(folder: Path, tables: Iterable[pa.Table]) -> tuple[list[str], dict[str, int]]:
    """Write each row to its split's shard; return the columns and the number of rows by split."""
    counts = dict.fromkeys(SPLITS, 0)
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    columns: list[str] = []
    with ExitStack() as stack:
        writers: dict[str, pq.ParquetWriter] = {}
        for table in tables:
            if not table.num_rows:
                continue
            columns = columns or [n for n in ROW.names if n not in OPTIONAL or table[n].null_count < table.num_rows]
            for split in SPLITS:
                mine = table.filter(pc.equal(table["split"], split))
                if not mine.num_rows:
                    continue
                if split not in writers or shards[split][-1].stat().st_size > SHARD_BYTES:
                    if split in writers:
                        writers[split].close()
                    shards[split].append(folder / f"{split}-{len(shards[split]):05d}.parquet")
                    writer = pq.ParquetWriter(shards[split][-1], with_features(_schema(columns)), compression="zstd")
                    writers[split] = stack.enter_context(writer)
                writers[split].write_table(mine.select(columns).cast(with_features(_schema(columns))))
                counts[split] += mine.num_rows
    return columns, counts
