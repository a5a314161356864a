"""Stage: verify. Ask the model again whether an annotation is true of its image, and reject annotations by the answers.

A check that is switched off, or whose reply could not be read, rejects nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.dataset.directory import DatasetDir, sample_batches
from pipeline.images.decode import prepare_image
from pipeline.inference.journal import Journal
from pipeline.inference.queue import ask_all
from pipeline.inference.verification import Check, build_all, build_claims, checks_of, read_checks, read_claims
from pipeline.progress import Progress
from pipeline.scenes.claims import Claim
from pipeline.sources import find_source
from pipeline.stages.base import ROW, AllRows, Comparison, RunPlan, Services, Stage, record_cost
from pipeline.storage.database import load
from pipeline.storage.files import read_batches
from pipeline.tables import BOOL, CHECK, FLOAT64, STRING, VERIFIED, fields
from pipeline.tasks import asks_about_decks
from pipeline.text.language import YES_OR_NO
from pipeline.text.normalize import map_distinct, text_key
from pipeline.text.vqa_answers import normalize_answer

CHUNK_REQUESTS = 256  # of texts, without images
ALIGNMENT = pa.field("alignment", FLOAT64)
CHECKED = pa.schema([pa.field("checks", pa.list_(CHECK)), ALIGNMENT, *VERIFIED])
ANNOTATION_COLUMNS = ("sample_id", "task", "clean_text", "clean_question", "clean_answer", "evidence_pages", "pages")
JUDGED = pa.schema(
    [ROW, pa.field("is_caption", BOOL), *fields(STRING, "style", "question", "answer", "answer_type"), *VERIFIED, ALIGNMENT]
)
# Yes and no are right by luck half of the time: they are exempt from `blind`, and balanced later.
QUERY = """
WITH answers_to_question AS (
    SELECT question, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY question) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY question, answer
), answerable_blind AS (  -- most images that are asked the same have this answer
    SELECT question, answer FROM answers_to_question
    WHERE answer NOT IN ('yes', 'no') AND times >= {min_blind_frac}::DOUBLE * asked
), answers_of_type AS (
    SELECT answer_type, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY answer_type) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY answer_type, answer
), frequent_answers AS (  -- other questions of that type often have this answer, so that it may be right without the pages
    SELECT answer_type, answer FROM answers_of_type
    WHERE answer IN ('yes', 'no') OR times - 1 > {max_answer_frequency}::DOUBLE * (asked - 1)
), ranked AS (
    SELECT style, alignment, row_number() OVER (PARTITION BY style ORDER BY alignment) AS place,
           count(*) OVER (PARTITION BY style) AS count
    FROM judged WHERE alignment IS NOT NULL
), floors AS (  -- the least alignment that a caption of each style must have
    SELECT style, greatest({min_alignment}, alignment) AS floor
    FROM ranked WHERE place = 1 + trunc(count * {lowest_alignment_frac}::DOUBLE)
)
SELECT row, CASE
    WHEN NOT is_caption AND agreement < 1 THEN 'answer_not_confirmed'
    WHEN is_caption AND agreement < {min_claims_supported} THEN 'claims_not_confirmed'
    WHEN answered_blind AND (question, answer) IN (SELECT (question, answer) FROM answerable_blind)
        THEN 'answerable_without_image'
    WHEN NOT sufficient THEN 'evidence_not_sufficient'
    WHEN NOT necessary AND (answer_type, answer) NOT IN (SELECT (answer_type, answer) FROM frequent_answers)
        THEN 'evidence_not_necessary'
    WHEN alignment < floor THEN 'low_alignment'
