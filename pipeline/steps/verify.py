"""Step: verify. Check annotations with further questions to the model, and reject those that fail.

The first checks ask the model about the image. Captions with false claims are repaired and checked again.
Then the model answers the questions about the image from the caption alone, and CLIP compares the caption
with the image. Last, a judge rates all texts. A check that is off or has no readable reply rejects nothing.

The claims check is also tested on human captions (dataset/calibration.py). Some limits depend on all rows,
such as the minimum evidence against a false claim. They are applied in DuckDB.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa

from pipeline.config.sections import FilterConfig, VerifyConfig
from pipeline.dataset.calibration import CLAIMS, FINDINGS, NEVER, choose_references, read_findings
from pipeline.dataset.directory import DatasetDir, read_samples, sample_batches
from pipeline.dataset.records import described, read_record
from pipeline.digests import weights_revision
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.images.decode import prepare_image
from pipeline.inference import verification
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_SAMPLES, Chunk, ask_all
from pipeline.inference.requests import RequestPlan
from pipeline.plan import Plan
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep, Services, record_cost, whole_groups
from pipeline.steps.verify_results import (
    ALIGNMENT,
    CHECKED,
    COLUMNS,
    CheckConditions,
    CheckedAnnotation,
    Row,
    add_results,
    facts_in,
)
from pipeline.storage.database import load
from pipeline.storage.files import read_batches
from pipeline.tables import BOOL, FILTERED, HUMAN, STRING, VERIFIED, append_columns, fields, is_caption
from pipeline.tasks.base import Task
from pipeline.tasks.checks import ANSWER, CHECKING, MAX_EVIDENCE, RATE, REFUTED, REPAIR
from pipeline.tasks.checks import CLAIMS as CLAIMS_TASK
from pipeline.text.normalize import map_distinct, text_key, words_of
from pipeline.text.vqa_answers import normalize_answer
from pipeline.types import Request

if TYPE_CHECKING:
    from pipeline.images.clip import ClipScorer

# CLIP models use about 100,000 pixels, so larger images need not be kept in memory.
CLIP_PIXELS = 1_000_000
# Number of requests without images that are built at once.
CHUNK_REQUESTS = 256
# Number of annotations in memory at once. Each takes some kilobytes with its checks.
BATCH_ANNOTATIONS = 50_000
# Each claim of a human caption costs up to four requests.
MAX_REFERENCE_CLAIMS = 3
_ARTICLES = {"an": "a"}
T = TypeVar("T")
Subjects = Sequence[CheckedAnnotation]
KEYS = fields(STRING, "style", "question", "answer")
COMPARED = pa.schema([ROW, *fields(BOOL, "is_caption"), *KEYS, *VERIFIED, *ALIGNMENT])
# "yes" and "no" are right by chance half of the time, so `blind` ignores them.
QUERY = """
WITH answers_to_question AS (
    SELECT question, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY question) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY question, answer
), answerable_blind AS (  -- most images with this question have this answer
    SELECT question, answer FROM answers_to_question
    WHERE answer NOT IN ('yes', 'no') AND times >= {min_blind_frac}::DOUBLE * asked
), ranked AS (
    SELECT style, alignment, row_number() OVER (PARTITION BY style ORDER BY alignment) AS place,
           count(*) OVER (PARTITION BY style) AS count
    FROM judged WHERE alignment IS NOT NULL
), floors AS (  -- the minimum alignment of a caption, by style
    SELECT style, greatest({min_alignment}, alignment) AS floor
    FROM ranked WHERE place = 1 + trunc(count * {lowest_alignment_frac}::DOUBLE)
)
SELECT row, CASE
    WHEN NOT is_caption AND agreement < 1 THEN 'answer_not_confirmed'
    WHEN evidence >= {min_evidence} THEN 'false_claim'
    WHEN coverage < {min_coverage} THEN 'low_coverage'
    WHEN least(relevance, grounding, correctness, form) < {min_rating} THEN 'low_rating'
    WHEN answered_blind AND (question, answer) IN (SELECT (question, answer) FROM answerable_blind)
        THEN 'answerable_without_image'
    WHEN NOT sufficient THEN 'evidence_not_sufficient'
    WHEN alignment < floor THEN 'low_alignment'
