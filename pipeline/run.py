"""The ordered run: source, generate, then one plain function a stage, then a version. The sums are checked after each.

Every stage leaves `stages/<stage>/kept.parquet` and `rejected.parquet`, so that a run can start again from any of them.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.balance import balance_annotations, read_entries
from pipeline.card import CARD_SAMPLES
from pipeline.config import DRAWN, Config, resolve
from pipeline.copies import Copies
from pipeline.dedupe import dedupe_annotations
from pipeline.errors import ConfigError, SourceError, SynthError, TableError
from pipeline.filter import filter_annotations
from pipeline.fingerprint import file_digest
from pipeline.generate.ask import Counts, ask_about, ask_all, read_annotations
from pipeline.generate.checks import TASK as ANSWER
from pipeline.generate.checks import Check, build_all, checks_of, read_checks
from pipeline.generate.engine import Choice, choose_engine
from pipeline.generate.journal import Journal
from pipeline.generate.requests import asked_of_each, check_prompts, prompt_texts
from pipeline.image import prepare_image
from pipeline.leakage import Banned, banned_rows, repeated_in, split_of_name
from pipeline.ledger import build_ledger
from pipeline.likeness import Kind, compare_samples
from pipeline.marks import check_edits, format_marks, merge_marks, name_of, read_marks
from pipeline.measure import Measure
from pipeline.review import count_marks, review_annotations
from pipeline.schema import wire_schema
from pipeline.source import open_source
from pipeline.split import split_annotations
from pipeline.store import Folder, Version, dataset_folder, disk_errors, read_json, write_json, write_table, write_text
from pipeline.tables import ANNOTATION, BANNED, CHECK, MARK, PIXELS, SAMPLE, SOURCE_REJECTED
from pipeline.types import Chunk, Described, Engine, Rejected, Sample, Silence, Source, Talk
from pipeline.validate import validate_annotations
from pipeline.verify import verify_annotations
from pipeline.version import Rows, build_rows, draft_version

# From validate to split a row is one annotation: (table, config) -> the same rows, plus columns and a `reason`.
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
LEFT_OUT = pa.schema([pa.field("sample_id", pa.string()), pa.field("reason", pa.string())])
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


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made: the version, whether it is new, and how many requests it took."""

    version: Version
    is_new: bool
    counts: Counts
    funnel: list[Step]


def generate_version(
    config: Config, out: Path | None = None, from_stage: str | None = None, talk: Talk | None = None
) -> Result:
    """Run all stages in order and return the version that comes out.

    Args:
        config: what to make.
        out: the dataset folder; default `data/<source>`.
        from_stage: start at this stage from what the one before it left on the disk.
        talk: told about the progress of the slow stages.

    Raises:
        SynthError: whatever a user can mend; finished work stays on the disk.
    """
    folder = Folder(out or dataset_folder(config.source))
    if from_stage is not None and from_stage not in ORDER:
        raise ConfigError(f"unknown stage: {from_stage}", hint=f"stages in order: {', '.join(ORDER)}")
    start = ORDER.index(from_stage) if from_stage else 0
    check_prompts(config)
    read_entries(config.balance.entries)
    with disk_errors(folder.path):
        _refuse_other_settings(folder, config, start)
    source = open_source(config) if start <= ORDER.index("source") else None
    with disk_errors(folder.path), folder.lock():
        return _run(folder, config, source, start, talk or Silence())


