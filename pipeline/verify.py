"""Stage: verify. Is it true of *this* image? What was asked again is joined to the rows before; here it is only judged.

A check that was not asked for, or whose reply could not be read, rejects nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.answers import normalize_answer
from pipeline.config import VerifyConfig
from pipeline.tables import VERIFIED, require, with_reason
from pipeline.texts import text_key

_WANTED = ("task", "style", "clean_question", "clean_answer", "answer_type", "checks", "alignment")
GUESSED = ("yes", "no")  # one of two is right by luck: blind says nothing about these, and balance sees to them


@dataclass(slots=True)
class Usual:
    """What all rows together say, by which each one is judged; what parts of them say adds up (measure.added)."""

    asked: Counter[tuple[str, str]] = field(default_factory=Counter)  # question and answer
    answered: Counter[tuple[str, str]] = field(default_factory=Counter)  # type and answer
    alignments: dict[str, list[float]] = field(default_factory=dict)  # of captions, by style

    @classmethod
    def of(cls, table: pa.Table) -> "Usual":
        """Count rows."""
        require(table, *_WANTED)
        usual = cls()
        for row in table.select(_WANTED).to_pylist():
            if row["clean_question"] is not None:
                usual.asked[_asked(row)] += 1
                usual.answered[_answered(row)] += 1
            if row["alignment"] is not None:
                usual.alignments.setdefault(row["style"], []).append(row["alignment"])
        return usual

    def guessable(self, config: VerifyConfig) -> set[tuple[str, str]]:
        """Return the (question, answer) pairs that need no image: of all images asked the same, most have this answer."""
        times = _by_first(self.asked)
        return {
            (question, answer)
            for (question, answer), count in self.asked.items()
            if answer not in GUESSED and count >= config.min_blind_share * times[question]
        }

    def lucky(self, config: VerifyConfig) -> set[tuple[str, str]]:
        """Return the (type, answer) pairs that others of that type often have: who says so without the pages may have luck."""
        times = _by_first(self.answered)
        often = {pair for pair, count in self.answered.items() if count - 1 > config.max_luck * (times[pair[0]] - 1)}
        return often | {(kind, answer) for kind in times for answer in GUESSED}

    def lowest(self, config: VerifyConfig) -> dict[str, float]:
        """Return the least alignment that a caption of each style must have."""
        floor = -1.0 if config.min_alignment is None else config.min_alignment
        ordered = {style: sorted(scores) for style, scores in self.alignments.items()}
        return {style: max(floor, scores[int(len(scores) * config.lowest_alignment_frac)]) for style, scores in ordered.items()}


def verify_annotations(table: pa.Table, config: VerifyConfig, usual: Usual | None = None) -> pa.Table:
    """Return the same rows with what follows from their `checks` and `alignment` (tables.VERIFIED), and a `reason`.

    `usual` is what all rows say, where the table holds some of them only.
    """
    usual = usual or Usual.of(table)
    rows = table.select(_WANTED).to_pylist()
    found = [_judge(row) for row in rows]
    lowest, guessable, lucky = usual.lowest(config), usual.guessable(config), usual.lucky(config)
    reasons = [_reason(row, judged, lowest, guessable, lucky, config) for row, judged in zip(rows, found, strict=True)]
    columns = pa.Table.from_pylist(found, schema=VERIFIED)
    for name in VERIFIED.names:
        table = table.append_column(name, columns[name])
    return with_reason(table, reasons)


def _by_first(pairs: Counter[tuple[str, str]]) -> Counter[str]:
    times = Counter[str]()
    for (first, _), count in pairs.items():
        times[first] += count
    return times


def _judge(row: dict[str, Any]) -> dict[str, Any]:
    same = _whether(row["checks"], "necessary")
    return {
        "agreement": _share(row["checks"], "claims" if row["task"] == "caption" else "round_trip"),
        "blind": _whether(row["checks"], "blind"),
        "sufficient": _whether(row["checks"], "sufficient"),
        "necessary": None if same is None else not same,
    }


def _share(checks: Sequence[dict[str, str]], kind: str) -> float | None:
    agree = [_agrees(check) for check in checks if check["kind"] == kind and check["answer"] is not None]
    return sum(agree) / len(agree) if agree else None


def _whether(checks: Sequence[dict[str, str]], kind: str) -> bool | None:
    share = _share(checks, kind)
    return None if share is None else share == 1


def _agrees(check: dict[str, str]) -> bool:
    return normalize_answer(check["answer"]) == normalize_answer(check["expected"])


def _reason(
    row: dict[str, Any],
    judged: dict[str, Any],
    lowest: dict[str, float],
    guessable: set[tuple[str, str]],
    lucky: set[tuple[str, str]],
    config: VerifyConfig,
) -> str | None:
    agreement, is_caption = judged["agreement"], row["task"] == "caption"
    rules: Sequence[tuple[str, bool]] = (
        ("answer_not_confirmed", not is_caption and agreement is not None and agreement < 1),
        ("claims_not_confirmed", is_caption and agreement is not None and agreement < config.min_claims_supported),
        ("answerable_without_image", judged["blind"] is True and _asked(row) in guessable),
        ("evidence_not_sufficient", judged["sufficient"] is False),
        ("evidence_not_necessary", judged["necessary"] is False and _answered(row) not in lucky),
        ("low_alignment", row["alignment"] is not None and row["alignment"] < lowest[row["style"]]),
    )
    return next((reason for reason, broken in rules if broken), None)


def _answered(row: dict[str, Any]) -> tuple[str, str]:
    return row["answer_type"] or "", normalize_answer(row["clean_answer"] or "")


def _asked(row: dict[str, Any]) -> tuple[str, str]:
    return text_key(row["clean_question"]), normalize_answer(row["clean_answer"])
