"""Build the requests that check whether annotations are true: a second pass through the same journal.

Every check is a question to the model that wrote the annotation, with greedy decoding. The model sees the image but not its
earlier answer; a blind check shows no image; an evidence check shows only some pages of a deck; the check `covers` shows a
caption instead of the image. For the claims of a caption the model first splits it, without the image, into questions that
expect yes and as many that expect no.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.sections import VerifyConfig
from pipeline.digests import digest
from pipeline.inference.journal import Journal
from pipeline.inference.requests import RequestPlan
from pipeline.scenes.claims import Claim, extract_claims
from pipeline.tables import RUBRIC
from pipeline.tasks import find_broken_rule
from pipeline.tasks.checks import ANSWER, CLAIMS, COVERS, RATE, REPAIR
from pipeline.tasks.replies import parse_reply, read_fields
from pipeline.text.language_codes import SENTENCE_ENDS, YES_OR_NO
from pipeline.text.vqa_answers import is_negative, normalize_answer
from pipeline.types import Reply, Request, SampleBatch

_RATED = {"caption": "text", "question": "question", "answer": "answer"}  # values of the template, and what they come from
_NOTHING_RATED: dict[str, Any] = dict.fromkeys(_RATED, "")
CLAIMS_TOKENS = 800  # eight claims with two questions each take about 350


@dataclass(frozen=True, slots=True)
class Check:
    """One question about one annotation. `pages`: which are shown, counted from 1; None: all. `caption`: shown instead."""

    kind: str
    question: str
    expected: str
    pages: tuple[int, ...] | None = None
    caption: str | None = None


def checks_of(row: dict[str, Any], config: VerifyConfig, claims: Sequence[Claim] | None = None) -> list[Check]:
    """Return the checks of an annotation (a row of tables.ANNOTATION and tables.FILTERED) about its image, in order.

    `claims` are those of a caption, if the model was asked for them; None: they are found by rules for drawn scenes.
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
    others = tuple(page for page in range(1, row["pages"] + 1) if page not in evidence)
    if "evidence" in config.checks and evidence and others:
        checks += [Check("sufficient", question, answer, evidence), Check("necessary", question, answer, others)]
    return checks


def coverage_checks(caption: str | None, config: VerifyConfig, questions: Iterable[tuple[str, str]]) -> list[Check]:
    """Return the checks whether a caption answers questions about its image, each given with its answer."""
    if caption is None or "covers" not in config.checks:
        return []
    return [Check("covers", question, answer, (), caption) for question, answer in questions]


def build_claims(caption: str, sample_id: str, plan: RequestPlan) -> Request:
    """Return the request for the claims of a caption. It shows no image, so equal captions share one."""
    max_tokens = max(plan.generate.max_tokens, CLAIMS_TOKENS)
    fields, shared_digest = plan.fields(CLAIMS, max_tokens=max_tokens, caption=caption)
    return _without_image(fields, shared_digest, sample_id, "claims")


def _without_image(fields: dict[str, Any], shared_digest: str, sample_id: str, style: str) -> Request:
    """Return a request about a text; its id names no image, so equal texts of several images share one."""
    request_id = digest({"image": None, "pages": (), "about": shared_digest})
    return Request(id=request_id, sample_id=sample_id, style=style, pages=(), **fields)


def read_claims(caption: str, plan: RequestPlan, journal: Journal) -> list[Claim]:
    """Return the claims of a caption as the model split it: for each, a question that expects yes, and one that expects no."""
    reply = _last_reply(build_claims(caption, "", plan), journal)
    rows = [fields for fields, error in read_fields(CLAIMS, reply) if not error and not find_broken_rule(CLAIMS, fields)]
    return [Claim(row[name], expected) for row in rows for name, expected in (("question", "yes"), ("opposite", "no"))]


def build_repair(caption: str, answers: Sequence[tuple[str, str]], sample_id: str, plan: RequestPlan) -> Request:
    """Return the request for a caption without what these questions and answers contradict. It shows no image."""
    fields, shared_digest = plan.fields(REPAIR, caption=caption, answers=tuple(answers))
    return _without_image(fields, shared_digest, sample_id, "repair")