def apply_marks(folder: Folder, files: Sequence[Path], talk: Talk | None = None) -> Result:
    """Add files of marks to those of a dataset folder, and make the version that follows from them.

    Raises:
        ConfigError: a file holds no marks, an edit cannot be used, or no mark is about this dataset; then all is as it was.
        SynthError: see `generate_version`.
    """
    with disk_errors(folder.path):
        config = _settings_of(folder)
        new = [(mark, path) for path in files for mark in read_marks(path)]
        if not new:
            raise ConfigError(f"no mark in {', '.join(map(str, files))}", hint="mark texts in a report, then export the marks")
        with folder.lock():
            if not folder.stage("split").exists():
                raise ConfigError(f"{folder.path} has no finished run to review", hint="run `synth generate` in it first")
            before = read_marks(folder.marks) if folder.marks.exists() else []
            rows = {name_of(row): row for row in pq.read_table(folder.stage("split")).to_pylist()}
            known = {*rows, *(mark.makes for mark in before)}
            if not any(mark.name in known for mark, _ in new):
                raise ConfigError(
                    f"none of the {len(new)} marks is about a text of {folder.path}",
                    hint="name the dataset folder that the report was made of",
                )
            merged = merge_marks(before, [mark for mark, _ in new], rows)
            for name, wrong in check_edits(merged, rows).items():
                mark, from_file = merged[name], {mark.makes: path for mark, path in new}
                said = mark.text or f"{mark.question} {mark.answer}"
                where = from_file.get(mark.makes, folder.marks)
                raise ConfigError(f"{where}: the edited text {said[:80]!r} cannot be used: {wrong}", hint="edit it again")
            write_text(folder.marks, format_marks(merged.values()))
            try:
                return _run(folder, config, None, ORDER.index("review"), talk or Silence())
            except SynthError:
                write_text(folder.marks, format_marks(before))
                raise


def _run(folder: Folder, config: Config, source: Source | None, start: int, talk: Talk) -> Result:
    choice = choose_engine(config, folder.server_log, talk) if start <= ORDER.index("generate") else None
    settings = config.model_dump(mode="json")
    if not folder.run_file.exists() or read_json(folder.run_file) != settings:
        # What other settings have made must not be taken for ours by a later run that starts in the middle.
        for name in ORDER[start:]:
            for which in ("kept", "rejected"):
                folder.stage(name, which).unlink(missing_ok=True)
    write_json(folder.run_file, settings)
    counts, funnel = Counts(), []
    if source is not None:
        never = _write_banned(folder, config, talk)
        _write_source(folder, source, config, talk)
        about = {"name": source.name, "revision": source.revision, "decks": source.decks, "never": never}
        write_json(folder.made_by("source"), about | {"compared_as": _kind_of_images(config)})
    elif config.never and read_json(_require_file(folder.made_by("source"))).get("compared_as") != _kind_of_images(config):
        raise ConfigError("dedupe.images has changed since images were compared with --never", hint="run without --from-stage")
    samples, lost = _require_stage(folder, "source")
    funnel.append(_step("source", "images", samples, lost))
    if choice is not None:
        _generate(folder, config, choice, samples, counts, talk)
        write_json(folder.made_by("generate"), {"name": public_name(choice.model), "revision": choice.revision})
    table = pq.read_table(_require_file(folder.stage("generate")))
    replies = len(table["request_id"].unique())
    if replies != samples * len(asked_of_each(config)):
        raise ConfigError("not every image has been asked about yet", hint="run once without --from-stage")
    funnel.append(_step("generate", "requests", replies, {}))  # a reply that cannot be read is rejected by validate
    for name, stage in STAGES.items():
        if start <= ORDER.index(name):
            # What a stage needs beside its rows is joined before it, here, where effects are.
            if name == "filter":
                table = _with_repeats(folder, table)
            elif name == "verify":
                table = _with_checks(folder, config, table, counts, talk)
            elif name == "dedupe":
                table = _with_likeness(folder, config, table)
            elif name == "review":
                table = _with_marks(folder, table, talk)
            _apply(folder, name, stage(table, config), table)
        kept, lost = _require_stage(folder, name)
        if kept + sum(lost.values()) != table.num_rows:
            raise TableError(f"stage {name} is not made from what the stage before it kept", hint="run without --from-stage")
        funnel.append(_step(name, "annotations", kept, lost))
        table = pq.read_table(folder.stage(name))
    version, is_new = _write_version(folder, config, table, samples, funnel)
    return Result(version, is_new, counts, funnel)


