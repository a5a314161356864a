"""Ladders: ask the next model for the texts that the previous model failed to write.

A ladder is an ordered list of models for a task. `climb` repeats the steps from ask to verify for each model.
After each repetition, `escalate` lists the texts to request from the next model: each sample, task and style
for which no text is left. The ask step then also requests these texts, and rejects the texts that they
replace. Replies come from the journal, so no request is sent twice.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.sections import cost_of
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import UNREADABLE
from pipeline.dataset.records import output_digest, read_record, step_key
from pipeline.digests import digest
from pipeline.inference.queue import RequestStats
from pipeline.inference.requests import Pair
from pipeline.plan import Plan
from pipeline.steps.base import RowStep, Step, Work
from pipeline.storage.database import load, open_database, read
from pipeline.storage.files import read_batches, read_table, write_table
from pipeline.tables import FLOAT64, INT32, STRING, fields
from pipeline.types import UNANSWERED, UNITS

KEYS = fields(STRING, "sample_id", "task", "style")
ESCALATED = pa.schema([*KEYS, *fields(INT32, "rung")])
ASKED = pa.schema([*ESCALATED, *fields(STRING, "model", "reply_error")])
KEPT = pa.schema([*ESCALATED, *fields(FLOAT64, "logprob_mean")])
# Requests that a server did not answer are sent again by the next run, not sent to another model.
QUERY = """
SELECT sample_id, task, style, rung + 1 AS rung FROM asked
WHERE rung = {last} AND task IN {tasks} AND model IS NOT NULL
    AND coalesce(reply_error, '') NOT IN {unanswered}
EXCEPT
SELECT sample_id, task, style, rung + 1 FROM kept WHERE coalesce(logprob_mean, 0) >= {min_logprob}
ORDER BY ALL
"""
# The keys are sample ids.
Escalated = dict[str, frozenset[Pair]]


def climb(work: Work, steps: Sequence[Step], stats: RequestStats, run: Callable[[], None]) -> None:
    """Find the texts that each model of a ladder fails to write.

    `run` runs `steps`, from ask to verify. The search is skipped if an earlier run has finished it.
    """
    plan, path = work.plan, _file_of(work.plan.dataset)
    row_steps = [step for step in steps if isinstance(step, RowStep)]
    settings = [plan.requests, plan.config.keeps_human_texts, *(step.settings(plan) for step in row_steps)]
    files = [file for step in row_steps for file in step.reads(plan)]
    key = step_key("ladder", settings, files, [output_digest(plan.dataset, "read")]).encode()
    metadata: dict[bytes, bytes] = {}
    with suppress(*UNREADABLE):  # a missing or damaged file has no key
        metadata = read_table(path).schema.metadata or {}
    if metadata.get(b"key") != key:
        path.unlink(missing_ok=True)
        for rung in range(1, plan.requests.num_rungs):
            work.executor.begin_pass(digest(_read(plan.dataset).to_pydict()))
            run()
            stats.begin_pass()
            if not escalate(work, rung):
                break
        # With unanswered requests, the next run repeats the search.
        if not stats.unanswered:
            write_table(path, [_read(plan.dataset)], ESCALATED.with_metadata({b"key": key}))
    work.executor.begin_pass(digest(_read(plan.dataset).to_pydict()))


def _file_of(dataset: DatasetDir) -> Path:
    """Return the path of the list of texts to request from further models (ESCALATED)."""
    return dataset.path / "ladder.parquet"


def escalate(work: Work, rung: int) -> bool:
    """List the texts to request from the model with index `rung`. Return False if there are none."""
    plan, shards = work.plan, work.executor.shards
    work.executor.wait()
    tasks = [task.name for task in plan.tasks.asked if len(plan.requests.models_of(task.name)) > rung]
    min_logprob = plan.config.generate.min_logprob
    query = QUERY.format(
        last=rung - 1,
        tasks=(*tasks, ""),
        unanswered=UNANSWERED,
        min_logprob=f"{-1e300 if min_logprob is None else min_logprob}::DOUBLE",
    )
    with open_database(plan.dataset.path) as db:
        for name, step, schema in (("asked", "ask", ASKED), ("kept", "verify", KEPT)):
            files = (shard.step_file(step) for shard in shards)
            load(db, name, (part for file in files for part in read_batches(file, schema.names)), schema)
        added = [table.cast(ESCALATED) for table in read(db.sql(query))]
    if count := sum(table.num_rows for table in added):
        write_table(_file_of(plan.dataset), [_read(plan.dataset), *added], ESCALATED)
        texts = f"{count:,} texts that were rejected or are uncertain"
        work.progress.message(f"asking the next model for {texts}")
    return bool(count)


def _read(dataset: DatasetDir) -> pa.Table:
    path = _file_of(dataset)
    return read_table(path).cast(ESCALATED) if path.exists() else ESCALATED.empty_table()


def read_escalated(plan: Plan, shard: DatasetDir) -> list[Escalated]:
    """For each later model, return the pairs of task and style to request for the samples of a shard."""
    if plan.requests.num_rungs == 1:
        return []
    parts = read_batches(shard.step_file("read"), ["sample_id"])
    ids = {sample_id for part in parts for sample_id in part[0].to_pylist()}
    by_rung: dict[int, dict[str, set[Pair]]] = defaultdict(lambda: defaultdict(set))
    for row in _read(plan.dataset).to_pylist():
        if row["sample_id"] in ids:
            by_rung[row["rung"]][row["sample_id"]].add((row["task"], row["style"]))
    return [
        {sample_id: frozenset(pairs) for sample_id, pairs in by_rung[rung].items()}
        for rung in sorted(by_rung)
    ]


def describe_ladder(plan: Plan, shards: Sequence[DatasetDir]) -> list[dict[str, Any]]:
    """Return the requests, tokens, cost and texts of each model of a ladder, by task, for the manifest.

    `texts` counts all texts of a model, and `kept` those that passed all steps up to verify.
    """
    tasks = {task.name for task in plan.tasks.asked if len(plan.requests.models_of(task.name)) > 1}
    counts: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    spent = Counter[str]()
    for shard in shards:
        spent.update(read_record(shard, "ask")["spent"])
        for step, name in (("ask", "texts"), ("verify", "kept")):
            for part in read_batches(shard.step_file(step), ["task", "rung", "model"]):
                for task, rung, model in zip(*part.to_pydict().values(), strict=True):
                    counts[task, rung][name] += task in tasks and model is not None
    entries = []
    for (task, rung), of_model in sorted(counts.items()):
        if of_model["texts"]:
            model = plan.requests.models_of(task)[rung]
            units = {unit: spent[f"{task}.{model}.{unit}"] for unit in UNITS}
            cost = cost_of({model: (units["prompt_tokens"], units["reply_tokens"])}, plan.config.servers)
            texts = {name: of_model[name] for name in ("texts", "kept")}
            entries.append({"task": task, "model": model, **units, **texts})
            entries[-1] |= {} if cost is None else {"cost": cost}
    return entries
