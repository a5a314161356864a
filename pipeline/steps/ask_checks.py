"""Ask about the annotations of a shard what the step verify wants to know. It decides nothing: that is the step's part.

In this order: the checks about images; captions with false claims are repaired, and checked again; what captions tell; and a
judge rates what there is then. Every reply is journaled, so a run that goes on asks only what is missing.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipeline.config.sections import FilterConfig, ServerConfig, VerifyConfig
from pipeline.dataset.directory import DatasetDir, read_samples, sample_batches
from pipeline.dataset.records import described
from pipeline.digests import weights_revision
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.images.decode import prepare_image
from pipeline.inference.engines import EngineChoice, open_engine
from pipeline.inference.journal import Journal
from pipeline.inference.queue import NO_SAMPLES, Chunk, ask_all
from pipeline.inference.requests import RequestPlan
from pipeline.inference.verification import (
    Check,
    build_all,
    build_claims,
    build_rating,
    build_repair,
    checks_of,
    coverage_checks,
    is_confirmed,
    read_checks,
    read_claims,
    read_rating,
    read_repair,
    share_confirmed,
)
from pipeline.plan import Plan
from pipeline.progress import Progress
from pipeline.scenes.claims import Claim
from pipeline.steps.base import Services, record_cost
from pipeline.tables import FILTERED, HUMAN, STRING
from pipeline.tasks.checks import CHECKING, REPAIR
from pipeline.text.content_keys import content_words
from pipeline.text.language import FUNCTION_WORDS
from pipeline.types import Engine, Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.images.clip import ClipScorer

MAX_HELD_PIXELS = 64_000_000  # of the images that are decoded at once
CHUNK_REQUESTS = 256  # of texts, without images
COLUMNS = (
    "sample_id", "task", "prompt_id", "clean_text", "clean_question", "clean_answer", "clean_record", "evidence_pages", "pages"
)  # fmt: skip
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """What the step verify reads."""

    verify: VerifyConfig
    bounds: FilterConfig  # of captions that were repaired
    requests: RequestPlan
    splits_claims: bool  # the model splits captions into claims
    clip_model: str | None  # None: captions are not compared with images
    server: ServerConfig  # not in the key: it does not affect answers
    judge_revision: str  # of the model that rates; empty if there is none
    choose_judge: Callable[[Progress], EngineChoice]

    @classmethod
    def of(cls, plan: Plan) -> "VerifySettings":
        """Resolve the settings of a run."""
        config, clip_model = plan.config, plan.clip_model if plan.needs_clip else None
        return cls(
            verify=config.verify,
            bounds=config.filter,
            requests=plan.requests,
            splits_claims=config.splits_claims,
            clip_model=clip_model,
            server=config.server,
            judge_revision=plan.judge_revision,
            choose_judge=plan.choose_judge,
        )

    def describe(self) -> list[Any]:
        """Return everything that the results of checks depend on, except the rows and the images."""
        if not self.verify.is_asked:
            return []
        clip = Path(self.clip_model or "")
        weights = weights_revision(clip) if self.clip_model and clip.is_dir() else self.clip_model
        asked = [self.splits_claims, weights, self.judge_revision, self.requests.describe(*CHECKING)]
        return [described(self.verify), described(self.bounds), *asked]


@dataclass(slots=True)
class CheckedAnnotation:
    """An annotation with what is known of it."""

    row: Row  # COLUMNS
    checks: list[dict[str, str | None]] = field(default_factory=list)  # tables.CHECK
    scores: dict[str, float | int | None] = field(default_factory=dict)  # by name of a column
    rewritten: Row | None = None  # tables.FILTERED and `prompt_id` of a caption that was repaired

    @property
    def caption(self) -> str | None:
        """The caption; None of a question."""
        text: str | None = self.row["clean_text"]
        return text


class AnnotationChecker:
    """Asks about annotations of a shard. As a context it keeps the judge and the CLIP that it has loaded."""

    def __init__(self, shard: DatasetDir, settings: VerifySettings, services: Services) -> None:
        self.shard, self.settings, self.services = shard, settings, services
        self.plan = settings.requests
        self._stack = ExitStack()

    def __enter__(self) -> "AnnotationChecker":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def _judge(self) -> tuple[EngineChoice, Callable[[], Engine]]:
        judge = self.settings.choose_judge(self.services.progress)
        return judge, self._stack.enter_context(open_engine(lambda: judge))

    @cached_property
    def _scorer(self) -> "ClipScorer":
        from pipeline.images.clip import ClipScorer

        assert self.settings.clip_model
        return ClipScorer(self.settings.clip_model)

    def ask_all_checks(self, rows: Sequence[Row]) -> list[CheckedAnnotation]:
        """Return annotations with their checks and scores, in order; values of own tasks that are no text have none.

        They are all that there are of their samples.
        """
        config, annotations = self.settings.verify, [CheckedAnnotation(row) for row in rows]
        subjects = [subject for subject in annotations if subject.row["clean_record"] is None]
        self._check_against_images(subjects)
        if config.repair:
            by_model = (one for one in subjects if one.caption is not None and one.row["prompt_id"] != HUMAN)
            self._repair([subject for subject in by_model if _has_false_claim(subject)])
        self._check_coverage(subjects)
        if self.settings.clip_model:
            self._align([subject for subject in subjects if subject.caption is not None])
        if "references" in config.checks:
            self._compare_with_references([subject for subject in subjects if subject.caption is not None])
        if config.judge:
            self._rate([subject for subject in subjects if not self._is_contradicted(subject)])
        return annotations

    def _is_contradicted(self, subject: CheckedAnnotation) -> bool:
        """Return whether the model, asked again, has said otherwise."""
        if subject.caption is None:
            return share_confirmed(subject.checks, "round_trip") == 0
        share = share_confirmed(subject.checks, "claims")
        return share is not None and share < self.settings.verify.min_claims_supported

    # --- checks that the model answers

    def _check_against_images(self, subjects: Sequence[CheckedAnnotation]) -> None:
        captions = {s.caption: s.row["sample_id"] for s in subjects if s.caption is not None}
        claims = self._split(captions) if self.settings.splits_claims else {}
        self._answer(subjects, [checks_of(s.row, self.settings.verify, claims.get(s.caption)) for s in subjects])

    def _split(self, captions: dict[str, str]) -> dict[str | None, list[Claim]]:
        """Return the claims of each caption, as the model splits it; captions are given with a sample that has them."""
        build = partial(build_claims, plan=self.plan)
        requests = (build(text, sample_id) for text, sample_id in captions.items())

        def read(journal: Journal) -> dict[str | None, list[Claim]]:
            return {text: read_claims(text, self.plan, journal) for text in captions}

        claims = self._ask("claims", _chunks(requests), len(captions), read)
        self._warn_of_unread(sum(not of_caption for of_caption in claims.values()), len(captions), "captions", "unchecked")
        return claims

    def _check_coverage(self, subjects: Sequence[CheckedAnnotation]) -> None:
        questions: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)  # of each sample, each once
        for subject in subjects:
            if subject.caption is None and not self._is_contradicted(subject):
                questions[subject.row["sample_id"]][subject.row["clean_question"], subject.row["clean_answer"]] = None
        verify = self.settings.verify
        self._answer(subjects, [coverage_checks(s.caption, verify, questions.get(s.row["sample_id"], ())) for s in subjects])

    def _answer(self, subjects: Sequence[CheckedAnnotation], checks: Sequence[list[Check]]) -> None:
        """Ask the checks of each subject, and add them with their answers."""
        wanted = Counter(check.kind for of_one in checks for check in of_one)
        if not wanted:
            return
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(wanted.items()))
        self.services.progress.message(f"verify asks at most {wanted.total():,} questions: {kinds}")
        of_sample: dict[str, list[Check]] = defaultdict(list)
        for subject, of_one in zip(subjects, checks, strict=True):
            of_sample[subject.row["sample_id"]] += of_one

        def read(journal: Journal) -> None:
            for subject, of_one in zip(subjects, checks, strict=True):
                subject.checks += read_checks(subject.row["sample_id"], of_one, self.plan, journal)

        self._ask("verify", build_all(sample_batches(self.shard), of_sample, self.plan), wanted.total(), read)

    # --- repair

    def _repair(self, subjects: Sequence[CheckedAnnotation]) -> None:
        """Have captions with false claims written again, and keep those of which no claim is false then."""
        requests = [
            build_repair(
                subject.row["clean_text"],
                [(c["question"] or "", c["answer"]) for c in subject.checks if c["answer"] is not None and not is_confirmed(c)],
                subject.row["sample_id"],
                self.plan,
            )
            for subject in subjects
        ]

        def read(journal: Journal) -> list[str | None]:
            return [read_repair(request, journal) for request in requests]

        once = {request.id: request for request in requests}
        texts = self._ask("repair", _chunks(iter(once.values())), len(once), read)
        rewritten = self._filter(subjects, [text or "" for text in texts])
        drafts = [
            (subject, CheckedAnnotation(subject.row | fields, rewritten=fields | {"prompt_id": request.prompt_id}))
            for subject, request, text, fields in zip(subjects, requests, texts, rewritten, strict=True)
            if text and fields and fields["clean_text"] != subject.caption
        ]
        self._check_against_images([draft for _, draft in drafts])
        repaired = 0
        for subject, draft in drafts:
            if share_confirmed(draft.checks, "claims") == 1:
                subject.row, subject.checks, subject.rewritten = draft.row, draft.checks, draft.rewritten
                repaired += 1
        self.services.progress.message(f"verify repaired {repaired:,} of {len(subjects):,} captions with false claims")

    def _filter(self, subjects: Sequence[CheckedAnnotation], texts: Sequence[str]) -> list[Row | None]:
        """Return the columns of the step filter for new texts of captions; None for one that it would reject."""
        tasks, none = [subject.row["task"] for subject in subjects], pa.nulls(len(texts), STRING)
        given = {"task": pa.array(tasks, STRING), "text": pa.array(texts, STRING)}
        table = pa.table(given | dict.fromkeys(("question", "answer", "record"), none))
        grams = own_prompt_grams((*(task.name for task in self.plan.tasks.asked), REPAIR.name))
        rows = filter_annotations(table, self.settings.bounds, grams, self.plan.tasks).to_pylist()
        return [None if row["reason"] else {name: row[name] for name in FILTERED.names} for row in rows]

    # --- scores

    def _align(self, subjects: Sequence[CheckedAnnotation]) -> None:
        """Score captions by the cosine of CLIP with their images."""
        of_sample: dict[str, list[CheckedAnnotation]] = defaultdict(list)
        for subject in subjects:
            of_sample[subject.row["sample_id"]].append(subject)
        done = 0
        for batch in sample_batches(self.shard):
            if of_sample.keys().isdisjoint(batch.ids):
                continue
            pages_of = zip(batch.ids, batch.read_images(), strict=True)
            images = ((sample_id, prepare_image(pages[0])) for sample_id, pages in pages_of if sample_id in of_sample)
            for part in _few_pixels(images):
                pairs = [(subject, image) for sample_id, image in part for subject in of_sample[sample_id]]
                texts = [subject.row["clean_text"] for subject, _ in pairs]
                for (subject, _), cosine in zip(pairs, self._scorer.cosines([one for _, one in pairs], texts), strict=True):
                    subject.scores["alignment"] = cosine
                done += len(part)
                self.services.progress("align", done, len(of_sample))

    def _compare_with_references(self, subjects: Sequence[CheckedAnnotation]) -> None:
        """Score captions by the share of their content words that some caption of the source has, where there is one."""
        of_sample: dict[str, set[str]] = {}
        wanted = {subject.row["sample_id"] for subject in subjects}
        for batch in read_samples(self.shard, ["sample_id", "references"]):
            for sample_id, texts in zip(batch["sample_id"].to_pylist(), batch["references"].to_pylist(), strict=True):
                if sample_id in wanted:
                    of_sample[sample_id] = {word for text in texts for word in _facts(text)}
        for subject in subjects:
            words, known = _facts(subject.row["clean_text"]), of_sample[subject.row["sample_id"]]
            subject.scores["shared_words"] = len(words & known) / len(words) if words and known else None

    def _rate(self, subjects: Sequence[CheckedAnnotation]) -> None:
        """Have a judge rate annotations by its rubric."""
        judge, engine = self._judge
        plan = replace(self.plan, revision=judge.revision)
        of_sample: dict[str, list[Row]] = defaultdict(list)
        for subject in subjects:
            of_sample[subject.row["sample_id"]].append(subject.row)

        def requests() -> Iterator[Chunk]:
            for batch in sample_batches(self.shard):
                built = (build_rating(row, plan) for sample_id in batch.ids for row in of_sample.get(sample_id, ()))
                yield list({request.id: request for request in built}.values()), batch

        def read(journal: Journal) -> None:
            for subject in subjects:
                subject.scores |= read_rating(subject.row, plan, journal)

        self._ask("judge", requests(), len(subjects), read, engine)
        self._warn_of_unread(sum(subject.scores["form"] is None for subject in subjects), len(subjects), "texts", "unrated")

    def _warn_of_unread(self, count: int, total: int, what: str, how: str) -> None:
        if count:
            self.services.progress.warn(f"verify: no usable reply about {count:,} of {total:,} {what}, which are kept {how}")

    def _ask(
        self,
        name: str,
        requests: Iterator[Chunk],
        total: int,
        read: Callable[[Journal], T],
        engine: Callable[[], Engine] | None = None,
    ) -> T:
        """Send the requests that the journal lacks replies to; return what `read` makes of the journal then."""
        stats, progress = self.services.stats, self.services.progress
        with Journal(self.shard.journal) as journal, record_cost(self.shard, journal, stats):
            before = stats.done
            for ready in ask_all(requests, self.plan, self.settings.server, engine or self.services.engine, journal, stats):
                progress(name, stats.done - before, total, ready.metrics())
            if done := stats.done - before:
                progress(name, done, done)  # its end, which a line that is shown from time to time may pass over
            return read(journal)


def _chunks(requests: Iterator[Request]) -> Iterator[Chunk]:
    """Yield requests that show no image in chunks."""
    for chunk in iter(lambda: list(islice(requests, CHUNK_REQUESTS)), []):
        yield chunk, NO_SAMPLES


def _few_pixels(images: "Iterator[tuple[str, Image]]") -> "Iterator[list[tuple[str, Image]]]":
    """Yield images with their names in lists of at most MAX_HELD_PIXELS, or of one that has more."""
    held: list[tuple[str, Image]] = []
    pixels = 0
    for name, image in images:
        if held and pixels + image.width * image.height > MAX_HELD_PIXELS:
            yield held
            held, pixels = [], 0
        held.append((name, image))
        pixels += image.width * image.height
    if held:
        yield held


def _has_false_claim(subject: CheckedAnnotation) -> bool:
    share = share_confirmed(subject.checks, "claims")
    return share is not None and share < 1


def _facts(text: str) -> set[str]:
    return set(content_words(text)) - FUNCTION_WORDS
