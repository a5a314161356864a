"""The ordered run on a cluster: the same stages over shards, and the same version in the end.

Every step writes files that appear whole or not at all, and depends on files alone: whatever dies, the same command goes on.
Replies are in the journals of the shards, and are never asked for again.
"""

import base64
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.balance import read_entries
from pipeline.card import CARD_SAMPLES
from pipeline.cluster import curate
from pipeline.cluster.fill import Filler, read_part, tries_file
from pipeline.cluster.job import Job, Told
from pipeline.cluster.workers import Plan, cluster, each, plan_workers
from pipeline.config import Config
from pipeline.errors import ConfigError, TableError
from pipeline.fingerprint import digest, file_digest
from pipeline.generate.ask import Counts
from pipeline.generate.engine import choose_engine
from pipeline.generate.requests import check_prompts, prompt_texts
from pipeline.ledger import build_ledger
from pipeline.marks import read_marks
from pipeline.measure import Measure, added
from pipeline.review import count_marks
from pipeline.run import LEFT_OUT, Result, about_run, asked_tasks, refuse_other_settings
from pipeline.source import is_divisible, open_source
from pipeline.stages import (
    ORDER,
    Step,
    batches,
    kind_of_images,
    public_name,
    rejected,
    step_of,
    write_banned,
)
from pipeline.store import (
    LEDGER_FILE,
    Folder,
    Version,
    dataset_folder,
    disk_errors,
    read_json,
    scratch_folder,
    write_json,
    write_table,
)
from pipeline.tables import LEDGER, PIXELS, SPLITS
from pipeline.types import Silence, Talk
from pipeline.version import (
    Draft,
    Rows,
    about_file,
    about_rows,
    build_rows,
    newest,
    next_version,
    nothing_left,
    publish_version,
    version_digest,
)

SHARDS = 16  # where no number is given


@dataclass(frozen=True, slots=True)
class Size:
    """How a run is spread: over which cluster (None: one on this machine), how many shards, and how many that ask at once."""

    address: str | None = None
    shards: int | None = None
    workers: int | None = None


def generate_on_cluster(config: Config, out: Path | None = None, size: Size | None = None, talk: Talk | None = None) -> Result:
    """Run all stages on a Ray cluster and return the version that comes out: the same as on one machine.

    Args:
        config: what to make.
        out: the dataset folder, on a file system that all nodes share; default `data/<source>`.
        size: how the run is spread.
        talk: told about the progress.

    Raises:
        SynthError: whatever a user can mend; finished work stays on the disk.
    """
    talk, size = talk or Silence(), size or Size()
    folder = Folder((out or dataset_folder(config.source)).absolute())
    check_prompts(config)
    read_entries(config.balance.entries)
    with disk_errors(folder.path):
        refuse_other_settings(folder, config, 0)
        shards = _shards(folder, size.shards)
    choice = choose_engine(config, folder.server_log, talk)
    source = open_source(config)
    with cluster(size.address), disk_errors(folder.path), folder.lock():
        plan = plan_workers(size.workers, own_server=choice.name == "vllm" and not config.base_url)
        write_json(folder.path / "shards" / "shards.json", {"shards": shards})
        write_json(folder.run_file, config.model_dump(mode="json"))
        for name in ORDER:  # what a run on one machine has left is not of this one
            for which in ("kept", "rejected"):
                folder.stage(name, which).unlink(missing_ok=True)
        parts = shards if is_divisible(config) else 1
        job = Job(config, folder.path, Path.cwd(), shards, parts, choice.revision, "")
        ((_, never),) = each(1, partial(_leave_banned, job))
        about = {"name": source.name, "revision": source.revision, "decks": source.decks, "never": never["never"]}
        about |= {"compared_as": kind_of_images(config)}
        model = {"name": public_name(choice.model), "revision": choice.revision}
        write_json(folder.made_by("source"), about)
        write_json(folder.made_by("generate"), model)
        job = replace(job, inputs=_inputs(job, about, model))
        return _run(job, plan, about, model, talk)


def _run(job: Job, plan: Plan, about: dict[str, Any], model: dict[str, Any], talk: Talk) -> Result:
    for old in (job.home / "exchange").glob("*"):
        if old != job.hops:
            shutil.rmtree(old)
    if not all(_is_filled(job, number) for number in range(job.shards)):
        for done, _ in enumerate(each(job.parts, partial(read_part, job)), start=1):
            talk("source", done, job.parts)
    for folder in job.folders:
        tries_file(folder).unlink(missing_ok=True)
    told = _in_order(each(job.shards, Filler(job), plan), lambda done: talk("generate", done, job.shards, {"unit": "shards"}))
    counts = Counts(asked=sum(one["asked"] for one in told), total=sum(one["total"] for one in told))
    for one in told:
        if not one.get("again"):
            counts.attempts.update({int(attempt): count for attempt, count in one["attempts"].items()})
            counts.flaws.update(one["flaws"])
    if again := sum(bool(one.get("again")) for one in told):
        talk.say(f"{again} of {job.shards} shards were filled before")
    found = [told]
    steps = curate.steps(job)
    for done, (step, by_all) in enumerate(steps, start=1):
        found.append(_in_order(each(job.shards if by_all else 1, partial(step, job))))
        talk("curate", done, len(steps), {"last": step.__name__})
    _say_marks(job, found[-1], talk)
    groups = sum(one["groups"] for told in found for one in told if "groups" in one)
    funnel = _funnel(found)
    version, is_new = _write_version(job, about, model, funnel, groups)
    shutil.rmtree(job.home / "exchange")
    return Result(version, is_new, counts, funnel)


