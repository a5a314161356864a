"""Stage: version. Group annotations by image and write one immutable, content-addressed dataset.

The digest of a version is that of its rows as a set: where they came from in another order, they are the same version.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.card import render_card
from pipeline.errors import TableError
from pipeline.fingerprint import canonical, digest, file_digest
from pipeline.shards import SplitWriter
from pipeline.store import (
    CARD_FILE,
    LEDGER_FILE,
    MANIFEST,
    Folder,
    Version,
    open_parquet,
    publish,
    scratch_folder,
    write_json,
    write_table,
    write_text,
)
from pipeline.tables import CAPTION, LEDGER, OPTIONAL, PIXELS, QA, ROW, SPLITS, TABLE_VERSION, features, latest

FIRST = "v1.0.0"


@dataclass(slots=True)
class Rows:
    """What a pass over the rows of a version learns: one digest a row, by sample, and what was left out."""

    digests: dict[str, str] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)
    licences: set[str] = field(default_factory=set)


def build_rows(
    annotations: pa.Table, samples: Iterable[pa.RecordBatch], source: str, rows: Rows, *, decks: bool = False
) -> Iterator[pa.Table]:
    """Join each batch of samples (tables.SAMPLE) with its annotations; yield rows (tables.ROW) with their `split`.

    With `decks`, a sample is a document, though it may have one page only. A sample whose annotations were all rejected is
    noted in `rows.rejected`.
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
            row = _row(sample, mine, source, decks=decks)
            rows.digests[row["sample_id"]] = row_digest(row)
            rows.licences.add(row["licence"])
            kept.append(row)
        yield pa.Table.from_pylist(kept, schema=ROW.append(pa.field("split", pa.string())))


def row_digest(row: dict[str, Any]) -> str:
    """Return the digest of a row and its split; `sample_id` stands for the pixels."""
    return digest({name: value for name, value in row.items() if name not in PIXELS})


def version_digest(rows: Iterable[tuple[str, str]], columns: list[str]) -> str:
    """Return the name of a version's content, from its columns and the digest of each row by sample, in the order of the ids.

    It is the digest of [table version, columns, rows], made row by row.
    """
    made = hashlib.sha256(canonical([TABLE_VERSION, columns])[:-1] + b",[")
    for n, row in enumerate(rows):
        made.update((b"," if n else b"") + canonical(row))
    made.update(b"]]")
    return made.hexdigest()


def next_version(parent: Version | None, sample_ids: pa.Array, columns: list[str]) -> str:
    """Return the name that follows: major when columns change, minor when rows are added, else patch."""
    if parent is None:
        return FIRST
    major, minor, patch = parent.number
    if parent.manifest["columns"] != columns:
        return f"v{major + 1}.0.0"
    known = pa.concat_arrays([pa.array([], pa.string()), *(batch["sample_id"] for _, batch in parent.batches(["sample_id"]))])
    if not pc.all(pc.is_in(sample_ids, known)).as_py():
        return f"v{major}.{minor + 1}.0"
    return f"v{major}.{minor}.{patch + 1}"


