"""Build the requests that check whether annotations are true, and read the replies.

Each check asks the model that wrote the annotation a question, without showing the earlier answer. Blind
checks show no image, evidence checks show only some pages, and `covers` shows a caption instead of the image.
To check a caption, the model first splits it into claims. Each claim becomes pairs of yes/no questions: for a
true claim, the right answers to a pair are one yes and one no.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from pipeline.digests import digest
from pipeline.inference.journal import Journal
from pipeline.inference.queue import last_reply
from pipeline.inference.requests import RequestPlan
from pipeline.tables import ANNOTATION, RUBRIC
from pipeline.tasks import find_broken_rule
from pipeline.tasks.base import Task
from pipeline.tasks.checks import (
    ANSWER,
    BLIND,
    CANNOT_TELL,
    CLAIMS,
    CONFIRM,
    COVERS,
    MAX_CLAIMS,
    MAX_EVIDENCE,
    RATE,
    REFUTED,
    REPAIR,
    count_claims,
    questions_about,
)
from pipeline.tasks.replies import parse_reply, read_fields
from pipeline.text.vqa_answers import is_same_answer
from pipeline.types import Request, SampleBatch

# Maps template variables to columns.
_RATED = {"caption": "clean_text", "question": "clean_question", "answer": "clean_answer"}
# A list of 24 claims takes about 350 tokens.
MIN_CLAIMS_TOKENS = 800
QUESTION_CHECKS = ("round_trip", "blind", "evidence")
ORDER = dict.fromkeys(QUESTION_CHECKS, 0) | {
    "claims": 1, "repair": 2, "covers": 3, "alignment": 4, "judge": 5
}  # fmt: skip
# Maps each check to its score, which the conditions of later checks may use.
SCORES = {"round_trip": "agreement", "claims": "precision", "covers": "coverage", "alignment": "alignment"}
# Columns of annotations that the conditions of all checks may use as scores.
LOG_PROBABILITIES = tuple(name for name in ANNOTATION.names if name.startswith("logprob"))


class Check(NamedTuple):
    """One question about an annotation, or about one of its claims."""

    kind: str
    question: str
    expected: str
    # Page numbers start at 1. None means all pages.
    pages: tuple[int, ...] | None = None
    # If set, the model sees this caption instead of the image.
    caption: str | None = None
    task: Task = ANSWER
    claim: str | None = None
    weight: int = 1  # how much the answer counts for or against the claim


def question_checks(row: dict[str, Any], enabled: Collection[str]) -> list[Check]:
    """Return the checks of a question, in order. `row` has the columns of tables.ANNOTATION and FILTERED."""
    question, answer = row["clean_question"], row["clean_answer"]
    checks = [Check("round_trip", question, answer)] if "round_trip" in enabled else []
    if "blind" in enabled:
        checks.append(Check("blind", question, answer, (), task=BLIND))
    evidence = tuple(row["evidence_pages"] or ())
    if "evidence" in enabled and 0 < len(evidence) < row["pages"]:
        checks.append(Check("sufficient", question, answer, evidence))
    return checks


def coverage_checks(caption: str | None, questions: Iterable[tuple[str, str]]) -> list[Check]:
    """Return one check per (question, expected answer) pair: whether the caption answers the question."""
    return [Check("covers", question, answer, (), caption, COVERS) for question, answer in questions]


def claim_checks(claim: str) -> list[Check]:
    """Return one check for each question about a claim that the model found in a caption."""
    return [Check("claims", *pair, task=CONFIRM, claim=claim) for pair in questions_about(claim)]


def rule_checks(caption: str) -> list[list[Check]]:
    """Return a single check for each claim that rules find in a caption of a drawn scene.

    The answer to this check has the maximum weight, so it alone confirms or refutes the claim.
    """
    from pipeline.scenes.claims import extract_claims  # this import compiles large regular expressions

    pairs = [(one.question, one.expected) for one in extract_claims(caption)]
    return [[Check("claims", *pair, claim=" ".join(pair), weight=MAX_EVIDENCE)] for pair in pairs]


def build_claims(caption: str, sample_id: str, plan: RequestPlan) -> Request:
    """Return the request that asks the model to split a caption into claims."""
    max_tokens = max(plan.generate.max_tokens, MIN_CLAIMS_TOKENS)
    count = count_claims(caption)
    fields, shared_digest = plan.fields(CLAIMS, max_tokens=max_tokens, caption=caption, count=count)
    return _text_request(fields, shared_digest, sample_id, "claims")


def _text_request(fields: dict[str, Any], shared_digest: str, sample_id: str, style: str) -> Request:
    """Return a request that shows no image. Its id is the same for all samples with the same text."""
    request_id = digest({"image": None, "pages": (), "about": shared_digest})
    return Request(id=request_id, sample_id=sample_id, style=style, pages=(), **fields)


def read_claims(caption: str, sample_id: str, plan: RequestPlan, journal: Journal) -> list[str]:
    """Return the distinct claims that the model found in a caption."""
    rows = _usable_rows(CLAIMS, build_claims(caption, sample_id, plan), journal)
    return list(dict.fromkeys(row["claim"] for row in rows))[:MAX_CLAIMS]


def _usable_rows(task: Task, request: Request, journal: Journal) -> list[dict[str, Any]]:
    rows = [fields for fields, error in read_fields(task, last_reply(request, journal)) if not error]
    return [fields for fields in rows if not find_broken_rule(task, fields)]


def build_repair(caption: str, claims: Sequence[str], sample_id: str, plan: RequestPlan) -> Request:
    """Return the request that asks the model to remove `claims` from a caption."""
    fields, shared_digest = plan.fields(REPAIR, caption=caption, claims=tuple(claims))
    return _text_request(fields, shared_digest, sample_id, "repair")


def read_repair(request: Request, journal: Journal) -> str | None:
    """Return the repaired caption, or None if the reply is unusable."""
    rows = _usable_rows(REPAIR, request, journal)
    return str(rows[0]["caption"]) if rows else None


def build_rating(row: dict[str, Any], plan: RequestPlan) -> Request:
    """Return the request for a judge's rating of an annotation. `plan` is the request plan of the judge."""
    values: dict[str, Any] = {name: row[column] or "" for name, column in _RATED.items()}
    fields, shared_digest = plan.fields(RATE, **values)
    request_id = digest({"image": row["sample_id"], "pages": None, "about": shared_digest})
    return Request(id=request_id, sample_id=row["sample_id"], style="rate", **fields)