END AS reason
FROM judged LEFT JOIN floors USING (style) WHERE reason IS NOT NULL
"""


def ask_checks(shard: DatasetDir, path: Path, plan: RunPlan, services: Services) -> Iterator[pa.Table]:
    """Ask the checks of the settings about the annotations of a shard; yield these with the answers (CHECKED)."""
    config = plan.config
    rows = [row for table in read_batches(path, ANNOTATION_COLUMNS) for row in table.to_pylist()]
    claims = _ask_claims(shard, plan, services, rows) if config.splits_claims else [None] * len(rows)
    checks = [checks_of(row, config.verify, of_row) for row, of_row in zip(rows, claims, strict=True)]
    answers = _ask(shard, plan, services, rows, checks) if any(checks) else [[] for _ in rows]
    alignments = _alignments(shard, config, rows, services.progress)
    first = 0
    for table in read_batches(path):
        end = first + table.num_rows
        table = table.append_column(CHECKED.field("checks"), pa.array(answers[first:end], CHECKED.field("checks").type))
        table = table.append_column(ALIGNMENT, pa.array(alignments[first:end], FLOAT64))
        yield judge_checks(table)
        first = end


def judge_checks(table: pa.Table) -> pa.Table:
    """Append the results of `checks` (tables.VERIFIED)."""
    rows = table.select(["clean_question", "checks"]).to_pylist()
    columns = pa.Table.from_pylist([_judge(row) for row in rows], schema=VERIFIED)
    for field in VERIFIED:
        table = table.append_column(field, columns[field.name])
    return table


def find_unconfirmed(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return the rows that fail their checks, with the `reason`; some limits depend on all rows."""
    config = comparison.plan.config.verify
    if not config.checks:
        return None
    load(comparison.db, "judged", _judged(comparison.rows), JUDGED)
    min_alignment = -1.0 if config.min_alignment is None else config.min_alignment
    return comparison.db.sql(QUERY.format(**config.model_dump() | {"min_alignment": min_alignment}))


def judge_verified(table: pa.Table, plan: RunPlan) -> pa.Table:
    """Append the columns of CHECKED if nothing was asked; `reason` comes from the comparison."""
    if not plan.config.verify.checks:
        for field in CHECKED:
            values: list[Any] = [[] if field.name == "checks" else None]
            table = table.append_column(field, pa.array(values * table.num_rows, field.type))
    return table


def _judged(rows: AllRows) -> Iterator[pa.Table]:
    columns = ("style", "clean_question", "clean_answer", "answer_type", *JUDGED.names[6:])
    for table in rows.batches(*columns):
        computed = {
            "is_caption": pc.is_null(table["clean_question"]),
            "question": map_distinct(table["clean_question"], text_key),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
            "answer_type": pc.fill_null(table["answer_type"], ""),
        }
        yield pa.table({name: computed.get(name, table[name] if name in table.column_names else None) for name in JUDGED.names})


def _judge(row: dict[str, Any]) -> dict[str, Any]:
    same = _whether(row["checks"], "necessary")
    return {
        "agreement": _share(row["checks"], "claims" if row["clean_question"] is None else "round_trip"),
        "answered_blind": _whether(row["checks"], "blind"),
        "sufficient": _whether(row["checks"], "sufficient"),
        "necessary": None if same is None else not same,
    }


def _share(checks: Sequence[dict[str, str]], kind: str) -> float | None:
    """Return the share of checks with the expected answer; None if no reply could be read.

    A question that expects no is one check with the question about the same claim before it.
    """
    groups: list[list[dict[str, str]]] = []
    for check in checks:
        if check["kind"] == kind:
            if kind == "claims" and check["expected"] == "no" and groups:
                groups[-1].append(check)
            else:
                groups.append([check])
    answered = [[check for check in group if check["answer"] is not None] for group in groups]
    results = [all(_plain(check["answer"]) == _plain(check["expected"]) for check in group) for group in answered if group]
    return sum(results) / len(results) if results else None


def _plain(answer: str) -> str:
    """Return a normalized answer; yes and no of any language in English."""
    normal = normalize_answer(answer)
    return YES_OR_NO.get(normal, normal)


def _whether(checks: Sequence[dict[str, str]], kind: str) -> bool | None:
    share = _share(checks, kind)
    return None if share is None else share == 1


