"""The version of a run over shards: each writes its rows to files of its own, which then get one manifest, card and name."""

import base64
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from pipeline.card import CARD_SAMPLES
from pipeline.cluster.job import Job, Told, do
from pipeline.cluster.workers import every
from pipeline.errors import StoreError, TableError
from pipeline.ledger import build_ledger
from pipeline.measure import Measure, added
from pipeline.objects import is_object, upload_folder
from pipeline.review import count_marks
from pipeline.run import LEFT_OUT, about_run, fill_draft, leakage_of
from pipeline.stages import Step, rejected, step_of
from pipeline.store import LEDGER_FILE, MANIFEST, Version, move, read_json, read_table, remove, scratch_folder, write_table
from pipeline.tables import LEDGER, SPLITS
from pipeline.version import (
    Draft,
    about_file,
    about_rows,
    newest,
    next_version,
    nothing_left,
    publish_version,
    version_digest,
)

DIGESTS = pa.schema([pa.field("sample_id", pa.string()), pa.field("digest", pa.string())])


def write_version(job: Job, funnel: list[Step], groups: int, check: Callable[[], None]) -> tuple[Version, bool]:
    """Write the version that the shards hold by now, or return the newest one (and False) if that holds the very same rows.

    Args:
        job: the run.
        funnel: what each stage did; the last step is added here.
        groups: how many groups of images look alike.
        check: raises where another command has taken over.

    Raises:
        TableError: no row is left, or shards do not fit together.
        StoreError: there is a version of that name by now.
    """
    source, model = (read_json(job.folder.made_by(stage)) for stage in ("source", "generate"))
    with scratch_folder(job.home / "versions") as draft:
        told = every(job.shards, partial(do, job, write_rows))
        rows = {split: sum(one["rows"].get(split, 0) for one in told) for split in SPLITS}
        held = {tuple(one["columns"]) for one in told if one["columns"]}
        if not held:
            raise nothing_left()
        if len(held) > 1:
            raise TableError("some samples have columns that others have not", hint="a source fills a column always or never")
        columns = list(held.pop())
        (named,) = every(1, partial(do, job, partial(name_version, columns)))
        lost = sum((Counter(one["lost"]) for one in told), Counter[str]())
        funnel.append(step_of("version", "images", sum(rows.values()), dict(lost)))
        if funnel[-1].input != funnel[0].kept:
            raise TableError(
                f"stage version was given {funnel[0].kept} images and returned {funnel[-1]}", hint="please report this bug"
            )
        parent = newest(job.folder)
        if parent is not None and parent.manifest["digest"] == named["digest"]:
            return parent, False
        measures = (pickle.loads(base64.b64decode(one["measured"])) for one in told)  # noqa: S301  # our own workers'
        total: Measure = reduce(added, measures, Measure())
        reviewed = sum((Counter(one["review"]) for one in told), Counter[str]())
        leakage = leakage_of(source, funnel, groups, sum(one["repeated"] for one in told))
        made_by = about_run(job.config, source, model, funnel, total.result(), leakage)
        made_by["review"] = {mark: reviewed[mark] for mark in ("good", "bad", "edited")} if reviewed else {}
        # What is in an object store is moved once: to where it stays, and is no version before it has a manifest.
        final = job.home / "versions" / named["version"] if is_object(draft) else draft
        check()
        if is_object(final):
            if (final / MANIFEST).exists():
                raise StoreError(f"{final} is there already, and a version never changes", hint="run the same command")
            remove(final)  # what a killed command has moved there
        files = _gather_files(draft, final, told)
        licences = {licence for one in told for licence in one["licences"]}
        shown = [row for one in told for row in one["shown"]][:CARD_SAMPLES]
        manifest = named | about_rows(columns, licences, rows) | made_by | {"files": files}
        return publish_version(job.folder, draft, manifest, shown), True


def write_rows(job: Job, number: int) -> Told:
    """Write the rows of a shard to Parquet files in a folder of its own; tell what they are."""
    folder = job.shard(number)
    # Of a name of its own: a worker that was given up must not write into files that are published.
    drafts, name = job.home / "versions" / ".next", f"{number:05d}-{uuid4().hex[:8]}"
    path = (job.scratch if is_object(drafts) else drafts) / name
    path.mkdir(parents=True)
    annotations = read_table(folder.stage("review"))
    draft = Draft(job.folder, path)
    rows, measure, shown = fill_draft(draft, annotations, folder, read_json(job.folder.made_by("source")))
    draft.close()
    left_out = pa.Table.from_pylist(rows.rejected, schema=LEFT_OUT)
    write_table(folder.stage("version", "rejected"), [left_out], LEFT_OUT)
    write_table(folder.stage("version", "ledger"), [build_ledger(rejected(folder) | {"version": left_out})], LEDGER)
    digests = pa.table({"sample_id": rows.digests.keys(), "digest": rows.digests.values()}, schema=DIGESTS)
    digests = digests.sort_by("sample_id")
    write_table(folder.stage("version", "digests"), [digests], DIGESTS)
    marked = [read_table(folder.stage("review", which), columns=["mark"]) for which in ("kept", "rejected")]
    files = {file.name: about_file(file) for file in sorted(path.iterdir())}
    if is_object(drafts):
        upload_folder(path, drafts / name)
        shutil.rmtree(path)
    return {
        "folder": name,
        "columns": draft.columns,
        "rows": draft.counts(),
        "files": files,
        "licences": sorted(rows.licences),
        "lost": dict(Counter(row["reason"] for row in rows.rejected)),
        "measured": base64.b64encode(pickle.dumps(measure)).decode(),
        "review": count_marks(*marked),
        "repeated": annotations.num_rows - annotations["repeats"].null_count,
        "shown": shown,
    }


def name_version(columns: list[str], job: Job, _: int) -> Told:
    """Gather the ledger, and return the digest of all rows and the name that follows from them."""
    parent = newest(job.folder)
    ledgers = (read_table(folder.stage("version", "ledger")) for folder in job.folders)
    write_table(job.home / "versions" / ".next" / LEDGER_FILE, ledgers, LEDGER)
    tables = [read_table(folder.stage("version", "digests"), columns=["sample_id"]) for folder in job.folders]
    ids = pa.concat_tables(tables)["sample_id"].combine_chunks()
    return {
        "version": next_version(parent, ids, columns),
        "digest": version_digest(_digests(job), columns),
        "parent": parent.name if parent else None,
    }


def _digests(job: Job) -> Iterator[tuple[str, str]]:
    """Yield (sample id, digest of its row), in the order of the ids: shards stand in theirs."""
    for folder in job.folders:
        table = read_table(folder.stage("version", "digests"))
        yield from zip(table["sample_id"].to_pylist(), table["digest"].to_pylist(), strict=True)


def _gather_files(draft: Path, folder: Path, told: list[Told]) -> dict[str, Any]:
    """Move the files of all shards into one folder, numbered in their order; return what the manifest says of them."""
    files: dict[str, Any] = {}
    moves: list[tuple[Path, Path]] = []
    numbers: Counter[str] = Counter()
    for one in told:
        for name, about in one["files"].items():
            split = name.rpartition("-")[0]
            final = f"{split}-{numbers[split]:05d}.parquet"
            numbers[split] += 1
            moves.append((draft / one["folder"] / name, folder / final))
            files[final] = about
    move(moves)
    for one in told:
        remove(draft / one["folder"])
    return dict(sorted(files.items()))