def read_rating(row: dict[str, Any], plan: RequestPlan, journal: Journal) -> dict[str, Any]:
    """Return `judged_wrong` and the score for each criterion. All are None if the reply is unusable."""
    rows = _usable_rows(RATE, build_rating(row, plan), journal)
    if not rows:
        return dict.fromkeys(("judged_wrong", *RUBRIC))
    return {"judged_wrong": rows[0]["is_wrong"] == "yes"} | {name: int(rows[0][name]) for name in RUBRIC}


def build_check(check: Check, sample_id: str, plan: RequestPlan) -> Request:
    """Return the request for a check, without images. The function `with_images` adds them later."""
    shown: dict[str, Any] = {} if check.caption is None else {"caption": check.caption}
    fields, shared_digest = plan.fields(check.task, question=check.question, **shown)
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
) -> list[dict[str, Any]]:
    """Return the checks of a sample with their answers (tables.CHECK). Unusable answers are None."""
    rows = []
    for check in checks:
        request = build_check(check, sample_id, plan)
        row = parse_reply(request, last_reply(request, journal))[0]
        answer = None if row["reply_error"] or find_broken_rule(check.task, row) else row["answer"]
        asked = {name: getattr(check, name) for name in ("kind", "claim", "question", "expected", "weight")}
        rows.append(asked | {"answer": answer})
    return rows


def share_confirmed(checks: Iterable[Mapping[str, Any]], kind: str) -> float | None:
    """Return the share of confirmed checks (tables.CHECK) of one kind, or None if no answer is usable."""
    answered = (check for check in checks if check["kind"] == kind and check["answer"] is not None)
    results = list(map(is_confirmed, answered))
    return sum(results) / len(results) if results else None


def is_confirmed(check: Mapping[str, Any]) -> bool:
    """Return whether the answer to a check (tables.CHECK) means the same as the expected one."""
    return is_same_answer(check["answer"], check["expected"])


def claims_in(checks: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the evidence against each claim with answers in `checks` (tables.CHECK)."""
    answered = (check for check in checks if check["kind"] == "claims" and check["answer"] is not None)
    return {claim: evidence_against(group) for claim, group in groupby(answered, itemgetter("claim"))}


def evidence_against(checks: Iterable[Mapping[str, Any]]) -> int:
    """Return the weight of the answers that refute a claim, minus the weight of the confirming answers."""
    clear = (check for check in checks if check["answer"] not in (None, CANNOT_TELL))
    return sum(-check["weight"] if is_confirmed(check) else check["weight"] for check in clear)


def share_of_confirmed_claims(evidence: Sequence[int]) -> float | None:
    """Return the share of confirmed claims (evidence at most -REFUTED), or None without claims."""
    return sum(against <= -REFUTED for against in evidence) / len(evidence) if evidence else None