def _with_repeats(folder: Folder, table: pa.Table) -> pa.Table:
    """Join to each annotation the data set of --never that has its text: `repeats`. Nothing is rejected for it."""
    texts = pc.coalesce(table["text"], table["question"]).to_pylist()
    found = repeated_in(texts, pq.read_table(_require_file(folder.stage("source", "banned"))))
    return table.append_column("repeats", pa.array(found, pa.string()))


def _with_checks(folder: Folder, config: Config, table: pa.Table, counts: Counts, talk: Talk) -> pa.Table:
    """Have what verify wants to know asked, and join the answers to the annotations: `checks` and `alignment`."""
    rows = table.to_pylist()
    checks = [checks_of(row, config.verify) for row in rows]
    found = _ask_checks(folder, config, rows, checks, counts, talk) if any(checks) else [[] for _ in rows]
    table = table.append_column("checks", pa.array(found, pa.list_(CHECK)))
    return table.append_column("alignment", pa.array(_alignments(folder, config, rows, talk), pa.float64()))


def _ask_checks(
    folder: Folder, config: Config, rows: list[dict[str, Any]], checks: list[list[Check]], counts: Counts, talk: Talk
) -> list[list[dict[str, str | None]]]:
    """Return the checks of each row with their answers; what the journal does not hold yet is asked."""
    wanted = Counter(check.kind for mine in checks for check in mine)
    told = ", ".join(f"{number:,} {kind}" for kind, number in sorted(wanted.items()))
    talk.say(f"verify asks at most {wanted.total():,} questions: {told}")
    revision = read_json(_require_file(folder.made_by("generate")))["revision"]
    of_sample: dict[str, list[Check]] = defaultdict(list)
    for row, mine in zip(rows, checks, strict=True):
        of_sample[row["sample_id"]] += mine
    with Journal(folder.journal) as journal, _cost_noted(folder, journal, counts), ExitStack() as stack:

        @cache
        def engine() -> Engine:
            choice = choose_engine(config, folder.server_log, talk)
            if choice.revision != revision:
                raise ConfigError("another model answers now than the one that wrote", hint="run without --from-stage")
            return stack.enter_context(choice.make())

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


def _with_likeness(folder: Folder, config: Config, table: pa.Table) -> pa.Table:
    """Join what is known of each sample beside the others: tables.LIKENESS."""
    samples = pq.read_table(folder.stage("source"), columns=["sample_id", "split", "looks", "width_px", "height_px"])
    known = compare_samples(samples, _kind_of_images(config))
    at = pc.index_in(table["sample_id"], known["sample_id"])
    for name in known.column_names[1:]:
        table = table.append_column(name, known[name].take(at))
    return table


def _with_marks(folder: Folder, table: pa.Table, talk: Talk) -> pa.Table:
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


def _kind_of_images(config: Config) -> Kind | None:
    """Return how images are compared; None where they are known to be distinct, or are not to be compared."""
    kind = config.dedupe.images
    if kind == "auto":
        return None if config.source in DRAWN else "graphics" if "deck_qa" in config.tasks else "photos"
    return None if kind == "none" else kind


