"""The stages of a dataset folder: what each is given, what it leaves on the disk, and what is joined to its rows before it.

A stage itself is a plain function over rows; here are its effects. Each leaves `stages/<stage>/kept.parquet` and
`rejected.parquet`, so that a run can start again from any of them.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.balance import balance_annotations
from pipeline.config import DRAWN, Config, resolve
from pipeline.copies import Copies
from pipeline.dedupe import dedupe_annotations
from pipeline.errors import ConfigError, SourceError, TableError
from pipeline.filter import filter_annotations
from pipeline.generate.ask import Counts, ask_about, ask_all, read_annotations
from pipeline.generate.checks import Check, build_all, checks_of, read_checks
from pipeline.generate.engine import Choice
from pipeline.generate.journal import Journal
from pipeline.generate.requests import asked_of_each
from pipeline.image import prepare_image
from pipeline.leakage import Banned, banned_rows, repeated_in, split_of_name
from pipeline.likeness import Kind
from pipeline.marks import check_edits, name_of, read_marks
from pipeline.review import review_annotations
from pipeline.source import open_source
from pipeline.split import split_annotations
from pipeline.store import Folder, open_parquet, read_json, read_table, write_json, write_table
from pipeline.tables import ANNOTATION, BANNED, CHECK, MARK, SAMPLE, SOURCE_REJECTED
from pipeline.types import Chunk, Described, Engine, Rejected, Sample, Talk
from pipeline.validate import validate_annotations
from pipeline.verify import verify_annotations

# From validate to review a row is one annotation: (table, config) -> the same rows, plus columns and a `reason`.
STAGES: dict[str, Callable[[pa.Table, Config], pa.Table]] = {
    "validate": lambda table, config: validate_annotations(table),
    "filter": lambda table, config: filter_annotations(table, config.filter),
    "verify": lambda table, config: verify_annotations(table, config.verify),
    "dedupe": lambda table, config: dedupe_annotations(table, config.dedupe),
    "balance": lambda table, config: balance_annotations(table, config.balance, config.seed),
    "split": lambda table, config: split_annotations(table, config.split, config.seed),
    "review": lambda table, config: review_annotations(table),
}
ORDER = ("source", "generate", *STAGES, "version")
CHUNK_SAMPLES = 64  # or fewer, where they come to CHUNK_BYTES
CHUNK_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """What one stage did to its rows; kept and rejected add up to the input."""

    stage: str
    unit: str
    input: int
    kept: int
    rejected: dict[str, int] = field(default_factory=dict)


def write_banned(folder: Folder, config: Config, talk: Talk) -> list[dict[str, Any]]:
    """Read what must not be learned from, and return what it is: names, revisions, and numbers of images and texts."""
    known: list[dict[str, Any]] = []

    def tables() -> Iterator[pa.Table]:
        for named in config.never:
            name, split = split_of_name(named)
            urls = config.allow_urls and name.startswith(("hub:", "parquet:"))
            source = open_source(resolve(source=name, source_split=split, allow_urls=urls))
            label = f"{source.name}#{split}" if split else source.name
            rows: list[dict[str, Any]] = []
            unread = 0
            for sample in source.rows:
                if isinstance(sample, Rejected):
                    unread += 1
                    continue
                rows += banned_rows(label, [sample])
                talk(f"never {label}", len(rows), None)
            if not rows:
                raise SourceError(f"no image of {named} could be read, so none would be left out", hint="check --never")
            if unread:
                talk.say(f"never {label}: {unread} rows could not be read, and are not compared with")
            texts = sum(len(row["texts"]) for row in rows)
            about = {"name": label, "revision": source.revision, "images": len(rows), "texts": texts, "unread": unread}
            known.append(about)
            yield pa.Table.from_pylist(rows, schema=BANNED)

    write_table(folder.stage("source", "banned"), tables(), BANNED)
    return known


def write_source(folder: Folder, rows: Iterable[Sample | Rejected], banned: Banned, limit: int | None, talk: Talk) -> None:
    """Write rows of a source, kept and rejected; of several copies of an image one is kept, of a banned one none."""
    rejected: list[dict[str, str]] = []
    copies = Copies()

    def tables() -> Iterator[pa.Table]:
        batch: list[dict[str, Any]] = []
        for row in rows:
            if isinstance(row, Sample) and (name := banned.find(row)):
                row = Rejected(source_row=row.source_row, reason="banned_image", detail=name)
            found = copies.settle(row) if isinstance(row, Sample) else row
            if isinstance(found, Rejected):
                rejected.append(asdict(found))
                continue
            batch.append({"sample_id": found.id, **asdict(found)})
            if len(batch) == CHUNK_SAMPLES or sum(len(image) for each in batch for image in each["images"]) >= CHUNK_BYTES:
                yield pa.Table.from_pylist(batch, schema=SAMPLE)
                talk("source", len(copies.kept), limit)
                batch.clear()
            if len(copies.kept) == limit:
                break
        yield pa.Table.from_pylist(batch, schema=SAMPLE)
        talk("source", len(copies.kept), limit and len(copies.kept))

    write_table(folder.stage("source"), tables(), SAMPLE)
    if copies.changes:
        write_table(folder.stage("source"), map(copies.apply, batches(folder)), SAMPLE)
    rejected.sort(key=lambda row: row["source_row"])
    write_table(folder.stage("source", "rejected"), [pa.Table.from_pylist(rejected, schema=SOURCE_REJECTED)], SOURCE_REJECTED)


@contextmanager
def engine_of(choose: Callable[[], Choice]) -> Iterator[Callable[[], Engine]]:
    """Yield what returns an engine: made when it is first called, and closed in the end."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(choose().make()))