END AS reason
FROM judged LEFT JOIN floors USING (style) WHERE reason IS NOT NULL
"""

TOO_MANY_ERRORS = (
    "verify: the model refutes too many true claims, so no caption was rejected for a claim; "
    "ask a stronger model, or raise verify.max_true_captions_lost"
)


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """The settings of the verify step.

    `bounds` apply to repaired captions. With `splits_claims`, the model splits captions into claims.
    `clip_model` is None if captions are not compared with images. `samples` is a digest of the list of all
    samples.
    """

    verify: VerifyConfig
    bounds: FilterConfig
    requests: RequestPlan
    splits_claims: bool
    clip_model: str | None
    seed: int
    samples: str

    @classmethod
    def of(cls, plan: Plan) -> "VerifySettings":
        """Resolve the settings of a run."""
        config = plan.config
        return cls(
            verify=config.verify,
            bounds=config.filter,
            requests=plan.requests,
            splits_claims=config.splits_claims,
            clip_model=plan.clip_model if plan.needs_clip else None,
            seed=config.seed,
            samples=read_record(plan.dataset, "read").get("files", {}).get("kept", {}).get("sha256", ""),
        )

    def describe(self) -> list[Any]:
        """Return everything that the results of the checks depend on, except the rows and the images."""
        if not self.verify.is_asked:
            return []
        clip = Path(self.clip_model or "")
        weights = weights_revision(clip) if self.clip_model and clip.is_dir() else self.clip_model
        asked = [self.splits_claims, weights, self.requests.describe(*CHECKING)]
        chosen = [self.seed, self.samples] if self.is_calibrated else []
        return [described(self.verify), described(self.bounds), *asked, *chosen]

    @property
    def is_calibrated(self) -> bool:
        """Whether the claims check is also tested on human captions."""
        return self.verify.calibration > 0 and "claims" in self.verify.checks


@dataclass(slots=True)
class AskedClaim:
    """A claim about a sample, with the questions about it and the answers (tables.CHECK)."""

    sample_id: str
    questions: list[verification.Check]
    answers: list[Row] = field(default_factory=list)

    @property
    def evidence(self) -> int:
        """See verification.evidence_against."""
        return verification.evidence_against(self.answers)


@dataclass
class AnnotationChecker:
    """Runs all checks on the annotations of a shard."""

    shard: DatasetDir
    settings: VerifySettings
    services: Services
    _claims: dict[str, list[str]] = field(default_factory=dict)  # by caption
    _counted: set[tuple[str, str]] = field(default_factory=set)  # see Journal.counted

    @property
    def plan(self) -> RequestPlan:
        """The plan of the requests."""
        return self.settings.requests

    @cached_property
    def _conditions(self) -> CheckConditions:
        return CheckConditions(self.shard, self.settings.verify.when, self.plan.tasks)

    @cached_property
    def _scorer(self) -> "ClipScorer":
        from pipeline.images.clip import ClipScorer

        assert self.settings.clip_model
        return ClipScorer(self.settings.clip_model)

    def ask_all_checks(self, rows: Sequence[Row]) -> list[CheckedAnnotation]:
        """Return annotations with their checks and scores, in the order of `rows`.

        `rows` must hold every annotation of each sample. Records of custom tasks are not checked.
        """
        self._claims.clear()
        self._counted.clear()
        self._conditions.read_results(rows)
        config, annotations = self.settings.verify, [CheckedAnnotation(row) for row in rows]
        subjects = [subject for subject in annotations if subject.row["clean_record"] is None]
        captions = [subject for subject in subjects if subject.caption is not None]
        questions = [subject for subject in subjects if subject.caption is None]
        enabled = [check for check in verification.QUESTION_CHECKS if check in config.checks]
        of_question = ([check for check in enabled if self._is_asked(check, one)] for one in questions)
        asked_rows = (question.row for question in questions)
        self._answer(questions, list(map(verification.question_checks, asked_rows, of_question)))
        if "claims" in config.checks:
            asked = [caption for caption in captions if self._is_asked("claims", caption)]
            self._check_claims(asked)
            self._calibrate_claims(captions, asked)
        if config.repair:
            refuted = (one for one in captions if one.row["prompt_id"] != HUMAN and one.refuted_claims)
            self._repair([caption for caption in refuted if self._is_asked("repair", caption)])
        if "covers" in config.checks:
            self._check_coverage([one for one in captions if self._is_asked("covers", one)], questions)
        if self.settings.clip_model:
            self._align([caption for caption in captions if self._is_asked("alignment", caption)])
        if config.judge:
            asked = [subject for subject in subjects if self._is_asked("judge", subject)]
            self._rate([subject for subject in asked if not self._is_contradicted(subject)])
        return annotations

    def _is_asked(self, check: str, subject: CheckedAnnotation) -> bool:
        """Return whether the condition of a check is true. If not, note the reason in the annotation."""
        unmet = self._conditions.find_unmet(check, subject)
        subject.skipped += [f"{check}.{unmet}"] if unmet else []
        return unmet is None

    def _is_contradicted(self, subject: CheckedAnnotation) -> bool:
        if subject.caption is None:
            return verification.share_confirmed(subject.checks, "round_trip") == 0
        return max(verification.claims_in(subject.checks).values(), default=0) >= MAX_EVIDENCE

    # --- claims

    def _check_claims(self, captions: Subjects) -> None:
        """Ask about each claim of the captions, and set `claim_evidence`."""
        claims = self._split([(caption.row["clean_text"], caption.sample_id) for caption in captions])
        if self.settings.splits_claims:
            unread = sum(not claims[caption.row["clean_text"]] for caption in captions)
            self._warn_of_unread(unread, len(captions), "captions", "unchecked")
        asked = [
            [AskedClaim(caption.sample_id, questions) for questions in claims[caption.row["clean_text"]]]
            for caption in captions
        ]
        self._ask_claims([claim for of_caption in asked for claim in of_caption])
        for caption, of_caption in zip(captions, asked, strict=True):
            caption.checks += [answer for claim in of_caption for answer in claim.answers]
            caption.scores["claim_evidence"] = list(verification.claims_in(caption.checks).values())

    def _split(self, captions: Sequence[tuple[str, str]]) -> dict[str, list[list[verification.Check]]]:
        """Return the questions about each claim in each caption. `captions` are texts with sample ids."""
        if not self.settings.splits_claims:
            return {text: verification.rule_checks(text) for text, _ in captions}
        new = {text: sample_id for text, sample_id in captions if text not in self._claims}
        build = partial(verification.build_claims, plan=self.plan)
        requests = (build(text, sample_id) for text, sample_id in new.items())

        def read(journal: Journal) -> dict[str, list[str]]:
            return {one[0]: verification.read_claims(*one, self.plan, journal) for one in captions}

        self._claims |= self._ask("claims", CLAIMS_TASK, _chunks(requests), len(new), read)
        return {text: list(map(verification.claim_checks, self._claims[text])) for text, _ in captions}

    def _ask_claims(self, claims: Sequence[AskedClaim]) -> None:
        """Ask two questions about each claim, and the remaining questions if it is not confirmed."""
        for part in (slice(2), slice(2, None)):
            unclear = [claim for claim in claims if claim.evidence > -REFUTED and claim.questions[part]]
            answers = self._ask_checks([(claim.sample_id, claim.questions[part]) for claim in unclear])
            for claim, more in zip(unclear, answers, strict=True):
                claim.answers += more

    @cached_property
    def _references(self) -> dict[str, str]:
        batches = read_samples(self.services.dataset, ["sample_id", "references"])
        return choose_references(batches, self.settings.verify.calibration, self.settings.seed)

    def _calibrate_claims(self, captions: Subjects, checked: Subjects) -> None:
        """Ask about claims of human captions, and set `reference_evidence` of the first caption of the image.

        Human captions that are themselves the texts to check are not used.
        """
        if not self.settings.is_calibrated:
            return
        written = {one.sample_id for one in captions if one.row["prompt_id"] != HUMAN}
        first = {one.sample_id: one for one in reversed(captions)}
        samples = [one for one in _by_sample(checked) if one in self._references and one in written]
        claims = self._split([(self._references[sample_id], sample_id) for sample_id in samples])
        asked = [
            (first[sample_id], AskedClaim(sample_id, questions))
            for sample_id in samples
            for questions in claims[self._references[sample_id]][:MAX_REFERENCE_CLAIMS]
        ]
        self._ask_claims([claim for _, claim in asked])
        for caption, claim in asked:
            if any(answer["answer"] is not None for answer in claim.answers):
                caption.scores.setdefault("reference_evidence", []).append(claim.evidence)

    # --- questions

    def _check_coverage(self, captions: Subjects, questions: Subjects) -> None:
        """Ask each question about a caption's sample once. The model sees the caption, but not the image."""
        pairs: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        for one in questions:
            if not self._is_contradicted(one):
                pairs[one.sample_id][one.row["clean_question"], one.row["clean_answer"]] = None
        asked = (pairs.get(caption.sample_id, ()) for caption in captions)
        texts = (caption.caption for caption in captions)
        self._answer(captions, list(map(verification.coverage_checks, texts, asked)))

    def _answer(self, subjects: Subjects, checks: Sequence[list[verification.Check]]) -> None:
        """Ask the model the questions in `checks` about each annotation. Add the answers to its checks."""
        asked = zip((subject.sample_id for subject in subjects), checks, strict=True)
        for subject, answers in zip(subjects, self._ask_checks(list(asked)), strict=True):
            subject.checks += answers

    def _ask_checks(self, asked: Sequence[tuple[str, Sequence[verification.Check]]]) -> list[list[Row]]:
        """Ask the model questions about samples, and return the answered checks (tables.CHECK)."""
        counts = Counter(check.kind for _, checks in asked for check in checks)
        if not counts:
            return [[] for _ in asked]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
        self.services.progress.message(f"verify asks at most {counts.total():,} questions: {kinds}")
        by_sample: dict[str, list[verification.Check]] = defaultdict(list)
        for sample_id, checks in asked:
            by_sample[sample_id] += checks

        def read(journal: Journal) -> list[list[Row]]:
            return [verification.read_checks(*checks, self.plan, journal) for checks in asked]

        requests = verification.build_all(sample_batches(self.shard), by_sample, self.plan)
        return self._ask("verify", ANSWER, requests, counts.total(), read)

    def _repair(self, subjects: Subjects) -> None:
        """Let the model rewrite captions with false claims, and check that only false claims were removed."""
        requests = [
            verification.build_repair(one.row["clean_text"], one.refuted_claims, one.sample_id, self.plan)
            for one in subjects
        ]
        distinct = {request.id: request for request in requests}

        def read(journal: Journal) -> list[str]:
            return [verification.read_repair(request, journal) or "" for request in requests]

        texts = self._ask("repair", REPAIR, _chunks(iter(distinct.values())), len(distinct), read)
        drafts = []
        for subject, request, clean in zip(subjects, requests, self._filter(subjects, texts), strict=True):
            if clean and clean["clean_text"] != subject.caption and _keeps_other_claims(subject, clean):
                rewritten = clean | {"prompt_id": request.prompt_id, "model": request.model}
                drafts.append((subject, CheckedAnnotation(subject.row | clean, rewritten=rewritten)))
        self._check_claims([draft for _, draft in drafts])
        repaired = [(subject, draft) for subject, draft in drafts if not draft.refuted_claims]
        for subject, draft in repaired:
            subject.row, subject.checks, subject.rewritten = draft.row, draft.checks, draft.rewritten
        count = f"{len(repaired):,} of {len(subjects):,}"
        self.services.progress.message(f"verify repaired {count} captions that had false claims")

    def _filter(self, subjects: Subjects, texts: Sequence[str]) -> list[Row | None]:
        """Return the columns of the filter step for each new caption, or None if that step rejects it."""
        drafts = [one.row | {"text": text} for one, text in zip(subjects, texts, strict=True)]
        columns = pa.schema(fields(STRING, "task", "style", "text", "question", "answer", "record"))
        table = pa.Table.from_pylist(drafts, schema=columns)  # columns that a draft lacks are null
        grams = own_prompt_grams((*(task.name for task in self.plan.tasks.asked), REPAIR.name))
        words = self.plan.generate.caption_words
        rows = filter_annotations(table, self.settings.bounds, grams, self.plan.tasks, words).to_pylist()
        return [None if row["reason"] else {name: row[name] for name in FILTERED.names} for row in rows]

    def _align(self, captions: Subjects) -> None:
        """Set `alignment` of each caption to its CLIP cosine similarity with the first page of its sample."""
        by_sample = _by_sample(captions)
        done = 0
        for batch in sample_batches(self.shard):
            if by_sample.keys().isdisjoint(batch.ids):
                continue
            images = {
                sample_id: prepare_image(pages[0], max_pixels=CLIP_PIXELS)
                for sample_id, pages in zip(batch.ids, batch.read_images(), strict=True)
                if sample_id in by_sample
            }
            shown = [caption for sample_id in images for caption in by_sample[sample_id]]
            texts = [caption.row["clean_text"] for caption in shown]
            cosines = self._scorer.cosines([images[caption.sample_id] for caption in shown], texts)
            for caption, cosine in zip(shown, cosines, strict=True):
                caption.scores["alignment"] = cosine
            done += len(images)
            self.services.progress("align", done, len(by_sample))

    def _rate(self, subjects: Subjects) -> None:
        """Let the judge rate annotations by the criteria in tables.RUBRIC."""
        ratings = self._ask_judge([subject.row for subject in subjects])
        for subject, rating in zip(subjects, ratings, strict=True):
            subject.scores |= rating
        unread = sum(subject.scores["form"] is None for subject in subjects)
        self._warn_of_unread(unread, len(subjects), "texts", "unrated")

    def _ask_judge(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        plan = self.plan
        by_sample: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_sample[row["sample_id"]].append(row)

        def requests() -> Iterator[Chunk]:
            for batch in sample_batches(self.shard):
                of_batch = (row for sample_id in batch.ids for row in by_sample.get(sample_id, ()))
                built = (verification.build_rating(row, plan) for row in of_batch)
                yield list({request.id: request for request in built}.values()), batch

        def read(journal: Journal) -> list[dict[str, Any]]:
            return [verification.read_rating(row, plan, journal) for row in rows]

        return self._ask("judge", RATE, requests(), len(rows), read)

    def _warn_of_unread(self, count: int, total: int, unit: str, state: str) -> None:
        if count:
            problem = f"no usable reply for {count:,} of {total:,} {unit}, which are kept {state}"
            self.services.progress.warn(f"verify: {problem}")

    def _ask(
        self, name: str, task: Task, requests: Iterator[Chunk], total: int, read: Callable[[Journal], T]
    ) -> T:
        """Send the requests that have no reply in the journal yet, and return the result of `read`."""
        stats, progress = self.services.stats, self.services.progress
        start = partial(self.services.engine, self.plan.model_of(task.name))
        with Journal(self.shard.journal) as journal, record_cost(self.shard, journal, stats):
            before, journal.counted = stats.done, self._counted
            for ready in ask_all(requests, self.plan, self.services.servers, start, journal, stats):
                progress(name, stats.done - before, total, ready.metrics())
            if done := stats.done - before:
                # Report the end, since lines are printed at intervals and may omit the last update.
                progress(name, done, done)
            result = read(journal)
            stats.spent += journal.spent
            return result


def _by_sample(subjects: Subjects) -> dict[str, list[CheckedAnnotation]]:
    by_sample: dict[str, list[CheckedAnnotation]] = defaultdict(list)
    for subject in subjects:
        by_sample[subject.sample_id].append(subject)
    return by_sample


def _keeps_other_claims(subject: CheckedAnnotation, clean: Row) -> bool:
    """Return whether a repair only removes words (or swaps a and an), and keeps the unrefuted claims."""
    rest = (_ARTICLES.get(word, word) for word in words_of(subject.row["clean_text"]))
    if not all(_ARTICLES.get(word, word) in rest for word in words_of(clean["clean_text"])):
        return False
    before, after = facts_in(subject.row["clean_text"]), facts_in(clean["clean_text"])
    refuted = subject.refuted_claims
    others = [claim for claim in verification.claims_in(subject.checks) if claim not in refuted]
    kept = {word for claim in others for word in facts_in(claim)} & before
    return bool(after) and kept <= after


def _chunks(requests: Iterator[Request]) -> Iterator[Chunk]:
    """Yield chunks of requests that need no images."""
    for chunk in iter(lambda: list(islice(requests, CHUNK_REQUESTS)), []):
        yield chunk, NO_SAMPLES


def ask_checks(
    shard: DatasetDir, path: Path, settings: VerifySettings, services: Services
) -> Iterator[pa.Table]:
    """Yield the annotations of a shard with the results of their checks (CHECKED) as further columns."""
    checker = AnnotationChecker(shard, settings, services)
    for table in whole_groups(read_batches(path), "sample_id", BATCH_ANNOTATIONS):
        yield add_results(table, checker.ask_all_checks(table.select(COLUMNS).to_pylist()))


def find_unconfirmed(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return `row` and `reason` of the annotations that fail a check."""
    config: VerifyConfig = comparison.settings.verify
    if not config.is_asked:
        return None
    load(comparison.db, "judged", _judged(comparison.rows), COMPARED)
    limits = {name: -1.0 if value is None else value for name, value in config.model_dump().items()}
    limits["min_evidence"] = REFUTED
    tables = comparison.rows.batches(*FINDINGS) if "claims" in config.checks else ()
    if claims := read_findings(tables).get(CLAIMS):
        limits["min_evidence"] = claims.choose_level(config.max_true_captions_lost)
        if limits["min_evidence"] == NEVER:
            comparison.progress.warn(TOO_MANY_ERRORS)
    return comparison.db.sql(QUERY.format(**limits))


def judge_verified(table: pa.Table, settings: VerifySettings) -> pa.Table:
    """If no check was asked, append the columns in CHECKED without values. `compare` adds `reason`."""
    if settings.verify.is_asked:
        return table
    return append_columns(table, pa.Table.from_pylist([{"checks": []}] * table.num_rows, schema=CHECKED))


def _judged(rows: AllRows) -> Iterator[pa.Table]:
    columns = ["clean_text", "style", "clean_question", "clean_answer", *VERIFIED.names, "alignment"]
    for table in rows.batches(*columns):
        known = {name: table[name] for name in table.column_names} | {
            "is_caption": is_caption(table),
            "question": map_distinct(table["clean_question"], text_key),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
        }
        yield pa.table({name: known[name] for name in COMPARED.names})


STEP = RowStep(
    "verify",
    settings=VerifySettings.of,
    prepare=ask_checks,
    is_prepared=lambda plan: plan.config.verify.is_asked,
    judge=judge_verified,
    compare=find_unconfirmed,
    adds=pa.schema({"reason": STRING}),
    advice={
        "answer_not_confirmed": "ask a stronger model, or leave `round_trip` out of --verify",
        "false_claim": "lower verify.max_true_captions_lost, use --repair, or leave `claims` out of --verify",
        "low_coverage": "lower verify.min_coverage, or leave `covers` out of --verify",
        "answerable_without_image": "raise verify.min_blind_frac, or leave `blind` out of --verify",
        "evidence_not_sufficient": "leave `evidence` out of --verify",
        "low_rating": "lower verify.min_rating, or leave out --judge",
        "low_alignment": "lower verify.min_alignment, or choose another CLIP: verify.clip_model",
    },
)