def images_of_source(name: str) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Yield (sample_id, images) of a source, all of it, for whoever joins them with a version that has none."""
    for row in open_source(resolve(source=name)).rows:
        if isinstance(row, Sample):
            yield row.id, row.images


def public_name(model: str) -> str:
    """Return what may be told of a model: its name without a path, and without the revision that a server puts behind it."""
    name = model.rpartition("@")[0] or model
    return Path(name).name if name.startswith(("/", "~", ".")) or Path(name).exists() else name


def _generate(folder: Folder, config: Config, choice: Choice, samples: int, counts: Counts, talk: Talk) -> None:
    """Have every image asked about, then write what the replies say."""
    each = len(asked_of_each(config))
    with Journal(folder.journal) as journal, _cost_noted(folder, journal, counts), ExitStack() as stack:

        @cache
        def engine() -> Engine:
            ready = stack.enter_context(choice.make())
            talk("generate", counts.done // each, samples)
            return ready

        for ready in ask_about(_chunks(folder), config, choice.revision, engine, journal, counts):
            again = {"not usable": f"{sum(counts.flaws.values()):,}"} if counts.flaws else {}
            talk("generate", counts.done // each, samples, ready.figures() | again)
        talk("generate", samples, samples)
        read = read_annotations(_about_samples(folder), config, choice.revision, journal)
        write_table(folder.stage("generate"), read, ANNOTATION)


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


def _write_banned(folder: Folder, config: Config, talk: Talk) -> list[dict[str, Any]]:
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


def _write_source(folder: Folder, source: Source, config: Config, talk: Talk) -> None:
    """Read the source once into kept and rejected rows; of several copies of an image one is kept, of a banned one none."""
    rejected: list[dict[str, str]] = []
    copies = Copies()
    banned = Banned.of(pq.read_table(folder.stage("source", "banned")), _kind_of_images(config))
    limit = config.limit

    def tables() -> Iterator[pa.Table]:
        batch: list[dict[str, Any]] = []
        for row in source.rows:
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
        write_table(folder.stage("source"), map(copies.apply, _batches(folder)), SAMPLE)
    rejected.sort(key=lambda row: row["source_row"])
    write_table(folder.stage("source", "rejected"), [pa.Table.from_pylist(rejected, schema=SOURCE_REJECTED)], SOURCE_REJECTED)


def _apply(folder: Folder, name: str, marked: pa.Table, table: pa.Table) -> None:
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


def _write_version(
    folder: Folder,
    config: Config,
    annotations: pa.Table,
    samples: int,
    funnel: list[Step],
) -> tuple[Version, bool]:
    source, model = (read_json(_require_file(folder.made_by(stage))) for stage in ("source", "generate"))
    rows, measure = Rows(), Measure()
    shown: list[dict[str, Any]] = []
    with draft_version(folder) as draft:
        decks, never, compared_as = bool(source.pop("decks", False)), source.pop("never"), source.pop("compared_as")
        for table in build_rows(annotations, _batches(folder), source["name"], rows, decks=decks):
            draft.add(table)
            texts = table.drop_columns(list(PIXELS)).to_pylist()
            measure.add(texts)
            shown += texts[: CARD_SAMPLES - len(shown)]
        lost = dict(Counter(row["reason"] for row in rows.rejected))
        step = _step("version", "images", len(rows.digests), lost)
        if step.input != samples:
            raise TableError(f"stage version was given {samples} images and returned {step}", hint="please report this bug")
        funnel.append(step)
        left_out = {"version": pa.Table.from_pylist(rows.rejected, schema=LEFT_OUT)}
        asked = (*config.tasks, *([ANSWER] if set(config.verify.checks) - {"alignment"} else []))
        made_by = {
            "source": source,
            "model": model,
            "prompts": prompt_texts(asked, config),
            "schemas": {task: wire_schema(task) for task in asked},
            "config": _public(config, source["name"], model["name"]),
            "funnel": [asdict(each) for each in funnel],
            "measured": measure.result(),
            "leakage": _leakage(folder, compared_as, never, annotations),
            "review": count_marks(
                *(pq.read_table(folder.stage("review", which), columns=["mark"]) for which in ("kept", "rejected"))
            ),
        }
        version, is_new = draft.publish(rows, made_by, build_ledger(_rejected(folder) | left_out), shown)
    write_table(folder.stage("version", "rejected"), [left_out["version"]], LEFT_OUT)
    return version, is_new


def _leakage(folder: Folder, compared_as: str | None, never: list[dict[str, Any]], annotations: pa.Table) -> dict[str, Any]:
    """Return what was done so that nothing held out is learned from, here or elsewhere."""
    lost = [_require_stage(folder, stage)[1] for stage in ("source", "dedupe")]
    images = annotations.group_by("image_group").aggregate([("sample_id", "count_distinct")])["sample_id_count_distinct"]
    return {
        "compared_as": compared_as,
        "groups_of_images": sum(count > 1 for count in images.to_pylist()),
        "near_held_out_annotations": lost[1].get("near_held_out_image", 0),
        "never": never,
        "banned_images": lost[0].get("banned_image", 0),
        "repeated_texts": annotations.num_rows - annotations["repeats"].null_count,
    }


def _public(config: Config, source: str, model: str) -> dict[str, Any]:
    """Return the settings that may be published: a path of the user's is nobody's business."""
    settings = config.model_dump(mode="json", exclude={"base_url", "server"}) | {"source": source, "model": model}
    settings["never"] = [name for name in config.never if not name.startswith(("folder:", "parquet:"))]
    if config.split_list:
        settings["split_list"] = file_digest(config.split_list)
    if config.generate.prompts:
        settings["generate"]["prompts"] = config.generate.prompts.name
    if config.balance.entries:
        settings["balance"]["entries"] = file_digest(config.balance.entries)
    settings["verify"]["clip"] = public_name(config.verify.clip)
    return settings


def _rejected(folder: Folder) -> dict[str, pa.Table]:
    """Return what each stage before the last rejected."""
    return {name: pq.read_table(_require_file(folder.stage(name, "rejected"))) for name in ("source", *STAGES)}


def _chunks(folder: Folder) -> Iterator[Chunk]:
    for batch in _batches(folder, ["sample_id", "images"]):
        yield list(zip(batch["sample_id"].to_pylist(), map(tuple, batch["images"].to_pylist()), strict=True))


def _about_samples(folder: Folder) -> Iterator[Described]:
    for batch in _batches(folder, ["sample_id", "images", "split"]):
        pages = pc.list_value_length(batch["images"]).to_pylist()
        yield list(zip(batch["sample_id"].to_pylist(), pages, batch["split"].to_pylist(), strict=True))


def _batches(folder: Folder, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the samples as they were written: one row group a batch."""
    file = pq.ParquetFile(folder.stage("source"))
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=columns).combine_chunks().to_batches()