def _ask_claims(shard: DatasetDir, plan: RunPlan, services: Services, rows: list[dict[str, Any]]) -> list[list[Claim] | None]:
    """Return the claims of each caption, as the model splits it; None for a question."""
    config, stats, progress = plan.config, services.stats, services.progress
    captions = {row["clean_text"]: row["sample_id"] for row in rows if row["clean_text"] is not None}
    texts = iter(captions.items())
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):
        before = stats.done
        build = partial(build_claims, config=config, revision=plan.revision)
        chunks = iter(lambda: [build(text, sample_id) for text, sample_id in islice(texts, CHUNK_REQUESTS)], [])
        for ready in ask_all(chunks, config, services.engine, journal, stats):
            progress("claims", stats.done - before, len(captions), ready.metrics())
        of_caption = {text: read_claims(text, config, plan.revision, journal) for text in captions}
    return [None if row["clean_text"] is None else of_caption[row["clean_text"]] for row in rows]


def _ask(
    shard: DatasetDir, plan: RunPlan, services: Services, rows: list[dict[str, Any]], checks: list[list[Check]]
) -> list[list[dict[str, str | None]]]:
    """Return the checks of each row with their answers; only those that the journal lacks are asked."""
    config, stats, progress = plan.config, services.stats, services.progress
    wanted = Counter(check.kind for of_row in checks for check in of_row)
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(wanted.items()))
    progress.message(f"verify asks at most {wanted.total():,} questions: {kinds}")
    of_sample: dict[str, list[Check]] = defaultdict(list)
    for row, of_row in zip(rows, checks, strict=True):
        of_sample[row["sample_id"]] += of_row
    with Journal(shard.journal) as journal, record_cost(shard, journal, stats):
        before = stats.done
        requests = build_all(sample_batches(shard), of_sample, config, plan.revision)
        for ready in ask_all(requests, config, services.engine, journal, stats):
            progress("verify", stats.done - before, wanted.total(), ready.metrics())
        return [
            read_checks(row["sample_id"], of_row, config, plan.revision, journal)
            for row, of_row in zip(rows, checks, strict=True)
        ]


def _alignments(shard: DatasetDir, config: Config, rows: list[dict[str, Any]], progress: Progress) -> list[float | None]:
    """Return the CLIP score of each caption and its image; None if it is not asked for."""
    if "alignment" not in config.verify.checks or asks_about_decks(config.tasks):
        return [None] * len(rows)
    from pipeline.images.clip import TINY_CLIP, ClipScorer

    name = config.verify.clip_model
    scorer = ClipScorer((TINY_CLIP if find_source(config.source).is_drawn else "clip") if name == "auto" else name)
    captions_of: dict[str, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        if row["clean_text"] is not None:
            captions_of[row["sample_id"]].append(n)
    alignments: list[float | None] = [None] * len(rows)
    done = 0
    for batch in sample_batches(shard):
        images = [(sample_id, prepare_image(pages[0])) for sample_id, pages in batch if sample_id in captions_of]
        captions = [(n, image) for sample_id, image in images for n in captions_of[sample_id]]
        cosines = scorer.cosines([image for _, image in captions], [rows[n]["clean_text"] for n, _ in captions])
        for (n, _), cosine in zip(captions, cosines, strict=True):
            alignments[n] = cosine
        done += len(images)
        progress("align", done, len(captions_of))
    return alignments


STAGE = Stage(
    "verify",
    judge_verified,
    prepare=ask_checks,
    is_prepared=lambda config: bool(config.verify.checks),
    compare=find_unconfirmed,
    adds=pa.schema({"reason": STRING}),
    advice={
        "answer_not_confirmed": "ask a stronger model, or leave round_trip out of --verify",
        "claims_not_confirmed": "lower verify.min_claims_supported, or leave claims out of --verify",
        "answerable_without_image": "raise verify.min_blind_frac, or leave blind out of --verify",
        "evidence_not_sufficient": "leave evidence out of --verify",
        "evidence_not_necessary": "leave evidence out of --verify",
        "low_alignment": "lower verify.min_alignment, or name a CLIP that knows such images: verify.clip_model",
    },
)
