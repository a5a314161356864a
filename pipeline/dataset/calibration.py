"""Measure how often the claims check refutes human captions, and choose the evidence that rejects a claim.

Human captions may be false, and a check may overlook a kind of error, so the findings of a check are no error
rate. An audit measures it (audit.py). Claims about one image are not independent, so bounds are computed from
an effective number of claims.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.statistics import percent, wilson_interval
from pipeline.digests import hash_to_unit
from pipeline.tables import HUMAN
from pipeline.tasks.checks import MAX_EVIDENCE, REFUTED

CLAIMS, JUDGE = "claims", "judge"
SELF = "checks its own texts, so it may overlook its own mistakes, which only an audit shows"
# A claim is refuted if the evidence against it is at least the chosen level, which is one of these.
LEVELS = range(REFUTED, MAX_EVIDENCE + 1)
NEVER = MAX_EVIDENCE + 1
FINDINGS = ("sample_id", "prompt_id", "claim_evidence", "judged_wrong", "reference_evidence")
# The stated range of true claims assumes that at most this share of the human claims is false, and that the
# check finds at least this share of the false claims. The range never ends in 100 % on both sides.
FALSE_REFERENCES, MIN_FOUND, MAX_LOW = 0.02, 0.5, 0.999


def choose_references(samples: Iterable[pa.RecordBatch], number: int, seed: int) -> dict[str, str]:
    """Return a human caption of `number` samples at random, by sample id."""
    rows = (row for batch in samples for row in batch.to_pylist() if row["references"])
    chosen = nsmallest(number, rows, key=lambda row: hash_to_unit(seed, row["sample_id"]))
    return {row["sample_id"]: row["references"][0] for row in chosen}


# This counts the images by the evidence against each of their claims.
Evidence = Counter[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Share:
    """The share `value` of `count` claims. `trials` is the effective number of claims."""

    count: int
    value: float
    trials: float

    @classmethod
    def of(cls, evidence: Evidence, level: int) -> "Share":
        """Return the share of claims with at least this evidence against them."""
        images = np.array([*evidence.values()])
        counts = np.array([len(claims) for claims in evidence])
        hits = np.array([sum(against >= level for against in claims) for claims in evidence])
        n = int(np.sum(counts * images))
        value = float(np.sum(hits * images)) / max(1, n)
        # The linearized variance of a ratio of sums over clusters (Cochran, Sampling Techniques, 6.3).
        variance = float(np.sum((hits - value * counts) ** 2 * images)) / max(1, n) ** 2
        return cls(n, value, min(n, value * (1 - value) / variance) if variance > 0 else n)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        return wilson_interval(self.value * self.trials, self.trials)

    def describe(self) -> dict[str, Any]:
        """Return the share and its number of claims."""
        return {"count": self.count, "share": round(self.value, 4)}


@dataclass(slots=True)
class Findings:
    """The findings of one check about human captions (`references`), and about the texts of the dataset.

    `claims` counts captions by their number of claims. `by_model` counts the checked texts of models.
    """

    references: Evidence = field(default_factory=Counter)
    found: Evidence = field(default_factory=Counter)
    claims: Counter[int] = field(default_factory=Counter)
    by_model: int = 0

    def lost_share(self, level: int) -> float | None:
        """Estimate the share of true captions in which a claim is refuted, assuming independent errors.

        Returns None if no references or no claims were checked.
        """
        if level == NEVER:
            return 0.0
        return self._lost(Share.of(self.references, level).value) if self.references and self.claims else None

    def _lost(self, alarm: float) -> float:
        lost = sum(count * (1 - (1 - alarm) ** claims) for claims, count in self.claims.items())
        return lost / self.claims.total()

    def choose_level(self, max_lost: float) -> int:
        """Return the lowest level of evidence at which at most the share `max_lost` of true captions is lost.

        If every level loses more, return the highest level. Return NEVER, at which no claim is refuted, if
        even the lower bound of the loss is too high there.
        """
        for level in LEVELS:
            if (self.lost_share(level) or 0.0) <= max_lost:
                return level
        low, _ = Share.of(self.references, MAX_EVIDENCE).interval
        return NEVER if self._lost(low) > max_lost else MAX_EVIDENCE

    def describe(self, level: int) -> dict[str, Any]:
        """Return the findings before any rejection, and the range of the share of true claims."""
        shown = min(level, MAX_EVIDENCE)  # NEVER itself has no errors to describe
        lost = self.lost_share(level)
        alarms = Share.of(self.references, shown).describe() if self.references else None
        return {
            "min_evidence": level,
            "lost": None if lost is None else round(lost, 4),
            "refuted": Share.of(self.found, shown).describe(),
            "range": self._range(),
            "false_alarms": alarms,
        }

    def _range(self) -> dict[str, float] | None:
        """Return the range of the share of true claims, or None if it cannot be computed from references.

        A check that refutes the share s of false claims and the share a of true claims refutes the share
        t a + (1 - t) s of all claims, if the share t is true. The range has all values of t with s from
        MIN_FOUND to 1 and up to FALSE_REFERENCES false references. The level with the highest s is used.
        """
        refuted, alarms = (Share.of(evidence, REFUTED) for evidence in (self.found, self.references))
        (low, high), (least, most) = refuted.interval, alarms.interval
        if not self.references or most >= MIN_FOUND:
            return None
        least = max(0.0, (least - FALSE_REFERENCES) / (1 - FALSE_REFERENCES))
        # Claims that were refuted may all be false, so the lower bound is at most the share that passed.
        worst = min(max(0.0, MIN_FOUND - high) / (MIN_FOUND - least), 1 - refuted.value, MAX_LOW)
        return {"low": round(worst, 4), "high": round(min(1.0, (1 - low) / (1 - most)), 4)}


def read_findings(tables: Iterable[pa.Table]) -> dict[str, Findings]:
    """Read the findings of each check from rows of the verify step. Rows of one image must be adjacent."""
    findings = {CLAIMS: Findings(), JUDGE: Findings()}
    rows = (row for table in tables for row in table.select(FINDINGS).to_pylist())
    for _, group in groupby(rows, itemgetter("sample_id")):
        of_image = list(group)
        for row in of_image:
            if row["claim_evidence"]:
                findings[CLAIMS].claims[len(row["claim_evidence"])] += 1
        if references := [one for row in of_image for one in row["reference_evidence"] or ()]:
            findings[CLAIMS].references[tuple(references)] += 1
        for check, one in findings.items():
            # Collect the evidence against human texts (False) and model texts (True). Human captions of an
            # image with model texts are left out, because they serve as references.
            evidence: dict[bool, list[list[int]]] = {False: [], True: []}
            for row in of_image:
                if against := row["claim_evidence"] if check == CLAIMS else _judged(row["judged_wrong"]):
                    evidence[row["prompt_id"] != HUMAN].append(against)
            one.by_model += len(evidence[True])
            if texts := evidence[True] or evidence[False]:
                one.found[tuple(chain(*texts))] += 1
    return {check: one for check, one in findings.items() if one.found.total()}


def _judged(is_wrong: Any) -> list[int]:
    return [] if is_wrong is None else [MAX_EVIDENCE if is_wrong else -MAX_EVIDENCE]


def checks_in_words(manifest: Mapping[str, Any]) -> list[str]:
    """Return lines with the findings of each check, and the number of texts that its condition skipped."""
    lines = [
        f"{check['check']}: {_findings_in_words(check)}"
        + (f"; {manifest['model']['name']} {SELF}" if check["judges_itself"] else "")
        for check in manifest.get("checks", [])
    ]
    for check, counts in manifest.get("skipped_checks", {}).items():
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        lines.append(f"{check}: skipped for {sum(counts.values()):,} texts ({reasons})")
    return lines


def _findings_in_words(check: Mapping[str, Any]) -> str:
    unit = "claims of captions" if check["check"] == CLAIMS else "texts"
    bounds, alarms = check["range"], check["false_alarms"]
    words = f"refuted {_share_in_words(check['refuted'])} {unit} before rejection"
    if alarms:
        words += f", and {_share_in_words(alarms)} claims of human captions"
    if check["min_evidence"] == NEVER:
        words += ", which is too many, so no text was rejected"
    elif alarms and check["lost"] is not None:
        words += f", so about {percent(check['lost'])} % of true captions are lost"
    if not bounds:
        return f"{words}; this is no error rate, since the check may overlook errors"
    false = f"if up to {percent(FALSE_REFERENCES, 0)} % of the claims of human captions are false"
    found = f"the check finds at least {percent(MIN_FOUND, 0)} % of the false claims"
    share = f"between {percent(bounds['low'])} and {percent(bounds['high'])} % were true"
    return f"{words}; {share} {false} and {found}"


def _share_in_words(share: Mapping[str, Any]) -> str:
    return f"{percent(share['share'])} % of {share['count']:,}"
