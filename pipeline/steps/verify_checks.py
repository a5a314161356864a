"""Ask the model about annotations: the checks of the verify step.

The first checks ask the model about the image. Captions with false claims are repaired and checked again.
Then captions are compared with the questions about the image, and with the image itself (CLIP). Last, a judge
rates all texts. A check that is off or has no readable reply rejects nothing.

The claims check and the judge are also asked about known truths and falsehoods (dataset/calibration.py).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipeline.config.sections import FilterConfig, Servers, VerifyConfig
from pipeline.dataset.calibration import (
    CLAIMS,
    JUDGE,
    TRUE,
    KnownTexts,
    choose_known_texts,
)
from pipeline.dataset.directory import DatasetDir, read_samples, sample_batches
from pipeline.dataset.records import described, read_record
from pipeline.digests import hash_to_unit, weights_revision
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.images.decode import prepare_image
from pipeline.inference import verification
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_SAMPLES, Chunk, ask_all
from pipeline.inference.requests import RequestPlan
from pipeline.plan import Plan
from pipeline.steps.base import Services, record_cost, whole_groups
from pipeline.storage.files import read_batches
from pipeline.tables import (
    CALIBRATION,
    CHECK,
    FILTERED,
    FLOAT64,
    HUMAN,
    STRING,
    VERIFIED,
    append_columns,
    fields,
)
from pipeline.tasks.base import Task
from pipeline.tasks.checks import ANSWER, CHECKING, MAX_EVIDENCE, RATE, REFUTED, REPAIR
from pipeline.tasks.checks import CLAIMS as CLAIMS_TASK
from pipeline.text.content_keys import content_words
from pipeline.text.falsehoods import plant_falsehoods
from pipeline.text.language import FUNCTION_WORDS
from pipeline.text.normalize import words_of
from pipeline.types import Request

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
    [
        *fields(pa.list_(CHECK), "checks"), *ALIGNMENT, *VERIFIED, *fields(STRING, "unrepaired_text"),
        *CALIBRATION,
    ]
)  # fmt: skip
# Maximum known truths and planted falsehoods per image. Each costs up to four requests.
MAX_TRUTHS, MAX_FALSEHOODS = 3, 2
_ARTICLES = {"an": "a"}
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """The settings of the verify step. `servers` do not affect the replies, so they are not part of the key.

    `bounds` apply to repaired captions. With `splits_claims`, the model splits captions into claims.
    `clip_model` is None if captions are not compared with images. `seed` and `samples`, a digest of the list
    of all samples, decide about which images known truths are asked.
    """

    verify: VerifyConfig
    bounds: FilterConfig
    requests: RequestPlan
    splits_claims: bool
    clip_model: str | None
    servers: Servers
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
            servers=config.servers,
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
        """Whether a check is asked about known truths and falsehoods."""
        return self.verify.calibration > 0 and ("claims" in self.verify.checks or bool(self.verify.judge))


@dataclass(slots=True)
class CheckedAnnotation:
    """An annotation with its checks (tables.CHECK), and its scores by column name.

    `row` has COLUMNS. `rewritten` has tables.FILTERED and `prompt_id` of a repaired caption, or is None.
    """

    row: Row
    checks: list[dict[str, str | None]] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
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
    def refuted_claims(self) -> list[str]:
        """The claims that the model refuted."""
        claims = verification.claims_in(self.checks)
        return [claim for claim, evidence in claims.items() if evidence >= REFUTED]

    def add_known(self, check: str, kind: str, evidence: int) -> None:
        """Add the evidence of a check against a text whose truth is known (tables.CALIBRATED)."""
        result = {"check": check, "kind": kind, "evidence": evidence}
        self.scores.setdefault("calibration", []).append(result)


Subjects = Sequence[CheckedAnnotation]


@dataclass(slots=True)
class AskedClaim:
    """A claim about a sample, with the questions about it and the answers (tables.CHECK)."""

    sample_id: str
    questions: list[verification.Check]
    answers: list[dict[str, str | None]] = field(default_factory=list)

    @property
    def evidence(self) -> int:
        """The number of answers that refute the claim, less the number of those that confirm it."""
        return verification.evidence_against(self.answers)


@dataclass
class AnnotationChecker:
    """Runs all checks on the annotations of a shard."""

    shard: DatasetDir
    settings: VerifySettings
    services: Services
    _claims: dict[str, list[str]] = field(default_factory=dict)  # by caption

    @property
    def plan(self) -> RequestPlan:
        """The plan of the requests."""
        return self.settings.requests

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
        config, annotations = self.settings.verify, [CheckedAnnotation(row) for row in rows]
        subjects = [subject for subject in annotations if subject.row["clean_record"] is None]
        captions = [subject for subject in subjects if subject.caption is not None]
        questions = [subject for subject in subjects if subject.caption is None]
        self._answer(questions, [verification.question_checks(one.row, config) for one in questions])
        if "claims" in config.checks:
            self._check_claims(captions)
            self._calibrate_claims(captions)
        if config.repair:
            by_model = [caption for caption in captions if caption.row["prompt_id"] != HUMAN]
            self._repair([caption for caption in by_model if caption.refuted_claims])
        self._check_coverage(subjects)
        if self.settings.clip_model:
            self._align(captions)
        if config.judge:
            self._rate([subject for subject in subjects if not self._is_contradicted(subject)])
            self._calibrate_judge(captions)
        return annotations

    def _is_contradicted(self, subject: CheckedAnnotation) -> bool:
        if subject.caption is None:
            return verification.share_confirmed(subject.checks, "round_trip") == 0
        return max(verification.claims_in(subject.checks).values(), default=0) >= MAX_EVIDENCE

    # --- claims

    def _check_claims(self, captions: Subjects) -> None:
        """Ask about each claim of the captions, and set `claim_evidence`."""
        claims = self._split({caption.row["clean_text"]: caption.sample_id for caption in captions})
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

    def _split(self, captions: dict[str, str]) -> dict[str, list[list[verification.Check]]]:
        """Return the questions about each claim in each caption.

        `captions` maps each text to the id of one of its samples.
        """
        if not self.settings.splits_claims:
            return {text: verification.rule_checks(text) for text in captions}
        new = {text: sample_id for text, sample_id in captions.items() if text not in self._claims}
        build = partial(verification.build_claims, plan=self.plan)
        requests = (build(text, sample_id) for text, sample_id in new.items())

        def read(journal: Journal) -> dict[str, list[str]]:
            return {text: verification.read_claims(text, self.plan, journal) for text in new}

        self._claims |= self._ask("claims", CLAIMS_TASK, _chunks(requests), len(new), read)
        return {text: list(map(verification.claim_checks, self._claims[text])) for text in captions}

    def _ask_claims(self, claims: Sequence[AskedClaim]) -> None:
        """Ask the first two questions about each claim, and the others if these do not confirm the claim."""
        for part in (slice(2), slice(2, None)):
            unclear = [claim for claim in claims if claim.evidence > -REFUTED and claim.questions[part]]
            answers = self._ask_checks([(claim.sample_id, claim.questions[part]) for claim in unclear])
            for claim, more in zip(unclear, answers, strict=True):
                claim.answers += more

    @cached_property
    def _known_texts(self) -> dict[str, KnownTexts]:
        batches = read_samples(self.services.dataset, ["sample_id", "references"])
        return choose_known_texts(batches, self.settings.verify.calibration, self.settings.seed)

    def _known_of(self, captions: Subjects) -> Iterator[tuple[CheckedAnnotation, KnownTexts, str, set[str]]]:
        """Yield each chosen sample: its first caption, known texts, the text to change, and all words."""
        if self.settings.is_calibrated:
            for sample_id, of_sample in _by_sample(captions).items():
                if known := self._known_texts.get(sample_id):
                    if all(caption.row["prompt_id"] == HUMAN for caption in of_sample):
                        # The human captions are the texts to check, so they are not known to be true.
                        known = replace(known, captions=())
                    texts = (*known.captions, *(caption.row["clean_text"] for caption in of_sample))
                    words = {word for text in texts for word in (*words_of(text), *content_words(text))}
                    if words.issuperset(_facts(known.foreign or "")):  # the caption may be true
                        known = replace(known, foreign=None)
                    yield of_sample[0], known, texts[0], words

    def _calibrate_claims(self, captions: Subjects) -> None:
        """Ask about known truths and falsehoods, and add the evidence against them to `calibration`."""
        known = list(self._known_of(captions))
        claims = self._split(
            {
                text: caption.sample_id
                for caption, of_sample, base, _ in known
                for text in (base, of_sample.foreign)
                if text
            }
        )
        asked: list[tuple[CheckedAnnotation, str, AskedClaim]] = []
        for caption, of_sample, base, said in known:
            found = [(TRUE, claim) for claim in claims[base][:MAX_TRUTHS] if of_sample.captions]
            found += self._plant(claims[base], said, caption.sample_id)
            if of_sample.foreign and self.settings.splits_claims:
                found += [("other_image", claim) for claim in _unsaid(claims[of_sample.foreign], said)][:1]
            asked += [(caption, kind, AskedClaim(caption.sample_id, claim)) for kind, claim in found]
        self._ask_claims([claim for _, _, claim in asked])
        for caption, kind, claim in asked:
            if any(answer["answer"] is not None for answer in claim.answers):
                caption.add_known(CLAIMS, kind, claim.evidence)

    def _plant(
        self, claims: Sequence[list[verification.Check]], said: set[str], sample_id: str
    ) -> list[tuple[str, list[verification.Check]]]:
        """Return the kinds and questions of falsehoods: claims in which one word is replaced."""
        rank = partial(hash_to_unit, self.settings.seed, sample_id)
        found: dict[str, list[verification.Check]] = {}
        for first in claims:
            if self.settings.splits_claims:
                for kind, text in plant_falsehoods(str(first[0].claim), said, rank):
                    found.setdefault(kind, verification.claim_checks(text))
            else:
                for kind, answer in plant_falsehoods(first[0].expected, (), rank):
                    claim = f"{first[0].question} {answer}"
                    found.setdefault(kind, [first[0]._replace(expected=answer, claim=claim)])
        return sorted(found.items(), key=lambda item: rank(item[0]))[:MAX_FALSEHOODS]

    # --- questions

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
        asked = zip((subject.sample_id for subject in subjects), checks, strict=True)
        for subject, answers in zip(subjects, self._ask_checks(list(asked)), strict=True):
            subject.checks += answers

    def _ask_checks(
        self, asked: Sequence[tuple[str, Sequence[verification.Check]]]
    ) -> list[list[dict[str, str | None]]]:
        """Ask the model questions about samples, and return the answered checks (tables.CHECK)."""
        counts = Counter(check.kind for _, checks in asked for check in checks)
        if not counts:
            return [[] for _ in asked]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
        self.services.progress.message(f"verify asks at most {counts.total():,} questions: {kinds}")
        by_sample: dict[str, list[verification.Check]] = defaultdict(list)
        for sample_id, checks in asked:
            by_sample[sample_id] += checks

        def read(journal: Journal) -> list[list[dict[str, str | None]]]:
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

    def _calibrate_judge(self, captions: Subjects) -> None:
        """Let the judge rate known truths and falsehoods, and add the results to `calibration`."""
        asked: list[tuple[CheckedAnnotation, str, str]] = []
        for caption, known, base, said in self._known_of(captions):
            rank = partial(hash_to_unit, self.settings.seed, caption.sample_id)
            found = [(TRUE, text) for text in known.captions[:1]]
            planted = plant_falsehoods(base, said, rank)
            found += sorted(planted, key=lambda one: rank(one[0]))[:MAX_FALSEHOODS]
            found += [("other_image", text) for text in (known.foreign,) if text]
            asked += [(caption, kind, text) for kind, text in found]
        rows = [caption.row | {"clean_text": text} for caption, _, text in asked]
        for (caption, kind, _), rating in zip(asked, self._ask_judge(rows), strict=True):
            if rating["judged_wrong"] is not None:
                caption.add_known(JUDGE, kind, MAX_EVIDENCE if rating["judged_wrong"] else -MAX_EVIDENCE)

    def _warn_of_unread(self, count: int, total: int, unit: str, state: str) -> None:
        if count:
            problem = f"no usable reply for {count:,} of {total:,} {unit}, which are kept {state}"
            self.services.progress.warn(f"verify: {problem}")

    def _ask(
        self, name: str, task: Task, requests: Iterator[Chunk], total: int, read: Callable[[Journal], T]
    ) -> T:
        """Send the requests that have no reply in the journal yet, and return the result of `read`.

        All requests go to the model of `task`.
        """
        stats, progress = self.services.stats, self.services.progress
        start = partial(self.services.engine, self.plan.model_of(task.name))
        with Journal(self.shard.journal) as journal, record_cost(self.shard, journal, stats):
            before = stats.done
            for ready in ask_all(requests, self.plan, self.settings.servers, start, journal, stats):
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


def _unsaid(claims: Iterable[list[verification.Check]], said: set[str]) -> Iterator[list[verification.Check]]:
    """Yield the claims with an object, or another word, that no text about the sample has."""
    return (claim for claim in claims if not said.issuperset(_facts(str(claim[0].claim))))


def _keeps_other_claims(subject: CheckedAnnotation, clean: Row) -> bool:
    """Return whether a repair only leaves out words, but none of the claims that are true.

    The articles a and an may change.
    """
    rest = (_ARTICLES.get(word, word) for word in words_of(subject.row["clean_text"]))
    if not all(_ARTICLES.get(word, word) in rest for word in words_of(clean["clean_text"])):
        return False
    before, after = _facts(subject.row["clean_text"]), _facts(clean["clean_text"])
    refuted = subject.refuted_claims
    others = [claim for claim in verification.claims_in(subject.checks) if claim not in refuted]
    kept = {word for claim in others for word in _facts(claim)} & before
    return bool(after) and kept <= after


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
    checker = AnnotationChecker(shard, settings, services)
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


def results_of(checks: Sequence[dict[str, str | None]], *, is_caption: bool) -> dict[str, Any]:
    """Return the results (tables.VERIFIED) of the checks of one annotation."""
    same_without = _is_confirmed(checks, "necessary")
    claims = list(verification.claims_in(checks).values())
    return {
        "agreement": verification.share_of_confirmed_claims(claims)
        if is_caption
        else verification.share_confirmed(checks, "round_trip"),
        "evidence": max(claims, default=None),
        "answered_blind": _is_confirmed(checks, "blind"),
        "sufficient": _is_confirmed(checks, "sufficient"),
        "necessary": None if same_without is None else not same_without,
        "coverage": verification.share_confirmed(checks, "covers"),
    }


def _is_confirmed(checks: Sequence[dict[str, str | None]], kind: str) -> bool | None:
    share = verification.share_confirmed(checks, kind)
    return None if share is None else share == 1
