"""Audit a version: draw texts by the verdict of the checks, and estimate error rates from human verdicts.

The strata are the findings of the automatic checks about a text. Hashes of a seed order the texts of each
stratum, and every text has the same chance. Reviewers may stop at any time, because a verdict counts only if
all earlier texts of its stratum have verdicts too. Texts that remain in a later version keep their verdicts.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.error_rates import NO_ERROR, TAIL, Estimate, Floats, Stratum
from pipeline.dataset.reviews import TextName, Verdict, text_name
from pipeline.dataset.statistics import percent
from pipeline.digests import hash_to_unit
from pipeline.storage.files import read_batches
from pipeline.tables import FINAL
from pipeline.tasks.checks import REFUTED

MAX_TEXTS = 5000  # per stratum
# A kind of text is a task and a style, which is "" for a task without styles.
Kind = tuple[str, str]
# The findings of the checks about a text. Rejected texts are not in the version.
REJECTED, FLAGGED, PASSED, UNCHECKED = "rejected", "flagged", "passed", "unchecked"
SUSPECT = (REJECTED, FLAGGED)
SUSPECT_FRAC = 1 / 3  # share of the audit
CLEANED = ("text", "question", "answer", "record")
CHECKED = ("agreement", "evidence", "judged_wrong")
TEXTS = ("sample_id", "task", "style", *(f"clean_{name}" for name in CLEANED))
MAX_REVIEWER_ERROR = 0.1
MIN_WRONG = 3  # Lines about a kind of error need this many wrong texts in the sample.
# The files of steps with texts, their further columns, and the finding if all texts have the same one.
SOURCES = (
    ("review", "kept", (*CHECKED, "review", *FINAL.names), ""),
    ("review", "rejected", CHECKED, ""),
    ("verify", "rejected", (), REJECTED),
)
NOT_MEASURED = "not measured (`synth review` draws texts to review)"


@dataclass(frozen=True, slots=True, order=True)
class Drawn:
    """A text to review, and its position in `order`. A text may have left the version after its review."""

    order: float
    name: TextName
    kind: Kind
    is_kept: bool


@dataclass(slots=True)
class Frame:
    """The number of texts by finding and kind, and the texts to review by finding, in order."""

    seed: int
    texts: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    drawn: dict[str, list[Drawn]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, shards: Iterable[DatasetDir], seed: int) -> "Frame":
        """Read the texts of the newest run, and those that checks or reviewers rejected."""
        frame = cls(seed)
        for shard in shards:
            for step, which, more, finding in SOURCES:
                for path in shard.step_files(step, which):
                    for table in read_batches(path, [*TEXTS, *more]):
                        frame.add(table, finding, is_kept=which == "kept" or step == "verify")
        return frame

    def add(self, table: pa.Table, finding: str = "", *, is_kept: bool = True) -> None:
        """Add annotations after the review step, or those that the verify step rejected."""
        for row in table.to_pylist():
            found, review = finding or _finding(row), row.get("review") or {}
            if review.get("verdict") == "edited":
                # The text before the edit was drawn by the finding, and the new text was not checked.
                self._add(found, {name: row[name] for name in TEXTS}, is_kept=False)
                found = UNCHECKED
            self._add(found, row, is_kept=is_kept)
        self.drawn.update({finding: nsmallest(MAX_TEXTS, drawn) for finding, drawn in self.drawn.items()})

    def _add(self, finding: str, row: Mapping[str, Any], *, is_kept: bool) -> None:
        name, kind = text_name(dict(row)), _kind_of(row)
        self.texts[finding, kind] += is_kept
        self.drawn[finding].append(Drawn(hash_to_unit(self.seed, *name), name, kind, is_kept))

    def first(self, number: int) -> list[TextName]:
        """Return at most `number` texts, a third of them from texts that the checks rejected or flagged.

        The other texts come from all other strata in proportion to their sizes. The first texts of the result
        are a smaller sample with the same shares.
        """
        texts = {
            finding: list(dict.fromkeys(text.name for text in drawn if text.is_kept))
            for finding, drawn in self.drawn.items()
        }
        quotas, sizes = dict.fromkeys(texts, 0), {finding: self.size(finding) for finding in texts}
        suspect, others = dict.fromkeys(SUSPECT, 1), {one: sizes[one] for one in texts if one not in SUSPECT}
        for weights, limit in ((suspect, round(number * SUSPECT_FRAC)), (others, number), (suspect, number)):
            # Each text goes to the stratum that has the fewest texts for its weight.
            while sum(quotas.values()) < limit:
                rest = [one for one in quotas if one in weights and quotas[one] < len(texts[one])]
                if not rest:
                    break
                quotas[min(rest, key=lambda one: (quotas[one] + 1) / weights[one])] += 1
        places = (
            ((place + 0.5) / quotas[finding], name)
            for finding, names in texts.items()
            for place, name in enumerate(names[: quotas[finding]])
        )
        return [name for _, name in sorted(places)]

    def size(self, finding: str) -> int:
        """Return the number of texts of a stratum."""
        return sum(count for (other, _), count in self.texts.items() if other == finding)


def _finding(row: Mapping[str, Any]) -> str:
    if row["agreement"] is None and row["judged_wrong"] is None:
        return UNCHECKED
    is_unconfirmed = row["agreement"] is not None and row["agreement"] < 1
    is_refuted = row["evidence"] is not None and row["evidence"] >= REFUTED
    return FLAGGED if row["judged_wrong"] or is_unconfirmed or is_refuted else PASSED


def _kind_of(row: Mapping[str, Any]) -> Kind:
    if row["clean_record"] is not None:
        return row["task"], ""
    return ("captions", row["style"] or "") if row["clean_text"] is not None else ("questions", "")


@dataclass(frozen=True, slots=True)
class Reviewed:
    """A reviewed text: the finding of the checks, and the numbers of verdicts "wrong" and "right".

    `error` is the kind of error that most reviewers named, or None if most judged the text as right.
    """

    finding: str
    kind: Kind
    is_kept: bool
    votes: tuple[int, int]
    error: str | None


def read_reviewed(frame: Frame, verdicts: Iterable[Verdict]) -> list[Reviewed]:
    """Return the texts of each stratum before its first text without a verdict."""
    by_text: dict[TextName, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.seed == frame.seed:
            by_text[verdict.name].append(verdict)
    reviewed = []
    for finding, drawn in frame.drawn.items():
        # Texts that left the version need no verdict.
        for text in takewhile(lambda text: not text.is_kept or text.name in by_text, dict.fromkeys(drawn)):
            if of_text := by_text.get(text.name):
                found = Counter(verdict.verdict for verdict in of_text)
                kinds: list[str] = sorted(one.error for one in of_text if one.verdict == "wrong")
                error = max(kinds, key=kinds.count) if found["wrong"] > found["right"] else None
                votes = found["wrong"], found["right"]
                reviewed.append(Reviewed(finding, text.kind, text.is_kept, votes, error))
    return reviewed


def estimate_errors(frame: Frame, verdicts: Collection[Verdict]) -> dict[str, Any]:
    """Return the shares of wrong texts with 95 % intervals, for the manifest.

    `version` is about the texts of the version, `rejected` about texts that the checks rejected, and `rates`
    about each task and style of the version. `found` has the share of wrong texts that the checks rejected or
    flagged, by kind of error.
    """
    reviewed = read_reviewed(frame, verdicts)
    findings = sorted({finding for finding, _ in frame.texts})
    kept = [finding for finding in findings if finding != REJECTED]
    kinds = sorted({kind for (finding, kind), texts in frame.texts.items() if finding in kept and texts})
    repeats = [text.votes for text in reviewed if sum(text.votes) > 1]
    error = Estimate.of(_strata(frame, reviewed, findings)).error
    low, middle, high = np.quantile(error, (TAIL, 0.5, 1 - TAIL))
    return {
        "seed": frame.seed,
        "reviewed": sum(text.is_kept for text in reviewed),
        "reviewers": len({verdict.reviewer for verdict in verdicts if verdict.seed == frame.seed}),
        "repeated": len(repeats),
        "differing": sum(wrong > 0 and right > 0 for wrong, right in repeats),
        "reviewer_error": _rounded(share=float(middle), low=float(low), high=float(high)),
        "version": describe_rate(frame, reviewed, kept),
        "rejected": describe_rate(frame, reviewed, [REJECTED]),
        "rates": [
            {"task": kind[0], "style": kind[1], **describe_rate(frame, reviewed, kept, kind)}
            for kind in kinds
        ],
        "found": list(_describe_found(frame, reviewed, findings)),
    }


def _strata(
    frame: Frame, reviewed: Iterable[Reviewed], findings: Collection[str], kind: Kind | None = None
) -> list[Stratum]:
    """Return strata of the texts with these findings and this kind. Strata of all others have no texts.

    The latter are evidence about the errors of reviewers.
    """

    def is_inside(finding: str, other: Kind) -> bool:
        return finding in findings and kind in (None, other)

    strata: dict[tuple[str, bool], Stratum] = defaultdict(lambda: Stratum(0))
    for (finding, other), texts in frame.texts.items():
        if is_inside(finding, other):
            strata[finding, True].texts += texts
    for one in reviewed:
        if any(one.votes):
            stratum = strata[one.finding, is_inside(one.finding, one.kind)]
            (stratum.votes if one.is_kept else stratum.removed)[one.votes] += 1
    return [strata[key] for key in sorted(strata)]


def describe_rate(
    frame: Frame, reviewed: Collection[Reviewed], findings: Collection[str], kind: Kind | None = None
) -> dict[str, Any]:
    """Return the share of wrong texts among those with some findings, and of one kind or of all kinds."""
    strata = _strata(frame, reviewed, findings, kind)
    texts = sum(stratum.texts for stratum in strata)
    inside = [one for one in reviewed if one.is_kept and one.finding in findings and kind in (None, one.kind)]
    clear = sum(any(one.votes) for one in inside)
    entry = {"texts": texts, "reviewed": len(inside), "cannot_tell": len(inside) - clear, "wrong": None}
    if not clear:
        return entry
    estimate = Estimate.of(strata)
    sizes = np.array([stratum.texts for stratum in strata]) / texts
    evidence = [stratum.votes + stratum.removed for stratum in strata]
    measured = sizes * [votes.total() > 0 for votes in evidence]
    low, high = estimate.interval(lambda shares: np.asarray(sizes @ shares))
    if not any(wrong for size, votes in zip(sizes, evidence, strict=True) if size for wrong, _ in votes):
        low = 0.0
    share = min(max(float(estimate.likely @ measured / measured.sum()), low), high)
    return entry | _rounded(wrong=share, low=low, high=high)


def _describe_found(
    frame: Frame, reviewed: Iterable[Reviewed], findings: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the share of wrong texts that the checks rejected or flagged: of all errors and of each kind."""
    is_suspect = np.array([finding in SUSPECT for finding in findings])
    sizes = np.array([[frame.size(finding)] for finding in findings])
    clear = [one for one in reviewed if any(one.votes) and one.is_kept]
    named = sorted({one.error for one in clear if one.error is not None})

    def found(shares: Floats) -> Floats:
        wrong = sizes * shares
        return np.asarray(wrong[is_suspect].sum(0) / wrong.sum(0))

    for name in ["all", *named] if named and is_suspect.any() else []:
        strata = {finding: Stratum(frame.size(finding)) for finding in findings}
        for one in clear:
            is_wrong = one.error is not None and name in ("all", one.error)
            strata[one.finding].votes[int(is_wrong), int(not is_wrong)] += 1
        estimate = Estimate.of([*strata.values()], NO_ERROR)
        low, high = estimate.central_interval(found)
        share = float(found(estimate.likely[:, None])[0])
        wrong = {finding: stratum.votes[1, 0] for finding, stratum in strata.items()}
        yield {
            "error": name,
            "wrong_texts": sum(wrong.values()),
            "found_texts": sum(wrong.get(finding, 0) for finding in SUSPECT),
            **_rounded(share=share, low=min(low, share), high=max(high, share)),
        }


