"""Stage: verify. Is it true of *this* image? What was asked again is joined to the rows before; here it is only judged.

A check that was not asked for, or whose reply could not be read, rejects nothing.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.answers import normalize_answer
from pipeline.config import VerifyConfig
from pipeline.tables import VERIFIED, require, with_reason
from pipeline.texts import text_key

GUESSED = ("yes", "no")  # one of two is right by luck: blind says nothing about these, and balance sees to them


def verify_annotations(table: pa.Table, config: VerifyConfig) -> pa.Table:
    """Return the same rows with what follows from their `checks` and `alignment` (tables.VERIFIED), and a `reason`."""
    wanted = ("task", "style", "clean_question", "clean_answer", "answer_type", "checks", "alignment")
    require(table, *wanted)
    rows = table.select(wanted).to_pylist()
    found = [_judge(row) for row in rows]
    lowest, guessable, lucky = _lowest(rows, config), _guessable(rows, config), _lucky(rows, config)
    reasons = [_reason(row, judged, lowest, guessable, lucky, config) for row, judged in zip(rows, found, strict=True)]
    columns = pa.Table.from_pylist(found, schema=VERIFIED)
    for name in VERIFIED.names:
        table = table.append_column(name, columns[name])
    return with_reason(table, reasons)


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


def _guessable(rows: Sequence[dict[str, Any]], config: VerifyConfig) -> set[tuple[str, str]]:
    """Return the (question, answer) pairs that need no image: of all images asked the same, most have this answer."""
    pairs = Counter(_asked(row) for row in rows if row["clean_question"] is not None)
    times = Counter[str]()
    for (question, _), count in pairs.items():
        times[question] += count
    return {
        (question, answer)
        for (question, answer), count in pairs.items()
        if answer not in GUESSED and count >= config.min_blind_share * times[question]
    }


def _lucky(rows: Sequence[dict[str, Any]], config: VerifyConfig) -> set[tuple[str, str]]:
    """Return the (type, answer) pairs that others of that type often have: who says so without the pages may only have luck."""
    pairs = Counter(_answered(row) for row in rows if row["clean_answer"] is not None)
    times = Counter[str]()
    for (kind, _), count in pairs.items():
        times[kind] += count
    often = {pair for pair, count in pairs.items() if count - 1 > config.max_luck * (times[pair[0]] - 1)}
    return often | {(kind, answer) for kind in times for answer in GUESSED}


def _answered(row: dict[str, Any]) -> tuple[str, str]:
    return row["answer_type"] or "", normalize_answer(row["clean_answer"] or "")


def _asked(row: dict[str, Any]) -> tuple[str, str]:
    return text_key(row["clean_question"]), normalize_answer(row["clean_answer"])


def _lowest(rows: Sequence[dict[str, Any]], config: VerifyConfig) -> dict[str, float]:
    """Return the least alignment that a caption of each style must have."""
    floor = -1.0 if config.min_alignment is None else config.min_alignment
    lowest: dict[str, float] = {}
    for style in {row["style"] for row in rows}:
        scores = sorted(row["alignment"] for row in rows if row["style"] == style and row["alignment"] is not None)
        lowest[style] = max(floor, scores[int(len(scores) * config.lowest_alignment_frac)]) if scores else floor
    return lowest
