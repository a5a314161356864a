"""Build the requests that check whether annotations are true, and read the replies.

Each check asks the model that wrote the annotation a question, with greedy decoding and without showing the
earlier answer. Blind checks show no image, evidence checks show only some pages of a deck, and `covers` shows
a caption instead of the image. To check the claims of a caption, the model first splits the caption into
questions that expect "yes" or "no", without seeing the image.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config.sections import VerifyConfig
from pipeline.digests import digest
from pipeline.inference.journal import Journal
from pipeline.inference.queue import last_reply
from pipeline.inference.requests import RequestPlan
from pipeline.scenes.claims import Claim, extract_claims
from pipeline.tables import RUBRIC
from pipeline.tasks import find_broken_rule
from pipeline.tasks.base import Task
from pipeline.tasks.checks import ANSWER, BLIND, CLAIMS, COVERS, RATE, REPAIR
from pipeline.tasks.replies import parse_reply, read_fields
from pipeline.text.language_codes import SENTENCE_ENDS, YES_OR_NO
from pipeline.text.vqa_answers import is_negative, normalize_answer
from pipeline.types import Request, SampleBatch

# From template variables to columns.
_RATED = {"caption": "clean_text", "question": "clean_question", "answer": "clean_answer"}
MIN_CLAIMS_TOKENS = 800  # eight claims with two questions each take about 350 tokens


class Check(NamedTuple):
    """One question about an annotation."""

    kind: str
    question: str
    expected: str
    pages: tuple[int, ...] | None = None  # page numbers to show, counted from 1, or None for all
    caption: str | None = None  # the caption to show instead of the image


def checks_of(
    row: dict[str, Any], config: VerifyConfig, claims: Sequence[Claim] | None = None
) -> list[Check]:
    """Return the checks of an annotation, in order. `row` has the columns of tables.ANNOTATION and FILTERED.

    `claims` are a caption's claims as split by the model. If None, rules for drawn scenes extract the claims.
    """
    if row["clean_text"] is not None:
        if "claims" not in config.checks:
            return []
        claims = extract_claims(row["clean_text"]) if claims is None else claims
        return [Check("claims", claim.question, claim.expected) for claim in claims]
    question, answer = row["clean_question"], row["clean_answer"]
    checks = [Check("round_trip", question, answer)] if "round_trip" in config.checks else []
    if "blind" in config.checks:
        checks.append(Check("blind", question, answer, ()))
    evidence = tuple(row["evidence_pages"] or ())
    other_pages = tuple(page for page in range(1, row["pages"] + 1) if page not in evidence)
    if "evidence" in config.checks and evidence and other_pages:
        checks.append(Check("sufficient", question, answer, evidence))
        checks.append(Check("necessary", question, answer, other_pages))
    return checks


def coverage_checks(
    caption: str | None, config: VerifyConfig, questions: Iterable[tuple[str, str]]
) -> list[Check]:
    """Return one check per (question, expected answer) pair: whether the caption answers the question."""
    if caption is None or "covers" not in config.checks:
        return []
    return [Check("covers", question, answer, (), caption) for question, answer in questions]


def build_claims(caption: str, sample_id: str, plan: RequestPlan) -> Request:
    """Return the request that asks the model to split a caption into claims."""
    max_tokens = max(plan.generate.max_tokens, MIN_CLAIMS_TOKENS)
    fields, shared_digest = plan.fields(CLAIMS, max_tokens=max_tokens, caption=caption)
    return _text_request(fields, shared_digest, sample_id, "claims")


def _text_request(fields: dict[str, Any], shared_digest: str, sample_id: str, style: str) -> Request:
    """Return a request that shows no image. Its id is the same for all samples with the same text."""
    request_id = digest({"image": None, "pages": (), "about": shared_digest})
    return Request(id=request_id, sample_id=sample_id, style=style, pages=(), **fields)


def read_claims(caption: str, plan: RequestPlan, journal: Journal) -> list[Claim]:
    """Return the claims that the model found, each as two questions that expect "yes" and "no"."""
    rows = _usable_rows(CLAIMS, build_claims(caption, "", plan), journal)
    return [
        Claim(row[name], expected)
        for row in rows
        for name, expected in (("question", "yes"), ("opposite", "no"))
    ]


def _usable_rows(task: Task, request: Request, journal: Journal) -> list[dict[str, Any]]:
    rows = [fields for fields, error in read_fields(task, last_reply(request, journal)) if not error]
    return [fields for fields in rows if not find_broken_rule(task, fields)]


def build_repair(
    caption: str, answers: Sequence[tuple[str, str]], sample_id: str, plan: RequestPlan
) -> Request:
    """Return the request that asks the model to remove claims that contradict (question, answer) pairs."""
    fields, shared_digest = plan.fields(REPAIR, caption=caption, answers=tuple(answers))
    return _text_request(fields, shared_digest, sample_id, "repair")


def read_repair(request: Request, journal: Journal) -> str | None:
    """Return the repaired caption, or None if the reply is unusable."""
    rows = _usable_rows(REPAIR, request, journal)
    return str(rows[0]["caption"]) if rows else None


def build_rating(row: dict[str, Any], plan: RequestPlan) -> Request:
    """Return the request for a judge's rating of an annotation. `plan` is the request plan of the judge."""
    values: dict[str, Any] = {
        name: row[column] if row[column] is not None else "" for name, column in _RATED.items()
    }
    fields, shared_digest = plan.fields(RATE, **values)
    request_id = digest({"image": row["sample_id"], "pages": None, "about": shared_digest})
    return Request(id=request_id, sample_id=row["sample_id"], style="rate", **fields)


