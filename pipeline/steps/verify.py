"""Step: verify. Check annotations with further questions to the model, and reject those that fail.

The first checks ask the model about the image. Captions with false claims are repaired and checked again.
Then captions are compared with the questions about the image, the image itself (CLIP), and its human
captions. Last, a judge rates all texts. A check that is off or has no readable reply rejects nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.sections import FilterConfig, ServerConfig, VerifyConfig
from pipeline.dataset.directory import DatasetDir, read_samples, sample_batches
from pipeline.dataset.records import described
from pipeline.digests import weights_revision
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.images.decode import prepare_image
from pipeline.inference import verification
from pipeline.inference.engines import EngineChoice, open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_SAMPLES, Chunk, ask_all
from pipeline.inference.requests import RequestPlan
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.scenes.claims import Claim
from pipeline.steps.base import ROW, AllRows, Comparison, RowStep, Services, record_cost, whole_groups
from pipeline.storage.database import load
from pipeline.storage.files import read_batches
from pipeline.tables import (
    BOOL,
    CHECK,
    FILTERED,
    FLOAT64,
    HUMAN,
    STRING,
    VERIFIED,
    append_columns,
    fields,
    is_caption,
)
from pipeline.tasks.checks import CHECKING, REPAIR
from pipeline.text.content_keys import content_words
from pipeline.text.language import FUNCTION_WORDS
from pipeline.text.normalize import map_distinct, text_key
from pipeline.text.vqa_answers import normalize_answer
from pipeline.types import Engine, Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.images.clip import ClipScorer

# Maximum number of pixels that are decoded at once.
MAX_DECODED_PIXELS = 64_000_000
# Number of requests without images that are built at once.
CHUNK_REQUESTS = 256
CLEAN = ("clean_text", "clean_question", "clean_answer", "clean_record")
COLUMNS = ("sample_id", "task", "style", "prompt_id", *CLEAN, "evidence_pages", "pages")
# Number of annotations in memory at once. Each takes some kilobytes with its checks.
BATCH_ANNOTATIONS = 50_000
ALIGNMENT = fields(FLOAT64, "alignment")
CHECKED = pa.schema(
    [*fields(pa.list_(CHECK), "checks"), *ALIGNMENT, *VERIFIED, *fields(STRING, "unrepaired_text")]
)
KEYS = fields(STRING, "style", "question", "answer", "answer_type")
JUDGED = pa.schema([ROW, *fields(BOOL, "is_caption"), *KEYS, *VERIFIED, *ALIGNMENT])
# "yes" and "no" are right by chance half of the time, so `blind` ignores them. The balance step handles them.
QUERY = """
WITH answers_to_question AS (
    SELECT question, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY question) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY question, answer
), answerable_blind AS (  -- most images with this question have this answer
    SELECT question, answer FROM answers_to_question
    WHERE answer NOT IN ('yes', 'no') AND times >= {min_blind_frac}::DOUBLE * asked
), answers_of_type AS (
    SELECT answer_type, answer, count(*) AS times, sum(count(*)) OVER (PARTITION BY answer_type) AS asked
    FROM judged WHERE question IS NOT NULL GROUP BY answer_type, answer
), frequent_answers AS (  -- answers of many questions of that type, which may be right without the pages
    SELECT answer_type, answer FROM answers_of_type
    WHERE answer IN ('yes', 'no') OR times - 1 > {max_answer_frequency}::DOUBLE * (asked - 1)
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
    WHEN is_caption AND agreement < {min_claims_supported} THEN 'claims_not_confirmed'
    WHEN coverage < {min_coverage} THEN 'low_coverage'
    WHEN shared_words < {min_shared_words} THEN 'unlike_source_captions'
    WHEN least(relevance, grounding, correctness, form) < {min_rating} THEN 'low_rating'
    WHEN answered_blind AND (question, answer) IN (SELECT (question, answer) FROM answerable_blind)
        THEN 'answerable_without_image'
    WHEN NOT sufficient THEN 'evidence_not_sufficient'
    WHEN NOT necessary AND (answer_type, answer) NOT IN (SELECT (answer_type, answer) FROM frequent_answers)
        THEN 'evidence_not_necessary'
    WHEN alignment < floor THEN 'low_alignment'
END AS reason
FROM judged LEFT JOIN floors USING (style) WHERE reason IS NOT NULL
"""

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """The settings of the verify step. `server` does not affect the replies, so it is not part of the key.

    `bounds` apply to repaired captions. With `splits_claims`, the model splits captions into claims.
    `clip_model` is None if captions are not compared with images.
    """

    verify: VerifyConfig
    bounds: FilterConfig
    requests: RequestPlan
    splits_claims: bool
    clip_model: str | None
    server: ServerConfig
    judge_revision: str
    choose_judge: Callable[[Progress], EngineChoice]

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
            server=config.server,
            judge_revision=plan.judge_revision,
            choose_judge=plan.choose_judge,
        )

    def describe(self) -> list[Any]:
        """Return everything that the results of the checks depend on, except the rows and the images."""
        if not self.verify.is_asked:
            return []
        clip = Path(self.clip_model or "")
        weights = weights_revision(clip) if self.clip_model and clip.is_dir() else self.clip_model
        asked = [self.splits_claims, weights, self.judge_revision, self.requests.describe(*CHECKING)]
        return [described(self.verify), described(self.bounds), *asked]


@dataclass(slots=True)
class CheckedAnnotation:
    """An annotation with its checks (tables.CHECK), and its scores by column name.

    `row` has COLUMNS. `rewritten` has tables.FILTERED and `prompt_id` of a repaired caption, or is None.
    """

    row: Row
    checks: list[dict[str, str | None]] = field(default_factory=list)
    scores: dict[str, float | int | None] = field(default_factory=dict)
    rewritten: Row | None = None

    @property
    def sample_id(self) -> str:
        """The id of the annotated sample."""
        return str(self.row["sample_id"])

    @property
    def caption(self) -> str | None:
        """The caption, or None for a question."""
        text: str | None = self.row["clean_text"]
        return text

    @property
    def confirmed_claims(self) -> float | None:
        """The share of claims that the model confirmed, or None if no claim was checked."""
        return verification.share_confirmed(self.checks, "claims")


Subjects = Sequence[CheckedAnnotation]


@dataclass
class AnnotationChecker:
    """Runs all checks on the annotations of a shard. Closing `stack` closes the judge."""

    shard: DatasetDir
    settings: VerifySettings
    services: Services
    stack: ExitStack

    @property
    def plan(self) -> RequestPlan:
        """The plan of the requests."""
        return self.settings.requests

    @cached_property
    def _judge(self) -> tuple[EngineChoice, Callable[[], Engine]]:
        judge = self.settings.choose_judge(self.services.progress)
        return judge, self.stack.enter_context(open_engine(lambda: judge))

    @cached_property
    def _scorer(self) -> "ClipScorer":
        from pipeline.images.clip import ClipScorer

        assert self.settings.clip_model
        return ClipScorer(self.settings.clip_model)

    def ask_all_checks(self, rows: Sequence[Row]) -> list[CheckedAnnotation]:
        """Return annotations with their checks and scores, in the order of `rows`.

        `rows` must hold every annotation of each sample. Records of custom tasks are not checked.
        """
        config, annotations = self.settings.verify, [CheckedAnnotation(row) for row in rows]
        subjects = [subject for subject in annotations if subject.row["clean_record"] is None]
        captions = [subject for subject in subjects if subject.caption is not None]
        self._check_against_images(subjects)
        if config.repair:
            by_model = [caption for caption in captions if caption.row["prompt_id"] != HUMAN]
            self._repair([caption for caption in by_model if caption.confirmed_claims not in (None, 1)])
        self._check_coverage(subjects)
        if self.settings.clip_model:
            self._align(captions)
        if "references" in config.checks:
            self._compare_with_references(captions)
        if config.judge:
            self._rate([subject for subject in subjects if not self._is_contradicted(subject)])
        return annotations

    def _is_contradicted(self, subject: CheckedAnnotation) -> bool:
        if subject.caption is None:
            return verification.share_confirmed(subject.checks, "round_trip") == 0
        share = subject.confirmed_claims
        return share is not None and share < self.settings.verify.min_claims_supported

    def _check_against_images(self, subjects: Subjects) -> None:
        captions = {s.caption: s.sample_id for s in subjects if s.caption is not None}
        claims = self._split_claims(captions) if self.settings.splits_claims else {}
        verify = self.settings.verify
        checks = [verification.checks_of(s.row, verify, claims.get(s.caption)) for s in subjects]
        self._answer(subjects, checks)

    def _split_claims(self, captions: dict[str, str]) -> dict[str | None, list[Claim]]:
        """Return the claims in each caption. `captions` maps each text to the id of one of its samples."""
        build = partial(verification.build_claims, plan=self.plan)
        requests = (build(text, sample_id) for text, sample_id in captions.items())

        def read(journal: Journal) -> dict[str | None, list[Claim]]:
            return {text: verification.read_claims(text, self.plan, journal) for text in captions}

        claims = self._ask("claims", _chunks(requests), len(captions), read)
        unread = sum(not of_caption for of_caption in claims.values())
        self._warn_of_unread(unread, len(captions), "captions", "unchecked")
        return claims

    def _check_coverage(self, subjects: Subjects) -> None:
        # The distinct questions about each sample.
        questions: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        for subject in subjects:
            if subject.caption is None and not self._is_contradicted(subject):
                question = subject.row["clean_question"], subject.row["clean_answer"]
                questions[subject.sample_id][question] = None
        verify = self.settings.verify
        asked = [questions.get(subject.sample_id, ()) for subject in subjects]
        pairs = zip(subjects, asked, strict=True)
        self._answer(subjects, [verification.coverage_checks(s.caption, verify, q) for s, q in pairs])

    def _answer(self, subjects: Subjects, checks: Sequence[list[verification.Check]]) -> None:
        """Ask the model the questions in `checks` about each subject, and add the answered checks to it."""
        counts = Counter(check.kind for checks_of_one in checks for check in checks_of_one)
        if not counts:
            return
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
        self.services.progress.message(f"verify asks at most {counts.total():,} questions: {kinds}")
        by_sample: dict[str, list[verification.Check]] = defaultdict(list)
        for subject, checks_of_one in zip(subjects, checks, strict=True):
            by_sample[subject.sample_id] += checks_of_one

        def read(journal: Journal) -> None:
            for subject, checks_of_one in zip(subjects, checks, strict=True):
                answered = verification.read_checks(subject.sample_id, checks_of_one, self.plan, journal)
                subject.checks += answered

        requests = verification.build_all(sample_batches(self.shard), by_sample, self.plan)
        self._ask("verify", requests, counts.total(), read)

    def _repair(self, subjects: Subjects) -> None:
        """Let the model rewrite captions with false claims. Keep rewrites whose claims are all confirmed."""
        requests = []
        for subject in subjects:
            contradicted = [
                (check["question"] or "", check["answer"])
                for check in subject.checks
                if check["answer"] is not None and not verification.is_confirmed(check)
            ]
            text = subject.row["clean_text"]
            requests.append(verification.build_repair(text, contradicted, subject.sample_id, self.plan))
        distinct = {request.id: request for request in requests}

        def read(journal: Journal) -> list[str]:
            return [verification.read_repair(request, journal) or "" for request in requests]

        texts = self._ask("repair", _chunks(iter(distinct.values())), len(distinct), read)
        drafts = []
        for subject, request, clean in zip(subjects, requests, self._filter(subjects, texts), strict=True):
            if clean and clean["clean_text"] not in ("", subject.caption):
                rewritten = clean | {"prompt_id": request.prompt_id}
                drafts.append((subject, CheckedAnnotation(subject.row | clean, rewritten=rewritten)))
        self._check_against_images([draft for _, draft in drafts])
        repaired = [(subject, draft) for subject, draft in drafts if draft.confirmed_claims == 1]
        for subject, draft in repaired:
            subject.row, subject.checks, subject.rewritten = draft.row, draft.checks, draft.rewritten
        count = f"{len(repaired):,} of {len(subjects):,}"
        self.services.progress.message(f"verify repaired {count} captions that had false claims")

    def _filter(self, subjects: Subjects, texts: Sequence[str]) -> list[Row | None]:
        """Return the columns of the filter step for each new caption, or None if that step rejects it."""
        nulls = pa.nulls(len(texts), STRING)
        columns = {
            name: pa.array([subject.row[name] for subject in subjects], STRING) for name in ("task", "style")
        }
        columns["text"] = pa.array(texts, STRING)
        table = pa.table(columns | dict.fromkeys(("question", "answer", "record"), nulls))
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
            pages = zip(batch.ids, batch.read_images(), strict=True)
            images = ((name, prepare_image(images[0])) for name, images in pages if name in by_sample)
            for part in _limit_pixels(images):
                pairs = [(caption, image) for sample_id, image in part for caption in by_sample[sample_id]]
                texts = [caption.row["clean_text"] for caption, _ in pairs]
                cosines = self._scorer.cosines([image for _, image in pairs], texts)
                for (caption, _), cosine in zip(pairs, cosines, strict=True):
                    caption.scores["alignment"] = cosine
                done += len(part)
                self.services.progress("align", done, len(by_sample))

    def _compare_with_references(self, captions: Subjects) -> None:
        """Set `shared_words`: share of a caption's content words in any human caption of the image."""
        by_sample = _by_sample(captions)
        for batch in read_samples(self.shard, ["sample_id", "references"]):
            for row in batch.to_pylist():
                known = {word for text in row["references"] for word in _facts(text)}
                for caption in by_sample.get(row["sample_id"], ()):
                    words = _facts(caption.row["clean_text"])
                    shared = len(words & known) / len(words) if words and known else None
                    caption.scores["shared_words"] = shared

    def _rate(self, subjects: Subjects) -> None:
        """Let the judge rate annotations by the criteria in tables.RUBRIC."""
        judge, engine = self._judge
        plan = replace(self.plan, revision=judge.revision)
        by_sample = _by_sample(subjects)

        def requests() -> Iterator[Chunk]:
            for batch in sample_batches(self.shard):
                rows = (subject.row for sample_id in batch.ids for subject in by_sample.get(sample_id, ()))
                built = (verification.build_rating(row, plan) for row in rows)
                yield list({request.id: request for request in built}.values()), batch

        def read(journal: Journal) -> None:
            for subject in subjects:
                subject.scores |= verification.read_rating(subject.row, plan, journal)

        self._ask("judge", requests(), len(subjects), read, engine)
        unread = sum(subject.scores["form"] is None for subject in subjects)
        self._warn_of_unread(unread, len(subjects), "texts", "unrated")

    def _warn_of_unread(self, count: int, total: int, unit: str, state: str) -> None:
        if count:
            problem = f"no usable reply for {count:,} of {total:,} {unit}, which are kept {state}"
            self.services.progress.warn(f"verify: {problem}")

    def _ask(
        self,
        name: str,
        requests: Iterator[Chunk],
        total: int,
        read: Callable[[Journal], T],
        engine: Callable[[], Engine] | None = None,
    ) -> T:
        """Send the requests that have no reply in the journal yet, and return the result of `read`."""
        stats, progress = self.services.stats, self.services.progress
        start = engine or self.services.engine
        with Journal(self.shard.journal) as journal, record_cost(self.shard, journal, stats):
            before = stats.done
            for ready in ask_all(requests, self.plan, self.settings.server, start, journal, stats):
                progress(name, stats.done - before, total, ready.metrics())
            if done := stats.done - before:
                # Lines are printed at intervals, so the last update may not have been shown.
                progress(name, done, done)
            return read(journal)


def _by_sample(subjects: Subjects) -> dict[str, list[CheckedAnnotation]]:
    by_sample: dict[str, list[CheckedAnnotation]] = defaultdict(list)
    for subject in subjects:
        by_sample[subject.sample_id].append(subject)
    return by_sample


def _chunks(requests: Iterator[Request]) -> Iterator[Chunk]:
    """Yield chunks of requests that need no images."""
    for chunk in iter(lambda: list(islice(requests, CHUNK_REQUESTS)), []):
        yield chunk, NO_SAMPLES


def _limit_pixels(images: "Iterator[tuple[str, Image]]") -> "Iterator[list[tuple[str, Image]]]":
    """Yield lists of named images with at most MAX_DECODED_PIXELS in total. A larger image comes alone."""
    held: list[tuple[str, Image]] = []
    pixels = 0
    for name, image in images:
        if held and pixels + image.width * image.height > MAX_DECODED_PIXELS:
            yield held
            held, pixels = [], 0
        held.append((name, image))
        pixels += image.width * image.height
    if held:
        yield held


def _facts(text: str) -> set[str]:
    return set(content_words(text)) - FUNCTION_WORDS


def ask_checks(
    shard: DatasetDir, path: Path, settings: VerifySettings, services: Services
) -> Iterator[pa.Table]:
    """Yield the annotations of a shard with the results of their checks (CHECKED) as further columns."""
    with ExitStack() as stack:
        checker = AnnotationChecker(shard, settings, services, stack)
        for table in whole_groups(read_batches(path), "sample_id", BATCH_ANNOTATIONS):
            yield add_results(table, checker.ask_all_checks(table.select(COLUMNS).to_pylist()))


def add_results(table: pa.Table, subjects: Sequence[CheckedAnnotation]) -> pa.Table:
    """Append the columns in CHECKED, and replace each repaired caption."""
    results = [
        {
            "checks": subject.checks,
            "unrepaired_text": text if subject.rewritten else None,
            **subject.scores,
            **results_of(subject.checks, is_caption=subject.caption is not None),
        }
        for subject, text in zip(subjects, table["clean_text"].to_pylist(), strict=True)
    ]
    if any(subject.rewritten for subject in subjects):
        rows = table.to_pylist()
        for row, subject in zip(rows, subjects, strict=True):
            if subject.rewritten:
                # The new text has not been compared with the excluded datasets.
                row |= subject.rewritten | {"contaminated_by": None}
        table = pa.Table.from_pylist(rows, schema=table.schema)
    return append_columns(table, pa.Table.from_pylist(results, schema=CHECKED))


def find_unconfirmed(comparison: Comparison) -> duckdb.DuckDBPyRelation | None:
    """Return `row` and `reason` of the annotations that fail a check. Some limits depend on all rows."""
    config: VerifyConfig = comparison.settings.verify
    if not config.is_asked:
        return None
    load(comparison.db, "judged", _judged(comparison.rows), JUDGED)
    limits = {name: -1.0 if value is None else value for name, value in config.model_dump().items()}
    return comparison.db.sql(QUERY.format(**limits))


def judge_verified(table: pa.Table, settings: VerifySettings) -> pa.Table:
    """Append the columns in CHECKED, all empty, if no check was asked. `reason` comes from `compare`."""
    if settings.verify.is_asked:
        return table
    return append_columns(table, pa.Table.from_pylist([{"checks": []}] * table.num_rows, schema=CHECKED))


def _judged(rows: AllRows) -> Iterator[pa.Table]:
    columns = [
        "clean_text",
        "style",
        "clean_question",
        "clean_answer",
        "answer_type",
        *VERIFIED.names,
        "alignment",
    ]
    for table in rows.batches(*columns):
        known = {name: table[name] for name in table.column_names} | {
            "is_caption": is_caption(table),
            "question": map_distinct(table["clean_question"], text_key),
            "answer": map_distinct(table["clean_answer"], normalize_answer),
            "answer_type": pc.fill_null(table["answer_type"], ""),
        }
        yield pa.table({name: known[name] for name in JUDGED.names})


def results_of(checks: Sequence[dict[str, str | None]], *, is_caption: bool) -> dict[str, Any]:
    """Return the results (tables.VERIFIED) of the checks of one annotation."""
    same_without = _is_confirmed(checks, "necessary")
    return {
        "agreement": verification.share_confirmed(checks, "claims" if is_caption else "round_trip"),
        "answered_blind": _is_confirmed(checks, "blind"),
        "sufficient": _is_confirmed(checks, "sufficient"),
        "necessary": None if same_without is None else not same_without,
        "coverage": verification.share_confirmed(checks, "covers"),
    }


def _is_confirmed(checks: Sequence[dict[str, str | None]], kind: str) -> bool | None:
    share = verification.share_confirmed(checks, kind)
    return None if share is None else share == 1


STEP = RowStep(
    "verify",
    settings=VerifySettings.of,
    prepare=ask_checks,
    is_prepared=lambda plan: plan.config.verify.is_asked,
    judge=judge_verified,
    compare=find_unconfirmed,
    adds=pa.schema({"reason": STRING}),
    advice={
        "answer_not_confirmed": "ask a stronger model, or leave round_trip out of --verify",
        "claims_not_confirmed": "lower verify.min_claims_supported, or leave claims out of --verify",
        "low_coverage": "lower verify.min_coverage, or leave covers out of --verify",
        "unlike_source_captions": "lower verify.min_shared_words, or leave references out of --verify",
        "answerable_without_image": "raise verify.min_blind_frac, or leave blind out of --verify",
        "evidence_not_sufficient": "leave evidence out of --verify",
        "evidence_not_necessary": "leave evidence out of --verify",
        "low_rating": "lower verify.min_rating, or leave out --judge",
        "low_alignment": "lower verify.min_alignment, or choose another CLIP: verify.clip_model",
    },
)
