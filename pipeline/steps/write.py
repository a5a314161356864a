"""Step: write. Write the rows of all shards as one immutable version."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial, reduce
from itertools import chain, product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.audit import Frame, estimate_errors
from pipeline.dataset.builder import DIGESTS, NO_ANNOTATION, build_rows
from pipeline.dataset.calibration import CLAIMS, FINDINGS, JUDGE, read_findings
from pipeline.dataset.directory import OUTPUTS, DatasetDir, read_samples
from pipeline.dataset.manifest import StepSummary, describe_decontamination, describe_provenance, row_extras
from pipeline.dataset.price import describe_price
from pipeline.dataset.publishing import RowWriter, publish_version
from pipeline.dataset.records import (
    DONE,
    PREPARED,
    is_done,
    output_digest,
    read_record,
    step_key,
    write_record,
)
from pipeline.dataset.reviews import Verdict, annotation_digest, format_lines, read_stored
from pipeline.dataset.statistics import DatasetStatistics, merge
from pipeline.dataset.version import Version
from pipeline.digests import digest
from pipeline.errors import TableError
from pipeline.plan import Plan
from pipeline.steps.base import BUG_HINT, AllRows, Step, Work, summarize_step
from pipeline.steps.ladder import describe_ladder
from pipeline.storage.files import read_batches, scratch_folder, write_table
from pipeline.tables import NO_EXTRAS, REJECTIONS, SKIPPED_CHECKS, STRING, Extras, fields
from pipeline.tasks.checks import CONFIRM, RATE
from pipeline.tasks.conditions import is_dropped

NAME = "write"
REJECTED = pa.schema(fields(STRING, "sample_id", "reason"))
IMAGE = ["image_group", "sample_id"]


def write_rows(
    shard: DatasetDir, path: Path, steps: Sequence[str], source: dict[str, Any], extras: Extras = NO_EXTRAS
) -> RowWriter:
    """Write the rows of a shard to an empty folder. Write row digests and rejections to step files.

    `steps` are the names of all earlier steps that reject rows. `source` is the provenance of the images.
    """
    writer, has_decks = RowWriter(path, extras), bool(source.get("decks"))
    annotations, samples = read_batches(shard.step_file("review")), read_samples(shard)
    for table in build_rows(annotations, samples, source["name"], extras, decks=has_decks):
        writer.add(table)
    writer.close()
    dropped: dict[str, str] = {}  # reasons of images that `keep_if` drops, by sample id
    for table in read_batches(shard.step_file("validate", "rejected"), ["sample_id", "reason"]):
        pairs = zip(*table.to_pydict().values(), strict=True)
        dropped |= {sample_id: reason for sample_id, reason in pairs if is_dropped(reason)}
    reasons = [dropped.get(sample_id, NO_ANNOTATION) for sample_id in writer.rejected]
    rejected = pa.table([writer.rejected, reasons], schema=REJECTED)
    write_table(shard.step_file(NAME, "rejected"), [rejected], REJECTED)
    files = {step: shard.step_file(step, "rejected") for step in steps}
    tables = ((step, table) for step, file in files.items() for table in read_batches(file))
    rejections = [list_rejections(*one) for one in (*tables, (NAME, rejected))]
    write_table(shard.step_file(NAME, "rejections"), rejections, REJECTIONS)
    write_table(shard.step_file(NAME, "digests"), writer.digests, DIGESTS)
    writer.digests.clear()
    return writer


def list_rejections(step: str, table: pa.Table) -> pa.Table:
    """Return the rejections (tables.REJECTIONS) for the rows that a step rejected.

    The text of a row is left out, since it may be the reason for the rejection.
    """
    rows = table.to_pylist()
    for row in rows:
        row["step"] = step
        row["content_digest"] = annotation_digest(row) if "task" in row else None
    return pa.Table.from_pylist(rows, schema=REJECTIONS)


class WriteStep(Step):
    """Writes all kept rows as a new version, unless the newest version already holds exactly these rows."""

    def run(self, work: Work, before: str) -> None:
        """See Step."""
        plan, executor, dataset = work.plan, work.executor, work.plan.dataset
        executor.wait()
        first_shard = executor.shards[0]
        source = read_record(dataset, "read")["source"]
        models = read_models(plan, first_shard)
        provenance = describe_provenance(plan.config, plan.tasks, source, models[plan.writers[0]])
        provenance |= {"models": models} if len(models) > 1 else {}
        names = [summary.step for summary in work.summaries if summary.step != "ask"]
        inputs = [output_digest(*output) for output in product(executor.shards, names, OUTPUTS)]
        if verdicts := read_stored(dataset.reviews, Verdict):
            inputs.append(digest(format_lines(verdicts)))
        key = step_key(NAME, [provenance, source], (), [*inputs, output_digest(first_shard, before)])
        newest = dataset.versions()[-1:]
        folders = list(dict.fromkeys([*executor.shards, dataset]))
        is_written = all(is_done(folder, NAME, key) for folder in folders)
        if newest and is_written and read_record(dataset, NAME)["version"] == newest[0].name:
            work.version, work.is_new = newest[0], False
            return
        executor.check()
        with scratch_folder(dataset.path / "versions") as draft:
            extras = row_extras(plan.config, plan.tasks, plan.writers)
            write = partial(write_rows, steps=names, source=source, extras=extras)
            written = executor.map_with_scratch(write, draft)
            work.version, work.is_new = publish_shards(work, written, draft, source, provenance)
        for folder in folders:
            # The version holds the contents of these files.
            for name in ("digests", "rejections"):
                folder.step_file(NAME, name).unlink(missing_ok=True)
            write_record(folder, NAME, key, version=work.version.name)

    def summarize(self, work: Work) -> StepSummary:
        """See Step."""
        assert work.version
        return _summarize(work.version.num_rows, work.executor.shards)


def publish_shards(
    work: Work, written: Sequence[RowWriter], draft: Path, source: dict[str, Any], provenance: dict[str, Any]
) -> tuple[Version, bool]:
    """Publish the rows of all shards as one version. Return it, and whether it is new.

    If the newest version has the same rows, it is returned. The files in `written` are in the scratch folder
    `draft`. `provenance` describes the run in the manifest. Raises the errors of `publish_version`.
    """
    plan, shards = work.plan, work.executor.shards
    num_rows = sum(sum(part.counts.values()) for part in written)
    funnel = [*work.summaries, _summarize(num_rows, shards)]
    if funnel[-1].input != funnel[0].kept:
        problem = f"the step `write` received {funnel[0].kept} images, but counted {funnel[-1].input}"
        raise TableError(problem, hint=BUG_HINT)
    all_rows = AllRows([shard.step_file("review") for shard in shards])
    images = (part.group_by(IMAGE).aggregate([]) for part in all_rows.batches(*IMAGE))
    groups = pa.concat_tables(images).group_by("image_group").aggregate([("sample_id", "count_distinct")])
    group_count = pc.sum(pc.greater(groups["sample_id_count_distinct"], 1)).as_py() or 0
    parts = (part for shard in shards for part in read_batches(shard.step_file(NAME, "digests")))
    digests = pa.concat_tables(parts).sort_by("sample_id")
    statistics = reduce(merge, (part.statistics for part in written), DatasetStatistics())
    provenance = provenance | {
        "funnel": [asdict(summary) for summary in funnel],
        "measured": (measured := statistics.result(plan.config.filter.language)),
        **price_texts(plan, shards, measured),
        "leakage": describe_decontamination(source, funnel, group_count),
        "review": count_reviews(shards),
        **audit_texts(plan.dataset, shards),
        **describe_checks(plan, shards),
        **({"ladder": describe_ladder(plan, shards)} if plan.requests.num_rungs > 1 else {}),
    }
    rejections = (table for shard in shards for table in read_batches(shard.step_file(NAME, "rejections")))
    return publish_version(plan.dataset, draft, written, digests, provenance, rejections, work.executor.check)


def _summarize(rows: int, shards: Sequence[DatasetDir]) -> StepSummary:
    parts = (part for shard in shards for part in read_batches(shard.step_file(NAME, "rejected"), ["reason"]))
    counts = Counter(reason for part in parts for reason in part["reason"].to_pylist())
    return summarize_step(NAME, "images", rows, dict(sorted(counts.items())))


def count_reviews(shards: Sequence[DatasetDir]) -> dict[str, int]:
    """Return the number of reviewed annotations by verdict, or {} without reviews."""
    files = (shard.step_file("review", name) for shard in shards for name in OUTPUTS)
    parts = (part["review"].drop_null() for file in files for part in read_batches(file, ["review"]))
    counts = Counter(review["verdict"] for part in parts for review in part.to_pylist())
    return {verdict: counts[verdict] for verdict in ("good", "bad", "edited")} if counts else {}


def audit_texts(dataset: DatasetDir, shards: Sequence[DatasetDir]) -> dict[str, Any]:
    """Return the manifest field with the error rates of the texts, or {} without verdicts of an audit."""
    verdicts = read_stored(dataset.reviews, Verdict)
    return {"audit": estimate_errors(Frame.of(shards, verdicts[-1].seed), verdicts)} if verdicts else {}


def price_texts(plan: Plan, shards: Sequence[DatasetDir], measured: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest field with the price of the texts, or {} if no model was asked.

    If a task has several models, the price does not include checks.
    """
    has_checks = plan.config.verify.is_asked and plan.requests.num_rungs == 1
    records = [("ask", DONE), *[("verify", PREPARED)] * has_checks]
    spent = Counter[str]()
    for shard in shards:
        for step, which in records:
            spent.update(read_record(shard, step, which).get("spent", {}))
    price = describe_price(spent, measured, plan.tasks, plan.config.servers)
    return {"price": price} if price else {}