def _in_order(numbers: Iterator[tuple[int, Told]], talk: Callable[[int], None] = lambda done: None) -> list[Told]:
    """Return what all numbers told, in their order."""
    found: dict[int, Told] = {}
    talk(0)
    for number, one in numbers:
        found[number] = one
        talk(len(found))
    return [found[number] for number in sorted(found)]


def _funnel(found: list[list[Told]]) -> list[Step]:
    """Return the sums over all shards; each stage was given what the one before it kept."""
    kept: Counter[str] = Counter()
    lost: dict[str, Counter[str]] = {}
    for told in found:
        for one in told:
            for stage, count, reasons in one.get("steps", ()):
                kept[stage] += count
                lost.setdefault(stage, Counter()).update(reasons)
    units = {"source": "images", "generate": "requests"}
    steps = [step_of(name, units.get(name, "annotations"), kept[name], dict(lost[name].most_common())) for name in ORDER[:-1]]
    before = None
    for step in steps[2:]:
        if before is not None and step.input != before.kept:
            raise TableError(f"stage {step.stage} was given {step.input} rows, of {before.kept}", hint="please report this bug")
        before = step
    return steps


def _write_version(
    job: Job, about: dict[str, Any], model: dict[str, Any], funnel: list[Step], groups: int
) -> tuple[Version, bool]:
    with scratch_folder(job.home / "versions") as draft:
        told = _in_order(each(job.shards, partial(write_rows, job, about)))
        rows = {split: sum(one["rows"].get(split, 0) for one in told) for split in SPLITS}
        held = {tuple(one["columns"]) for one in told if one["columns"]}
        if not held:
            raise nothing_left()
        if len(held) > 1:
            raise TableError("some samples have columns that others have not", hint="a source fills a column always or never")
        columns = list(held.pop())
        ((_, named),) = each(1, partial(name_version, job, columns))
        lost = sum((Counter(one["lost"]) for one in told), Counter[str]())
        funnel.append(step_of("version", "images", sum(rows.values()), dict(lost)))
        if funnel[-1].input != funnel[0].kept:
            raise TableError(
                f"stage version was given {funnel[0].kept} images and returned {funnel[-1]}", hint="please report this bug"
            )
        parent = newest(job.folder)
        if parent is not None and parent.manifest["digest"] == named["digest"]:
            return parent, False
        measured = [pickle.loads(base64.b64decode(one["measured"])) for one in told]  # noqa: S301  # our own workers'
        total = Measure()
        for one in measured:
            total = added(total, one)
        reviewed = sum((Counter(one["review"]) for one in told), Counter[str]())
        lost_by = {step.stage: step.rejected for step in funnel}
        leakage = {
            "compared_as": about["compared_as"],
            "groups_of_images": groups,
            "near_held_out_annotations": lost_by["dedupe"].get("near_held_out_image", 0),
            "never": about["never"],
            "banned_images": lost_by["source"].get("banned_image", 0),
            "repeated_texts": sum(one["repeated"] for one in told),
        }
        source = {name: value for name, value in about.items() if name in ("name", "revision")}
        made_by = about_run(job.config, source, model, funnel, total.result(), leakage)
        made_by["review"] = {mark: reviewed[mark] for mark in ("good", "bad", "edited")} if reviewed else {}
        files = _gather_files(draft, told)
        licences = {licence for one in told for licence in one["licences"]}
        shown = [row for one in told for row in one["shown"]][:CARD_SAMPLES]
        manifest = named | about_rows(columns, licences, rows) | made_by | {"files": files}
        return publish_version(job.folder, draft, manifest, shown), True