def _rounded(**values: float) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def wrong_shares(verdicts: Iterable[Verdict]) -> dict[TextName, float]:
    """Return the share of verdicts "wrong" for each text that was judged as right or wrong."""
    votes: dict[TextName, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.verdict != "cannot_tell":
            votes[verdict.name].append(verdict.verdict == "wrong")
    return {name: sum(of_text) / len(of_text) for name, of_text in votes.items()}


def audit_in_words(audit: Mapping[str, Any] | None) -> list[str]:
    """Return lines about the version, rejected texts, reviewers, and the errors that the checks find.

    The first line has the error rate, such as `4.1 % [2.1, 7.2] of the 900 texts ... are wrong`.
    """
    if not audit or audit["version"]["wrong"] is None:
        return [NOT_MEASURED]
    lines = [_rate_in_words(audit["version"], "texts of the version")]
    if audit["rejected"]["wrong"] is not None:
        lines.append(_rate_in_words(audit["rejected"], "texts that the checks rejected"))
    error, repeated = audit["reviewer_error"], audit["repeated"]
    if repeated:
        line = f"{audit['differing']} of {repeated} texts that were judged twice have different verdicts"
        high = "; this is too high, so read the texts again" if error["share"] > MAX_REVIEWER_ERROR else ""
        lines.append(f"{line}: {_interval(error)} of the verdicts are wrong{high}")
    else:
        lines.append(
            f"no text was judged twice, so {_interval(error)} of the verdicts are assumed to be wrong"
        )
    for found in audit["found"]:
        if found["wrong_texts"] < MIN_WRONG:
            continue
        kinds = {"all": "wrong texts", "text": "misread texts", "other": "texts with another error"}
        texts = kinds.get(found["error"], f"texts with a wrong {found['error']}")
        seen = f"{found['found_texts']} of {found['wrong_texts']} in the sample"
        blind = "; they do not see most of these errors" if found["high"] < 0.5 else ""
        lines.append(f"the checks find {_interval(found)} of {texts} ({seen}){blind}")
    return lines


def _rate_in_words(rate: Mapping[str, Any], texts: str) -> str:
    return (
        f"{_interval(rate, 'wrong')} of the {rate['texts']:,} {texts} are wrong ({rate['reviewed']} reviewed)"
    )


def _interval(rate: Mapping[str, Any], name: str = "share") -> str:
    return f"{percent(rate[name])} % [{percent(rate['low'])}, {percent(rate['high'])}]"