def generate(
    folder: Folder, config: Config, revision: str, engine: Callable[[], Engine], samples: int, counts: Counts, talk: Talk
) -> None:
    """Have every image asked about, then write what the replies say."""
    each = len(asked_of_each(config))
    with Journal(folder.journal) as journal, _cost_noted(folder, journal, counts):

        def started() -> Engine:
            ready = engine()
            talk("generate", counts.done // each, samples)  # from here on the time counts
            return ready

        for ready in ask_about(_chunks(folder), config, revision, started, journal, counts):
            again = {"not usable": f"{sum(counts.flaws.values()):,}"} if counts.flaws else {}
            talk("generate", counts.done // each, samples, ready.figures() | again)
        talk("generate", samples, samples)
        read = read_annotations(_about_samples(folder), config, revision, journal)
        write_table(folder.stage("generate"), read, ANNOTATION)


def read_banned(folder: Folder) -> pa.Table:
    """Return what must not be learned from (tables.BANNED)."""
    return read_table(require_file(folder.stage("source", "banned")))


def join_repeats(table: pa.Table, banned: pa.Table) -> pa.Table:
    """Join to each annotation the data set of --never that has its text: `repeats`. Nothing is rejected for it."""
    found = repeated_in(pc.coalesce(table["text"], table["question"]).to_pylist(), banned)
    return table.append_column("repeats", pa.array(found, pa.string()))


def join_checks(
    folder: Folder, config: Config, revision: str, engine: Callable[[], Engine], table: pa.Table, counts: Counts, talk: Talk
) -> pa.Table:
    """Have what verify wants to know asked, and join the answers to the annotations: `checks`."""
    rows = table.to_pylist()
    checks = [checks_of(row, config.verify) for row in rows]
    found = _ask_checks(folder, config, revision, engine, rows, checks, counts, talk) if any(checks) else [[] for _ in rows]
    return table.append_column("checks", pa.array(found, pa.list_(CHECK)))


def join_alignment(folder: Folder, config: Config, table: pa.Table, talk: Talk) -> pa.Table:
    """Join to each caption how well it fits its image, where that is asked for: `alignment`."""
    return table.append_column("alignment", pa.array(_alignments(folder, config, table.to_pylist(), talk), pa.float64()))


def join_likeness(table: pa.Table, known: pa.Table) -> pa.Table:
    """Join what is known of each sample beside the others (tables.LIKENESS)."""
    at = pc.index_in(table["sample_id"], known["sample_id"])
    for name in known.column_names[1:]:
        table = table.append_column(name, known[name].take(at))
    return table


def join_marks(folder: Folder, table: pa.Table, talk: Talk) -> pa.Table:
    """Join to each annotation what a person said of it: `mark`. One waits whose text is not there, or that cannot be used."""
    marks = {mark.name: mark for mark in read_marks(folder.marks)} if folder.marks.exists() else {}
    names = [name_of(row) for row in table.to_pylist()] if marks else [None] * table.num_rows
    if marks:
        wrong = check_edits(marks, {name_of(row): row for row in table.to_pylist()})
        used = {name: mark for name, mark in marks.items() if name not in wrong}
        lost = len(marks) - len(used.keys() & set(names))
        talk.say(f"review: {len(marks) - lost} marks apply{f'; {lost} fit no text that is there now' if lost else ''}")
        marks = used
    found = [marks[name].model_dump(include=set(MARK.names)) if name in marks else None for name in names]
    return table.append_column("mark", pa.array(found, MARK))


def apply(folder: Folder, name: str, marked: pa.Table, table: pa.Table) -> None:
    """Split what a stage marked into kept and rejected, and check that nothing was added, lost or swapped.

    Raises:
        TableError: the stage did not return exactly the rows that it was given.
    """
    kept = marked.filter(pc.is_null(marked["reason"])).drop_columns(["reason"])
    rejected = marked.filter(pc.is_valid(marked["reason"]))
    before = table["annotation_id"].to_pylist()
    after = kept["annotation_id"].to_pylist() + rejected["annotation_id"].to_pylist()
    if sorted(before) != sorted(after):
        raise TableError(
            f"stage {name} was given {len(before)} rows and returned {len(after)}, or others",
            hint="this is a bug in the stage; please report it",
        )
    write_table(folder.stage(name), [kept], kept.schema)
    write_table(folder.stage(name, "rejected"), [rejected], rejected.schema)


def require_stage(folder: Folder, name: str) -> tuple[int, dict[str, int]]:
    """Return what a stage left on the disk: the number of kept rows, and of rejected ones by reason."""
    kept = open_parquet(require_file(folder.stage(name))).metadata.num_rows
    reasons = read_table(require_file(folder.stage(name, "rejected")), columns=["reason"])["reason"].to_pylist()
    return kept, dict(Counter(reasons).most_common())


def step_of(name: str, unit: str, kept: int, lost: dict[str, int]) -> Step:
    """Return what a stage did, from what it kept and what it rejected by reason."""
    return Step(name, unit, kept + sum(lost.values()), kept, lost)


def rejected(folder: Folder) -> dict[str, pa.Table]:
    """Return what each stage before the last rejected."""
    return {name: read_table(require_file(folder.stage(name, "rejected"))) for name in ("source", *STAGES)}


def batches(folder: Folder, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the samples as they were written: one row group a batch."""
    file = open_parquet(folder.stage("source"))
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=columns).combine_chunks().to_batches()


def require_file(path: Path) -> Path:
    """Return a path that must be there. Raises ConfigError where it is not."""
    if not path.exists():
        raise ConfigError(f"{path} is missing", hint="run once without --from-stage")
    return path


def kind_of_images(config: Config) -> Kind | None:
    """Return how images are compared; None where they are known to be distinct, or are not to be compared."""
    kind = config.dedupe.images
    if kind == "auto":
        return None if config.source in DRAWN else "graphics" if "deck_qa" in config.tasks else "photos"
    return None if kind == "none" else kind


def public_name(model: str) -> str:
    """Return what may be told of a model: its name without a path, and without the revision that a server puts behind it."""
    name = model.rpartition("@")[0] or model
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name


def _ask_checks(
    folder: Folder,
    config: Config,
    revision: str,
    engine: Callable[[], Engine],
    rows: list[dict[str, Any]],
    checks: list[list[Check]],
    counts: Counts,
    talk: Talk,
) -> list[list[dict[str, str | None]]]:
    """Return the checks of each row with their answers; what the journal does not hold yet is asked."""
    wanted = Counter(check.kind for mine in checks for check in mine)
    told = ", ".join(f"{number:,} {kind}" for kind, number in sorted(wanted.items()))
    talk.say(f"verify asks at most {wanted.total():,} questions: {told}")
    of_sample: dict[str, list[Check]] = defaultdict(list)
    for row, mine in zip(rows, checks, strict=True):
        of_sample[row["sample_id"]] += mine
    with Journal(folder.journal) as journal, _cost_noted(folder, journal, counts):
        before = counts.done
        requests = build_all(_chunks(folder), of_sample, config, revision)
        for ready in ask_all(requests, config.generate.attempts, engine, journal, counts):
            talk("verify", counts.done - before, wanted.total(), ready.figures())
        return [read_checks(row["sample_id"], mine, config, revision, journal) for row, mine in zip(rows, checks, strict=True)]


def _alignments(folder: Folder, config: Config, rows: list[dict[str, Any]], talk: Talk) -> list[float | None]:
    """Return how well each caption fits its image, where that is asked for."""
    if "alignment" not in config.verify.checks or "deck_qa" in config.tasks:
        return [None] * len(rows)
    from pipeline.alignment import TINY_CLIP, Aligner

    name = config.verify.clip
    aligner = Aligner((TINY_CLIP if config.source in DRAWN else "clip") if name == "auto" else name)
    of_sample: dict[str, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        if row["task"] == "caption":
            of_sample[row["sample_id"]].append(n)
    found: list[float | None] = [None] * len(rows)
    done = 0
    for chunk in _chunks(folder):
        mine = [(sample_id, prepare_image(images[0])) for sample_id, images in chunk if sample_id in of_sample]
        at = [(n, image) for sample_id, image in mine for n in of_sample[sample_id]]
        cosines = aligner.cosines([image for _, image in at], [rows[n]["clean_text"] for n, _ in at])
        for (n, _), cosine in zip(at, cosines, strict=True):
            found[n] = cosine
        done += len(mine)
        talk("align", done, len(of_sample))
    return found


@contextmanager
def _cost_noted(folder: Folder, journal: Journal, counts: Counts) -> Iterator[None]:
    """Add what is asked meanwhile to the cost of the dataset: seconds of all passes that asked, and the journal's sums."""
    asked, start = counts.asked, time.monotonic()
    try:
        yield
    finally:
        if counts.asked > asked:
            before = read_json(folder.cost) if folder.cost.exists() else {"timed": 0, "seconds": 0.0}
            timed = before["timed"] + counts.asked - asked  # a pass that was killed has left no time
            seconds = round(before["seconds"] + time.monotonic() - start, 1)
            write_json(folder.cost, {**journal.totals(), "timed": timed, "seconds": seconds})


def _chunks(folder: Folder) -> Iterator[Chunk]:
    for batch in batches(folder, ["sample_id", "images"]):
        yield list(zip(batch["sample_id"].to_pylist(), map(tuple, batch["images"].to_pylist()), strict=True))


def _about_samples(folder: Folder) -> Iterator[Described]:
    for batch in batches(folder, ["sample_id", "images", "split"]):
        pages = pc.list_value_length(batch["images"]).to_pylist()
        yield list(zip(batch["sample_id"].to_pylist(), pages, batch["split"].to_pylist(), strict=True))
