"""Measure how often a check errs, and correct its findings by these errors.

The verify step also applies a check to human captions, which are true, and to false texts: captions of other
images, and claims in which one word was replaced. Claims about one image are not independent, so intervals
are computed from an effective number of claims.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import chain, groupby
from math import sqrt
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.dataset.statistics import Z, percent, wilson_interval
from pipeline.digests import hash_to_unit
from pipeline.tables import HUMAN
from pipeline.tasks.checks import MAX_EVIDENCE, REFUTED

CLAIMS, JUDGE = "claims", "judge"
# Texts of this kind are known to be true.
TRUE = "reference"
# A claim is refuted if the evidence against it is at least the chosen level, which is one of these.
LEVELS = range(REFUTED, MAX_EVIDENCE + 1)
NEVER = MAX_EVIDENCE + 1
FINDINGS = ("sample_id", "prompt_id", "claim_evidence", "judged_wrong", "calibration")
# If the errors of a check add up to 1 - MIN_GAIN or more, no corrected share is stated.
MIN_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class KnownTexts:
    """Human captions of a sample, which count as true, and a caption of another sample, which is false."""

    captions: tuple[str, ...]
    foreign: str | None


def choose_known_texts(samples: Iterable[pa.RecordBatch], number: int, seed: int) -> dict[str, KnownTexts]:
    """Return the known texts of the `number` samples with the smallest hashes, by sample id."""
    rows = (row for batch in samples for row in batch.to_pylist())
    chosen = nsmallest(number, rows, key=lambda row: hash_to_unit(seed, row["sample_id"]))
    others = [*chosen[1:], *chosen[:1]] if len(chosen) > 1 else [{"references": []}]
    return {
        row["sample_id"]: KnownTexts(tuple(row["references"]), next(iter(other["references"]), None))
        for row, other in zip(chosen, others, strict=False)
    }


# This counts the images by the evidence against each of their claims.
Evidence = Counter[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Share:
    """The share `value` of `count` claims. `trials` is the effective number of claims."""

    count: int
    value: float
    trials: float

    @classmethod
    def of(cls, hits: Any, counts: Any, images: Any = 1) -> "Share":
        """Return the share of hits among claims, from arrays.

        Each element stands for `images` images. Each of them has `hits` hits among `counts` claims.
        """
        n = int(np.sum(counts * images))
        value = float(np.sum(hits * images)) / max(1, n)
        # The linearized variance of a ratio of sums over clusters (Cochran, Sampling Techniques, 6.3).
        variance = float(np.sum((hits - value * counts) ** 2 * images)) / max(1, n) ** 2
        return cls(n, value, min(n, value * (1 - value) / variance) if variance > 0 else n)

    @property
    def rest(self) -> "Share":
        """The complement of this share: 1 - `value`."""
        return replace(self, value=1 - self.value)

    def describe(self) -> dict[str, Any]:
        """Return the share with its interval."""
        low, high = self.interval
        return {"count": self.count, **_rounded(share=self.value, low=low, high=high)}

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        return wilson_interval(self.value * self.trials, self.trials)


def share_refuted(evidence: Evidence, level: int) -> Share:
    """Return the share of claims with at least this evidence against them."""
    hits = [sum(against >= level for against in claims) for claims in evidence]
    return Share.of(*map(np.array, (hits, [len(claims) for claims in evidence], [*evidence.values()])))


@dataclass(slots=True)
class Findings:
    """The findings of one check about known texts, by their kind, and about the texts of the dataset.

    `claims` counts captions by their number of claims. `by_model` counts the checked texts of models.
    """

    known: dict[str, Evidence] = field(default_factory=lambda: defaultdict(Counter))
    found: Evidence = field(default_factory=Counter)
    claims: Counter[int] = field(default_factory=Counter)
    by_model: int = 0

    def alarms(self, level: int) -> Share | None:
        """Return the share of true texts that are refuted, or None if no texts are known to be true."""
        return share_refuted(self.known[TRUE], level) if TRUE in self.known else None

    def missed(self, level: int) -> Share:
        """Return the share of false texts that are not refuted."""
        return share_refuted(sum((self.known[kind] for kind in self.falsehoods), Counter()), level).rest

    @property
    def falsehoods(self) -> list[str]:
        """The kinds of false texts."""
        return sorted(self.known.keys() - {TRUE})

    def lost_share(self, level: int) -> float | None:
        """Estimate the share of true captions in which a claim is refuted, assuming independent errors.

        Returns None if no texts are known to be true, or if no claims were checked.
        """
        if level == NEVER:
            return 0.0
        alarms = self.alarms(level)
        return self._lost(alarms.value) if alarms and self.claims else None

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
        alarms = self.alarms(MAX_EVIDENCE)
        return NEVER if alarms and self._lost(alarms.interval[0]) > max_lost else MAX_EVIDENCE

    def describe(self, level: int) -> dict[str, Any]:
        """Return the errors of the check, and the corrected share of true texts before any rejection."""
        shown = min(level, MAX_EVIDENCE)  # NEVER itself has no errors to describe
        found, alarms, missed = share_refuted(self.found, shown).rest, self.alarms(shown), self.missed(shown)
        lost = self.lost_share(level)
        return {
            "min_evidence": level,
            "lost": None if lost is None else round(lost, 4),
            "passed": found.describe(),
            "true": correct_share(found, alarms, missed),
            "false_alarms": alarms.describe() if alarms else None,
            "missed": missed.describe() if missed.count else None,
            "kinds": {k: share_refuted(self.known[k], shown).rest.describe() for k in self.falsehoods},
        }


def read_findings(tables: Iterable[pa.Table]) -> dict[str, Findings]:
    """Read the findings of each check from rows of the verify step. Rows of one image must be adjacent."""
    findings = {CLAIMS: Findings(), JUDGE: Findings()}
    rows = (row for table in tables for row in table.select(FINDINGS).to_pylist())
    for _, group in groupby(rows, itemgetter("sample_id")):
        of_image = list(group)
        known: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row in of_image:
            if row["claim_evidence"]:
                findings[CLAIMS].claims[len(row["claim_evidence"])] += 1
            for text in row["calibration"] or ():
                known[text["check"], text["kind"]].append(text["evidence"])
        for check, one in findings.items():
            # Collect the evidence against human texts (False) and model texts (True). Human captions of an
            # image with model texts are left out, because they serve as texts known to be true.
            evidence: dict[bool, list[list[int]]] = {False: [], True: []}
            for row in of_image:
                if against := row["claim_evidence"] if check == CLAIMS else _judged(row["judged_wrong"]):
                    evidence[row["prompt_id"] != HUMAN].append(against)
            one.by_model += len(evidence[True])
            if texts := evidence[True] or evidence[False]:
                one.found[tuple(chain(*texts))] += 1
        for (check, kind), against in known.items():
            findings[check].known[kind][tuple(against)] += 1
    return {check: one for check, one in findings.items() if one.found.total()}


def _judged(is_wrong: Any) -> list[int]:
    return [] if is_wrong is None else [MAX_EVIDENCE if is_wrong else -MAX_EVIDENCE]


def correct_share(found: Share, alarms: Share | None, missed: Share) -> dict[str, Any] | None:
    """Return the share of true texts with its 95 % interval, from the share that the check did not refute.

    The share is (passed - missed) / (1 - alarms - missed), by Rogan and Gladen (1978), with the interval of
    Lang and Reiczigel (2014). Without `alarms`, returns only a lower bound. Returns None if nothing was
    measured, or if the check does not distinguish true from false texts.
    """
    if not missed.count or not found.count:
        return None
    alarm, true_trials = (alarms.value, alarms.trials) if alarms else (0.0, float("inf"))
    if alarm + missed.value >= 1 - MIN_GAIN:
        return None
    share = min(1.0, max(0.0, (found.value - missed.value) / (1 - alarm - missed.value)))
    # Add pseudo-counts, since a check without errors in a small sample may still have errors.
    n, true_n, false_n = found.trials + Z**2, true_trials + 2, missed.trials + 2
    passed = (found.value * found.trials + Z**2 / 2) / n
    hits = ((1 - alarm) * true_trials + 1) / true_n if alarms else 1.0
    refuted = ((1 - missed.value) * missed.trials + 1) / false_n
    gain = hits + refuted - 1
    if gain <= MIN_GAIN:
        return None
    center = (passed + refuted - 1) / gain
    of_hits, of_refuted = hits * (1 - hits) / true_n, refuted * (1 - refuted) / false_n
    variance = passed * (1 - passed) / n + center**2 * of_hits + (1 - center) ** 2 * of_refuted
    middle = center + 2 * Z**2 * (center * of_hits - (1 - center) * of_refuted)
    half = Z * sqrt(variance) / gain
    low, high = (min(1.0, max(0.0, bound)) for bound in (middle - half, middle + half))
    if alarms is None:
        return {"share": None, **_rounded(low=min(low, share), high=1.0)}
    return _rounded(share=share, low=min(low, share), high=max(high, share))


def _rounded(**values: float) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in values.items()}


def checks_in_words(manifest: Mapping[str, Any]) -> list[str]:
    """Return lines with the errors of each check, and the number of texts that its condition skipped."""
    lines = [
        f"{check['check']}: {_true_in_words(check)}; {_errors_in_words(check)}"
        + (f"; {manifest['model']['name']} judges its own texts" if check["judges_itself"] else "")
        for check in manifest.get("checks", [])
    ]
    for check, counts in manifest.get("skipped_checks", {}).items():
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
        lines.append(f"{check}: skipped for {sum(counts.values()):,} texts ({reasons})")
    return lines


def _true_in_words(check: Mapping[str, Any]) -> str:
    unit, true = {CLAIMS: "claims of captions"}.get(check["check"], "texts"), check["true"]
    passed = f"{percent(check['passed']['share'])} % of {check['passed']['count']:,} {unit} passed"
    if true is None:
        return f"{passed}; the share of true {unit} is unknown"
    interval = f"[{percent(true['low'])}, {percent(true['high'])}]"
    if true["share"] is None:
        return f"{passed}; at least {percent(true['low'])} % are true, corrected for missed errors"
    return f"{passed}; {percent(true['share'])} % {interval} are true, corrected for the errors of the check"


def _errors_in_words(check: Mapping[str, Any]) -> str:
    parts = []
    for name, texts, verb in (("false_alarms", "true texts", "refuted"), ("missed", "false texts", "missed")):
        if rate := check[name]:
            interval = f"[{percent(rate['low'])}, {percent(rate['high'])}]"
            parts.append(f"{percent(rate['share'])} % {interval} of {rate['count']:,} {texts} were {verb}")
        else:
            parts.append(f"not measured on {texts}")
    if check["min_evidence"] == NEVER:
        parts.append("these are too many errors, so no text was rejected")
    elif check["check"] == CLAIMS and check["lost"] is not None:
        parts.append(f"so about {percent(check['lost'])} % of true captions are lost")
    return ", ".join(parts)