def read_models(plan: Plan, shard: DatasetDir) -> dict[str, dict[str, str]]:
    """Return the models that the last runs of the steps ask and verify have used, by name."""
    models = read_record(shard, "ask")["models"]
    if plan.config.verify.is_asked:
        checked = read_record(shard, "verify", PREPARED)["models"]
        models = checked | {name: models[name] for name in plan.task_models}
    return {name: models[name] for name in plan.model_names}


def describe_checks(plan: Plan, shards: Sequence[DatasetDir]) -> dict[str, Any]:
    """Return the manifest fields with the errors of the checks, and the numbers of skipped texts."""
    verify = plan.config.verify
    if not verify.is_asked:
        return {}
    files = [shard.step_file("verify", "prepared") for shard in shards]
    findings = read_findings(table for file in files for table in read_batches(file, FINDINGS))
    models = read_models(plan, shards[0])
    written_by = {models[name]["revision"] for name in plan.writers}
    tasks = {CLAIMS: CONFIRM.name, JUDGE: RATE.name}
    skipped: dict[str, Counter[str]] = defaultdict(Counter)
    for table in (table for file in files for table in read_batches(file, [SKIPPED_CHECKS.name])):
        for entry in chain.from_iterable(table[SKIPPED_CHECKS.name].drop_null().to_pylist()):
            check, _, reason = entry.partition(".")
            skipped[check][reason] += 1
    checks = [
        {
            "check": check,
            "judges_itself": found.by_model > 0
            and models[plan.requests.model_of(tasks[check])]["revision"] in written_by,
            **found.describe(found.choose_level(verify.max_true_captions_lost)),
        }
        for check, found in findings.items()
    ]
    described = {
        "checks": checks,
        "skipped_checks": {check: dict(sorted(counts.items())) for check, counts in sorted(skipped.items())},
    }
    return {name: value for name, value in described.items() if value}


STEP = WriteStep(NAME, unit="images")