def _step(name: str, unit: str, kept: int, lost: dict[str, int]) -> Step:
    return Step(name, unit, kept + sum(lost.values()), kept, lost)


def _require_stage(folder: Folder, name: str) -> tuple[int, dict[str, int]]:
    """Return what a stage left on the disk: the number of kept rows, and of rejected ones by reason."""
    kept = pq.read_metadata(_require_file(folder.stage(name))).num_rows
    reasons = pq.read_table(_require_file(folder.stage(name, "rejected")), columns=["reason"])["reason"].to_pylist()
    return kept, dict(Counter(reasons).most_common())


def _require_file(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"{path} is missing", hint="run once without --from-stage")
    return path


def _settings_of(folder: Folder) -> Config:
    """Return the settings of the last run in a dataset folder."""
    if not folder.run_file.exists():
        raise ConfigError(f"{folder.path} is no folder that synth generate has written", hint="name one: --data DIR")
    try:
        return Config.model_validate_json(folder.run_file.read_bytes())
    except ValidationError:
        raise ConfigError(f"{folder.run_file} is of another synth", hint="run `synth generate` in this folder once") from None


def _refuse_other_settings(folder: Folder, config: Config, start: int) -> None:
    """Refuse another source in the same folder, and, with --from-stage, settings that an earlier stage has not used."""
    if not folder.run_file.exists():
        return
    try:
        before = json.loads(folder.run_file.read_text(encoding="utf-8"))
        source = before["source"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder.run_file} is not ours", hint="choose another folder: --out DIR") from None
    if source != config.source:
        raise ConfigError(
            f"{folder.path} holds data from {source}, not {config.source}", hint="choose another folder: --out DIR"
        )
    free = {"base_url", "engine", "server", *ORDER[start:]}  # the settings of a stage that runs now may have changed
    now = config.model_dump(mode="json")
    changed = [name for name in now if start and name not in free and now[name] != before.get(name)]
    if changed:
        raise ConfigError(
            f"{changed[0]} has changed since the stages before {ORDER[start]} ran", hint="run without --from-stage"
        )