def write_rows(job: Job, about: dict[str, Any], number: int) -> Told:
    """Write the rows of a shard to Parquet files in a folder of its own; tell what they are."""
    folder = job.shard(number)
    path = job.home / "versions" / ".next" / f"{number:05d}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    annotations = pq.read_table(folder.stage("review"))
    rows, measure, draft = Rows(), Measure(), Draft(job.folder, path)
    shown: list[dict[str, Any]] = []
    for table in build_rows(annotations, batches(folder), about["name"], rows, decks=about["decks"]):
        draft.add(table)
        texts = table.drop_columns(list(PIXELS)).to_pylist()
        measure.add(texts)
        shown += texts[: CARD_SAMPLES - len(shown)]
    draft.close()
    left_out = pa.Table.from_pylist(rows.rejected, schema=LEFT_OUT)
    write_table(folder.stage("version", "rejected"), [left_out], LEFT_OUT)
    write_table(folder.stage("version", "ledger"), [build_ledger(rejected(folder) | {"version": left_out})], LEDGER)
    digests = pa.table({"sample_id": rows.digests.keys(), "digest": rows.digests.values()}, schema=DIGESTS)
    digests = digests.sort_by("sample_id")
    write_table(folder.stage("version", "digests"), [digests], DIGESTS)
    marked = [pq.read_table(folder.stage("review", which), columns=["mark"]) for which in ("kept", "rejected")]
    return {
        "columns": draft.columns,
        "rows": draft.counts(),
        "files": {file.name: about_file(file) for file in sorted(path.iterdir())},
        "licences": sorted(rows.licences),
        "lost": dict(Counter(row["reason"] for row in rows.rejected)),
        "measured": base64.b64encode(pickle.dumps(measure)).decode(),
        "review": count_marks(*marked),
        "repeated": annotations.num_rows - annotations["repeats"].null_count,
        "shown": shown,
    }


DIGESTS = pa.schema([pa.field("sample_id", pa.string()), pa.field("digest", pa.string())])


def name_version(job: Job, columns: list[str], _: int) -> Told:
    """Gather the ledger, and return the digest of all rows and the name that follows from them."""
    parent = newest(job.folder)
    ledgers = (pq.read_table(folder.stage("version", "ledger")) for folder in job.folders)
    write_table(job.home / "versions" / ".next" / LEDGER_FILE, ledgers, LEDGER)
    tables = [pq.read_table(folder.stage("version", "digests"), columns=["sample_id"]) for folder in job.folders]
    ids = pa.concat_tables(tables)["sample_id"].combine_chunks()
    return {
        "version": next_version(parent, ids, columns),
        "digest": version_digest(_digests(job), columns),
        "parent": parent.name if parent else None,
    }


def _digests(job: Job) -> Iterator[tuple[str, str]]:
    """Yield (sample id, digest of its row), in the order of the ids: shards stand in theirs."""
    for folder in job.folders:
        table = pq.read_table(folder.stage("version", "digests"))
        yield from zip(table["sample_id"].to_pylist(), table["digest"].to_pylist(), strict=True)


def _gather_files(draft: Path, told: list[Told]) -> dict[str, Any]:
    """Move the files of all shards into the draft, numbered in their order; return what the manifest says of them."""
    files: dict[str, Any] = {}
    numbers: Counter[str] = Counter()
    for number, one in enumerate(told):
        for name, about in one["files"].items():
            split = name.rpartition("-")[0]
            final = f"{split}-{numbers[split]:05d}.parquet"
            numbers[split] += 1
            (draft / f"{number:05d}" / name).rename(draft / final)
            files[final] = about
        (draft / f"{number:05d}").rmdir()
    return dict(sorted(files.items()))


def _leave_banned(job: Job, _: int) -> Told:
    job.enter()
    return {"never": write_banned(job.folder, job.config, Silence())}


def _inputs(job: Job, about: dict[str, Any], model: dict[str, Any]) -> str:
    """Return the digest of all that decides what shards are filled with."""
    later = {"base_url", "engine", "model", "server", "dedupe", "balance", "split"}
    settings = job.config.model_dump(mode="json", exclude=later)
    banned = file_digest(job.folder.stage("source", "banned"))
    prompts = prompt_texts(asked_tasks(job.config), job.config)
    return digest([installed("synth"), settings, about, model, banned, prompts, job.shards])


def _is_filled(job: Job, number: int) -> bool:
    done = job.shard(number).path / "filled.json"
    return done.exists() and read_json(done)["inputs"] == job.inputs


def _shards(folder: Folder, wanted: int | None) -> int:
    """Return how many shards a folder has, or is to have. Raises ConfigError where it has another number."""
    file = folder.path / "shards" / "shards.json"
    known = int(read_json(file)["shards"]) if file.exists() else None
    if known is not None and wanted not in (None, known):
        raise ConfigError(f"{folder.path} has {known} shards, not {wanted}", hint="leave --shards out, or choose another --out")
    return known or wanted or SHARDS


def _say_marks(job: Job, told: list[Told], talk: Talk) -> None:
    if job.folder.marks.exists():
        known, used = len(read_marks(job.folder.marks)), sum(one["marks"] for one in told)
        lost = f"; {known - used} fit no text that is there now" if known > used else ""
        talk.say(f"review: {used} marks apply{lost}")
