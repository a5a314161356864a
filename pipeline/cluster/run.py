"""The ordered run on a cluster: the same stages over shards, and the same version in the end.

Every step writes files that appear whole or not at all, and depends on files alone: whatever dies, the same command goes on.
Replies are in the journals of the shards, and are never asked for again.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from pipeline.balance import read_entries
from pipeline.cluster import curate
from pipeline.cluster.fill import Filler, read_part, tries_file
from pipeline.cluster.job import Job, Told
from pipeline.cluster.version import write_version
from pipeline.cluster.workers import Plan, cluster, every, plan_workers
from pipeline.config import Config
from pipeline.errors import ConfigError, TableError
from pipeline.fingerprint import digest, file_digest
from pipeline.generate.ask import Counts
from pipeline.generate.engine import choose_engine
from pipeline.generate.requests import check_prompts, prompt_texts
from pipeline.marks import read_marks
from pipeline.run import Result, asked_tasks, refuse_other_settings
from pipeline.source import is_divisible, open_source
from pipeline.stages import ORDER, Step, kind_of_images, public_name, step_of, write_banned
from pipeline.store import Folder, dataset_folder, disk_errors, read_json, write_json
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
        (never,) = every(1, partial(_leave_banned, job))
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
        every(job.parts, partial(read_part, job), talk=lambda done: talk("source", done, job.parts))
    for folder in job.folders:
        tries_file(folder).unlink(missing_ok=True)
    told = every(job.shards, Filler(job), plan, lambda done: talk("generate", done, job.shards, {"unit": "shards"}))
    counts = Counts(asked=sum(one["asked"] for one in told), total=sum(one["total"] for one in told))
    for one in told:
        if not one.get("again"):
            counts.attempts.update({int(attempt): count for attempt, count in one["attempts"].items()})
            counts.flaws.update(one["flaws"])
    if again := sum(bool(one.get("again")) for one in told):
        talk.say(f"{again} of {job.shards} shards were filled before")
    cost: Counter[str] = Counter()
    for one in told:
        cost.update(one["cost"])
    if cost:
        write_json(job.folder.cost, cost)
    found = [told]
    steps = curate.steps(job)
    for done, (step, by_all) in enumerate(steps, start=1):
        found.append(every(job.shards if by_all else 1, partial(step, job)))
        talk("curate", done, len(steps), {"last": step.__name__})
    _say_marks(job, found[-1], talk)
    groups = sum(one["groups"] for told in found for one in told if "groups" in one)
    funnel = _funnel(found)
    version, is_new = write_version(job, about, model, funnel, groups)
    shutil.rmtree(job.home / "exchange")
    return Result(version, is_new, counts, funnel)


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