def read_rating(row: dict[str, Any], plan: RequestPlan, journal: Journal) -> dict[str, int | None]:
    """Return the score of an annotation for each criterion. All scores are None if the reply is unusable."""
    rows = _usable_rows(RATE, build_rating(row, plan), journal)
    return {name: int(rows[0][name]) if rows else None for name in RUBRIC}


def build_check(check: Check, sample_id: str, plan: RequestPlan) -> Request:
    """Return the request for a check. `with_images` adds the images."""
    if check.caption is None:
        fields, shared_digest = plan.fields(BLIND if check.pages == () else ANSWER, question=check.question)
    else:
        fields, shared_digest = plan.fields(COVERS, question=check.question, caption=check.caption)
    image = sample_id if check.pages != () else None
    request_id = digest({"image": image, "pages": check.pages, "about": shared_digest})
    return Request(id=request_id, sample_id=sample_id, style=check.kind, pages=check.pages, **fields)


def build_all(
    batches: Iterable[SampleBatch], checks_of_sample: Mapping[str, Sequence[Check]], plan: RequestPlan
) -> Iterator[tuple[list[Request], SampleBatch]]:
    """Yield the requests for the checks of each batch of samples. Each distinct request is yielded once."""
    built: set[str] = set()
    for samples in batches:
        checks = [(check, name) for name in samples.ids for check in checks_of_sample.get(name, ())]
        requests = {request.id: request for request in (build_check(*check, plan) for check in checks)}
        new = [request for request_id, request in requests.items() if request_id not in built]
        built |= requests.keys()
        yield new, samples


def read_checks(
    sample_id: str, checks: Iterable[Check], plan: RequestPlan, journal: Journal
) -> list[dict[str, str | None]]:
    """Return the checks of a sample with their answers (tables.CHECK). Unusable answers are None."""
    rows = []
    for check in checks:
        request = build_check(check, sample_id, plan)
        row = parse_reply(request, last_reply(request, journal))[0]
        answer = None if row["reply_error"] else row["answer"]
        rows.append(
            {"kind": check.kind, "question": check.question, "expected": check.expected, "answer": answer}
        )
    return rows


def share_confirmed(checks: Iterable[Mapping[str, Any]], kind: str) -> float | None:
    """Return the share of confirmed checks (tables.CHECK) of one kind, or None if no answer is usable.

    For claims, a question that expects "no" counts as one check together with the preceding question.
    """
    groups: list[list[Mapping[str, Any]]] = []
    for check in checks:
        if check["kind"] == kind:
            if kind == "claims" and check["expected"] == "no" and groups:
                groups[-1].append(check)
            else:
                groups.append([check])
    answered = [[check for check in group if check["answer"] is not None] for group in groups]
    results = [all(map(is_confirmed, group)) for group in answered if group]
    return sum(results) / len(results) if results else None


def is_confirmed(check: Mapping[str, Any]) -> bool:
    """Return whether the answer to a check (tables.CHECK) is the expected one."""
    return _normalized(check["answer"]) == _normalized(check["expected"])


def _normalized(answer: str) -> str:
    """Return the normalized answer, with yes and no translated to English from any language."""
    answer = answer.rstrip(SENTENCE_ENDS)
    normal = normalize_answer(answer)
    return (
        f"-{normalize_answer(answer.strip()[1:])}" if is_negative(answer) else YES_OR_NO.get(normal, normal)
    )