def read_repair(request: Request, journal: Journal) -> str | None:
    """Return the caption that came back; None if the reply is unusable."""
    fields, error = read_fields(REPAIR, _last_reply(request, journal))[0]
    return None if error or find_broken_rule(REPAIR, fields) else str(fields["caption"])


def build_rating(row: dict[str, Any], plan: RequestPlan) -> Request:
    """Return the request for a judge's rating of an annotation; the plan is the judge's."""
    values: dict[str, Any] = _NOTHING_RATED | {
        name: row[f"clean_{column}"] for name, column in _RATED.items() if row[f"clean_{column}"] is not None
    }
    asked: dict[str, Any] = _NOTHING_RATED | values
    fields, shared_digest = plan.fields(RATE, **asked)
    request_id = digest({"image": row["sample_id"], "pages": None, "about": shared_digest})
    return Request(id=request_id, sample_id=row["sample_id"], style="rate", **fields)


def read_rating(row: dict[str, Any], plan: RequestPlan, journal: Journal) -> dict[str, int | None]:
    """Return the scores of an annotation by part of the rubric; all None if the reply is unusable."""
    fields, error = read_fields(RATE, _last_reply(build_rating(row, plan), journal))[0]
    is_usable = not error and not find_broken_rule(RATE, fields)
    return {name: int(fields[name]) if is_usable else None for name in RUBRIC}


def _last_reply(request: Request, journal: Journal) -> Reply:
    last = journal.last(request.id)
    assert last is not None, f"no reply to {request.id}: the engine left a request out"
    return last[0]


def build_check(check: Check, sample_id: str, plan: RequestPlan) -> Request:
    """Return the request of a check, without images."""
    if check.caption is None:
        fields, shared_digest = plan.fields(ANSWER, question=check.question)
    else:
        fields, shared_digest = plan.fields(COVERS, question=check.question, caption=check.caption)
    request_id = digest({"image": sample_id if check.pages != () else None, "pages": check.pages, "about": shared_digest})
    return Request(id=request_id, sample_id=sample_id, style=check.kind, pages=check.pages, **fields)


def build_all(
    batches: Iterable[SampleBatch], checks_of_sample: Mapping[str, Sequence[Check]], plan: RequestPlan
) -> Iterator[tuple[list[Request], SampleBatch]]:
    """Yield the requests of all checks of each batch of samples; a request that several annotations share is yielded once."""
    built: set[str] = set()
    for samples in batches:
        new: dict[str, Request] = {}
        for sample_id in samples.ids:
            for check in checks_of_sample.get(sample_id, ()):
                request = build_check(check, sample_id, plan)
                if request.id not in built:
                    new[request.id] = request
        built |= new.keys()
        yield list(new.values()), samples


def read_checks(sample_id: str, checks: Iterable[Check], plan: RequestPlan, journal: Journal) -> list[dict[str, str | None]]:
    """Return the checks of a sample with their answers (tables.CHECK); the answer is None if the reply is unreadable."""
    rows = []
    for check in checks:
        request = build_check(check, sample_id, plan)
        read = parse_reply(request, _last_reply(request, journal))[0]
        answer = None if read["reply_error"] else read["answer"]
        rows.append({"kind": check.kind, "question": check.question, "expected": check.expected, "answer": answer})
    return rows


def share_confirmed(checks: Iterable[Mapping[str, Any]], kind: str) -> float | None:
    """Return the share of checks (tables.CHECK) of a kind with the expected answer; None if no reply could be read.

    A question that expects no is one check with the question about the same claim before it.
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
    return _plain(check["answer"]) == _plain(check["expected"])


def _plain(answer: str) -> str:
    """Return a normalized answer; yes and no of any language in English."""
    answer = answer.rstrip(SENTENCE_ENDS)
    normal = normalize_answer(answer)
    return f"-{normalize_answer(answer.strip()[1:])}" if is_negative(answer) else YES_OR_NO.get(normal, normal)
