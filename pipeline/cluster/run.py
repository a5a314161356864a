"""The ordered run on a cluster: the same stages over shards, and the same version in the end.

Every step writes files that appear whole or not at all, and depends on files alone: whatever dies, the same command goes on.
Replies are in the journals of the shards, and are never asked for again.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.balance import read_entries
from pipeline.cluster import curate
from pipeline.cluster.fill import Filler, read_part, told_of_filled
from pipeline.cluster.job import Job, Task, Told, do, named_files, scratch_of
from pipeline.cluster.version import write_version
from pipeline.cluster.workers import Plan, cluster, every, plan_workers
from pipeline.config import Config
from pipeline.errors import ConfigError, TableError
from pipeline.fingerprint import digest, file_digest
from pipeline.generate.ask import Counts
from pipeline.generate.engine import choose_engine
from pipeline.generate.journal import Journal
from pipeline.generate.requests import check_prompts
from pipeline.marks import read_marks
from pipeline.objects import is_object
from pipeline.run import Result, refuse_other_settings
from pipeline.source import is_divisible, open_source
from pipeline.stages import ORDER, Step, kind_of_images, public_name, step_of, write_banned
from pipeline.store import Folder, dataset_folder, disk_errors, read_json, remove, write_json
from pipeline.types import Silence, Talk

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
        out: the dataset folder, on a file system that all nodes share or in an object store; default `data/<source>`.
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
    choice = choose_engine(config, Folder(scratch_of(folder.path)).server_log, talk)
    source = open_source(config)
    with cluster(size.address), disk_errors(folder.path), folder.lock(say=talk.say) as check:
        plan = plan_workers(size.workers, loads_model=not config.base_url, own_server=choice.name == "vllm")
        write_json(folder.path / "shards" / "shards.json", {"shards": shards})
        write_json(folder.run_file, config.model_dump(mode="json"))
        _leave_local(folder)
        files = digest(named_files(config))
        parts = shards if is_divisible(config) else 1
        job = Job(config, folder.path, Path.cwd(), shards, parts, choice.name, source.revision, choice.revision, files, "")
        begin(job)
        (never,) = every(1, partial(do, job, _leave_banned))
        for what in never["said"]:
            talk.say(what)
        about = {"name": source.name, "revision": source.revision, "decks": source.decks, "never": never["never"]}
        about |= {"compared_as": kind_of_images(config)}
        model = {"name": public_name(choice.model), "revision": choice.revision}
        write_json(folder.made_by("source"), about)
        write_json(folder.made_by("generate"), model)
        job = replace(job, inputs=_inputs(job, about, model))
        counts, filled = _fill(job, plan, talk)
        job = replace(job, filled=filled)
        return _curate(job, curate.steps(job), counts, talk, check)


def review_on_cluster(config: Config, folder: Folder, talk: Talk, check: Callable[[], None]) -> Result:
    """Do what people said of texts that a cluster has made, on this machine, and return the version that follows.

    Nothing is read from the source, and no model is asked.

    Args:
        config: what was made.
        folder: the dataset folder, whose lock the caller holds.
        talk: told about the progress.
        check: raises where the lock is lost.
    """
    folder = Folder(folder.path.absolute())
    with cluster("local"):
        filled = tuple(read_json(folder.finished)["filled"])
        job = Job(
            config, folder.path, Path.cwd(), _shards(folder, None), 1, "", "", "", digest(named_files(config)), "review", filled
        )
        begin(job)
        return _curate(job, curate.review_steps(), Counts(), talk, check)


def _leave_local(folder: Folder) -> None:
    """Put away what a run on one machine has left: its stages are not of this run, and its journal is only read."""
    for name in ORDER:
        for which in ("kept", "rejected"):
            folder.stage(name, which).unlink(missing_ok=True)
    if folder.journal.exists() and not is_object(folder.path):
        with Journal(folder.journal):
            pass  # brings in what a killed run has left beside it


def begin(job: Job) -> None:
    """Forget what an earlier run in this folder has tried, and that it was finished."""
    remove(job.tries)
    job.folder.finished.unlink(missing_ok=True)


def _fill(job: Job, plan: Plan, talk: Talk) -> tuple[Counts, tuple[str, ...]]:
    """Have the source read, and every shard filled; return how much was asked, and in an object store where the shards are."""
    for old in (job.home / "exchange").glob("*"):
        if old != job.hops:
            remove(old)
    if not all(told_of_filled(job, number) for number in range(job.shards)):
        every(job.parts, partial(do, job, read_part), talk=lambda done: talk("source", done, job.parts))
    told = every(job.shards, Filler(job), plan, lambda done: talk("generate", done, job.shards, {"unit": "shards"}))
    counts, cost = Counts(), Counter[str]()
    for one in told:
        counts.asked += one["asked"]
        counts.total += one["total"]
        counts.done += one["total"]
        cost.update(one["cost"])
        if not one.get("again"):
            counts.attempts.update({int(attempt): count for attempt, count in one["attempts"].items()})
            counts.flaws.update(one["flaws"])
    if again := sum(bool(one.get("again")) for one in told):
        talk.say(f"{again} of {job.shards} shards were filled before")
    if cost:
        write_json(job.folder.cost, cost)
    if not is_object(job.home):
        return counts, ()
    filled = tuple(one["folder"] for one in told)
    for old in (job.home / "shards").glob("*/*"):
        if old.is_dir() and old.name != "journal" and f"{old.parent.name}/{old.name}" not in filled:
            remove(old)  # of an earlier run, or of a worker that was given up
    return counts, filled


def _curate(job: Job, steps: list[tuple[Task, bool]], counts: Counts, talk: Talk, check: Callable[[], None]) -> Result:
    """Do steps over the shards, and make the version that comes out."""
    check()
    told: list[Told] = []
    for done, (task, by_all) in enumerate(steps, start=1):
        told += every(job.shards if by_all else 1, partial(do, job, task))
        talk("curate", done, len(steps), {"last": task.__name__})
    _say_marks(job, sum(one.get("marks", 0) for one in told), talk)
    funnel = _funnel([one["sums"] for one in told if "sums" in one])
    version, is_new = write_version(job, funnel, sum(one.get("groups", 0) for one in told), check)
    write_json(job.folder.finished, {"version": version.name, "filled": job.filled})
    remove(job.home / "exchange")
    return Result(version, is_new, counts, funnel)


def _funnel(sums: list[dict[str, tuple[int, dict[str, int]]]]) -> list[Step]:
    """Return what each stage did to all shards; it was given what the one before it kept."""
    units = {"source": "images", "generate": "requests"}
    steps = []
    for name in ORDER[:-1]:
        kept = sum(each[name][0] for each in sums)
        lost = sum((Counter(each[name][1]) for each in sums), Counter[str]())
        steps.append(step_of(name, units.get(name, "annotations"), kept, dict(lost.most_common())))
    for before, step in pairwise(steps[2:]):
        if step.input != before.kept:
            raise TableError(f"stage {step.stage} was given {step.input} rows, of {before.kept}", hint="please report this bug")
    return steps


def _leave_banned(job: Job, _: int) -> Told:
    heard = Heard()
    return {"never": write_banned(job.folder, job.config, heard), "said": heard.said}


class Heard(Silence):
    """A Talk that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str, *, passing: bool = False) -> None:
        """See Talk."""
        if not passing:
            self.said.append(text)


def _inputs(job: Job, about: dict[str, Any], model: dict[str, Any]) -> str:
    """Return the digest of all that decides what shards are filled with."""
    config = job.config
    later = {"base_url", "engine", "model", "server", "dedupe", "balance", "split"}
    settings = config.model_dump(mode="json", exclude=later)
    files = named_files(config)
    del files["entries"]  # of balance
    banned = file_digest(job.folder.stage("source", "banned"))
    return digest([installed("synth"), settings, about, model, files, banned, job.shards])


def _shards(folder: Folder, wanted: int | None) -> int:
    """Return how many shards a folder has, or is to have. Raises ConfigError where it has another number."""
    file = folder.path / "shards" / "shards.json"
    known = int(read_json(file)["shards"]) if file.exists() else None
    if known is not None and wanted not in (None, known):
        raise ConfigError(f"{folder.path} has {known} shards, not {wanted}", hint="leave --shards out, or choose another --out")
    return known or wanted or SHARDS


def _say_marks(job: Job, used: int, talk: Talk) -> None:
    if job.folder.marks.exists():
        known = len(read_marks(job.folder.marks))
        lost = f"; {known - used} fit no text that is there now" if known > used else ""
        talk.say(f"review: {used} marks apply{lost}")