@dataclass(slots=True)
class Draft:
    """A version that is being written: rows go in, then it is published or forgotten."""

    folder: Folder
    path: Path
    columns: list[str] = field(default_factory=list)
    _writers: dict[str, SplitWriter] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Write rows (tables.ROW) to the shards of their `split`."""
        if not table.num_rows:
            return
        self.columns = self.columns or [n for n in ROW.names if n not in OPTIONAL or table[n].null_count < table.num_rows]
        lost = [n for n in OPTIONAL if n not in self.columns and table[n].null_count < table.num_rows]
        if lost:
            raise TableError(
                f"some samples have {', '.join(lost)} and the first ones have not",
                hint="a source fills such a column always or never",
            )
        for split in SPLITS:
            mine = table.filter(pc.equal(table["split"], split))
            if mine.num_rows:
                if split not in self._writers:
                    self._writers[split] = SplitWriter(self.path, split, _schema(self.columns))
                self._writers[split].add(mine)

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each split."""
        return {split: self._writers[split].rows if split in self._writers else 0 for split in SPLITS}

    def close(self) -> None:
        """Finish all shards."""
        for writer in self._writers.values():
            writer.close()

    def publish(
        self, rows: Rows, made_by: dict[str, Any], ledger: pa.Table, samples: list[dict[str, Any]]
    ) -> tuple[Version, bool]:
        """Give the draft the next name, or return the newest version (and False) if that holds the very same rows.

        Args:
            rows: what was learned of the rows that went in.
            made_by: what made this version; counts, files, digest and names are added here.
            ledger: what every stage rejected (tables.LEDGER).
            samples: a few rows without their pixels, for the card.

        Raises:
            TableError: no row is left.
        """
        self.close()
        if not rows.digests:
            raise nothing_left()
        parent = newest(self.folder)
        content = version_digest(sorted(rows.digests.items()), self.columns)
        if parent is not None and parent.manifest["digest"] == content:
            return parent, False
        named = {
            "version": next_version(parent, pa.array(rows.digests, pa.string()), self.columns),
            "digest": content,
            "parent": parent.name if parent else None,
        }
        files = {path.name: about_file(path) for path in sorted(self.path.iterdir())}
        write_table(self.path / LEDGER_FILE, [ledger], LEDGER)
        held = about_rows(self.columns, rows.licences, self.counts())
        return publish_version(self.folder, self.path, named | held | made_by | {"files": files}, samples), True


@contextmanager
def draft_version(folder: Folder) -> Iterator[Draft]:
    """Yield a draft of the next version; what was not published is removed."""
    with scratch_folder(folder.path / "versions") as aside:
        draft = Draft(folder, aside)
        try:
            yield draft
        finally:
            draft.close()


def newest(folder: Folder) -> Version | None:
    """Return the newest version of a dataset folder, if there is one."""
    known = folder.versions()
    return known[-1] if known else None


def nothing_left() -> TableError:
    """Return the error to raise where a version would be empty."""
    hint = "stages/*/rejected.parquet hold the reasons; people's marks lie in review/"
    return TableError("no row is left to make a version of", hint=hint)


def about_rows(columns: list[str], licences: Iterable[str], counts: dict[str, int]) -> dict[str, Any]:
    """Return what a manifest says of the rows."""
    return {
        "table_version": TABLE_VERSION,
        "columns": columns,
        "features": features(_schema(columns)),
        "licences": sorted(licences),
        "rows": counts,
    }


def publish_version(folder: Folder, path: Path, manifest: dict[str, Any], samples: list[dict[str, Any]]) -> Version:
    """Add the card and the manifest to a folder that holds shards and ledger, and give it its name."""
    manifest = manifest | {"ledger": about_file(path / LEDGER_FILE)}
    write_text(path / CARD_FILE, render_card(manifest, samples))
    write_json(path / MANIFEST, manifest)
    final = folder.path / "versions" / manifest["version"]
    publish(path, final)
    return Version(final, manifest)


def _row(sample: dict[str, Any], annotations: list[dict[str, Any]], source: str, *, decks: bool) -> dict[str, Any]:
    captions = [a for a in annotations if a["task"] == "caption"]
    pairs = [a for a in annotations if a["task"] in ("qa", "deck_qa")]
    images = [{"bytes": image, "path": None} for image in sample["images"]]
    is_deck = decks or len(images) > 1
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
        "captions": [_last_words(a, CAPTION) for a in captions],
        "qa": [_last_words(a, QA) for a in pairs],
        "facts": sample["facts"],
        "page_facts": sample["page_facts"],
        "split": annotations[0]["split"],
    }


def _last_words(annotation: dict[str, Any], kind: pa.StructType) -> dict[str, Any]:
    """Return the fields of a caption or a question, each in its last words."""
    return {field.name: latest(annotation, field.name) for field in kind}


def _schema(columns: list[str]) -> pa.Schema:
    return pa.schema([ROW.field(name) for name in columns])


def about_file(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a Parquet file."""
    return {"sha256": file_digest(path), "bytes": path.stat().st_size, "rows": open_parquet(path).metadata.num_rows}
