"""Audit a version: draw texts at random, and estimate the share of wrong texts from human verdicts.

Hashes of a seed draw and order the texts of each stratum (a task and style). Reviewers may stop at any time,
because a review counts only if all earlier texts of its stratum are reviewed too.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from itertools import chain, takewhile
from typing import Any

import pyarrow as pa

from pipeline.dataset.reviews import TextName, Verdict, record_name, text_name
from pipeline.dataset.statistics import percent, wilson_interval
from pipeline.digests import hash_to_unit

COLUMNS = ("sample_id", "captions", "qa")
MAX_TEXTS = 5000  # per stratum
# A stratum is a task and a style, which is "" for a task without styles.
Stratum = tuple[str, str]
NOT_MEASURED = "not measured (`synth review sample` draws texts to review)"


@dataclass(frozen=True, slots=True, order=True)
class Drawn:
    """A text to review, and its position in `order`. `weight` is proportional to the texts it represents."""

    order: float
    name: TextName
    weight: int


@dataclass(slots=True)
class Frame:
    """The number of texts of each stratum, and the texts to review, in order."""

    seed: int
    texts: Counter[Stratum] = field(default_factory=Counter)
    drawn: dict[Stratum, list[Drawn]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, tables: Iterable[pa.Table | pa.RecordBatch], own: Mapping[str, Any], seed: int) -> "Frame":
        """Read rows of a version. `own` has the columns of its custom tasks, as in the manifest."""
        frame = cls(seed)
        for table in tables:
            for row in table.to_pylist():
                frame._add(row["sample_id"], list(named_texts(row, own)))
        frame.drawn = {stratum: nsmallest(MAX_TEXTS, drawn) for stratum, drawn in frame.drawn.items()}
        return frame

    def _add(self, sample_id: str, texts: Sequence[tuple[Stratum, TextName]]) -> None:
        counts = Counter(stratum for stratum, _ in texts)
        self.texts += counts
        if counts:
            stratum = min(counts, key=lambda stratum: hash_to_unit(self.seed, sample_id, *stratum))
            names = (name for other, name in texts if other == stratum)
            name = min(names, key=lambda name: hash_to_unit(self.seed, *name))
            order = hash_to_unit(self.seed, sample_id)
            drawn = self.drawn[stratum]
            drawn.append(Drawn(order, name, weight=len(counts) * counts[stratum]))
            if len(drawn) >= 2 * MAX_TEXTS:
                drawn[:] = nsmallest(MAX_TEXTS, drawn)

    def first(self, number: int) -> list[TextName]:
        """Return at most `number` texts, taking one from each stratum in turn."""
        chosen: list[tuple[int, Stratum, TextName]] = []
        by_size = sorted(self.drawn, key=lambda stratum: (len(self.drawn[stratum]), stratum))
        for n, stratum in enumerate(by_size):
            quota = (number - len(chosen)) // (len(by_size) - n)
            chosen += [(place, stratum, text.name) for place, text in enumerate(self.drawn[stratum][:quota])]
        return [name for _, _, name in sorted(chosen)]


def named_texts(row: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[Stratum, TextName]]:
    """Yield the stratum and the name of each text in a row of a version. See `Frame.of` for `own`."""
    for caption in row.get("captions") or ():
        yield ("captions", caption["style"] or ""), text_name(caption | {"sample_id": row["sample_id"]})
    for pair in row.get("qa") or ():
        yield ("questions", ""), text_name(pair | {"sample_id": row["sample_id"]})
    for task, column in own.items():
        values = row[task] or [] if column["is_list"] else [row[task]]
        for value in values:
            if value is not None:
                yield (task, ""), record_name(row["sample_id"], task, value)


@dataclass(slots=True)
class _Rate:
    """The share of wrong texts in a stratum (`wrong`), and its effective sample size (`trials`)."""

    texts: int
    reviewed: int
    cannot_tell: int
    wrong: float
    trials: float

    @classmethod
    def of(cls, texts: int, reviewed: Sequence[Drawn], wrong_shares: Mapping[TextName, float]) -> "_Rate":
        shares = {text: wrong_shares[text.name] for text in reviewed if text.name in wrong_shares}
        total = sum(text.weight for text in shares)
        wrong = sum(text.weight * share for text, share in shares.items()) / max(1, total)
        # Unequal weights widen the interval, so use the smaller of two effective sample sizes: Kish's, or
        # that of the linearized variance.
        trials = total**2 / max(1, sum(text.weight**2 for text in shares))
        squares = sum((text.weight * (share - wrong)) ** 2 for text, share in shares.items())
        if squares:
            trials = min(trials, wrong * (1 - wrong) * total**2 / squares)
        return cls(texts, len(reviewed), len(reviewed) - len(shares), wrong, trials)


def estimate_errors(frame: Frame, verdicts: Collection[Verdict]) -> dict[str, Any]:
    """Return the shares of wrong texts with 95 % intervals, by task and style, for the manifest.

    A text with several verdicts counts with the share of reviewers who found it wrong. `agreement` is
    Krippendorff's alpha, or null without texts that two reviewers judged.
    """
    by_text: dict[TextName, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.seed == frame.seed:
            by_text[verdict.name].append(verdict)
    shares = wrong_shares(chain(*by_text.values()))
    rates: dict[Stratum, _Rate] = {}
    used: list[list[Verdict]] = []
    for stratum in sorted(frame.texts):
        reviewed = list(takewhile(lambda text: text.name in by_text, frame.drawn.get(stratum, [])))
        used += [by_text[text.name] for text in reviewed]
        rates[stratum] = _Rate.of(frame.texts[stratum], reviewed, shares)
    clear = [[v.verdict for v in verdicts if v.verdict != "cannot_tell"] for verdicts in used]
    alpha = krippendorff_alpha(clear)
    entries = []
    for task in dict.fromkeys(task for task, _ in rates):
        of_task = {style: rate for (other, style), rate in rates.items() if other == task}
        if len(of_task) > 1:
            entries.append(_describe(task, "", list(of_task.values())))
        entries += [_describe(task, style, [rate]) for style, rate in of_task.items()]
    return {
        "seed": frame.seed,
        "reviewed": len(used),
        "reviewers": len({verdict.reviewer for verdicts in used for verdict in verdicts}),
        "agreement": None if alpha is None else round(alpha, 2),
        "rates": entries,
    }


def wrong_shares(verdicts: Iterable[Verdict]) -> dict[TextName, float]:
    """Return the share of reviewers who found a text wrong, for each text judged as right or wrong."""
    votes: dict[TextName, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.verdict != "cannot_tell":
            votes[verdict.name].append(verdict.verdict == "wrong")
    return {name: sum(of_text) / len(of_text) for name, of_text in votes.items()}


def _describe(task: str, style: str, rates: Sequence[_Rate]) -> dict[str, Any]:
    summed = ("texts", "reviewed", "cannot_tell")
    counts = {name: sum(getattr(rate, name) for rate in rates) for name in summed}
    entry: dict[str, Any] = {"task": task, "style": style, **counts, "wrong": None}
    if measured := [rate for rate in rates if rate.trials]:
        share, low, high = combine_rates([(rate.texts, rate.wrong, rate.trials) for rate in measured])
        # In a style without verdicts, the share of wrong texts may be any number from 0 to 1.
        unknown = 1 - sum(rate.texts for rate in measured) / counts["texts"]
        low, high = (1 - unknown) * low, (1 - unknown) * high + unknown
        entry |= {"wrong": round(share, 4), "low": round(low, 4), "high": round(high, 4)}
    return entry


def combine_rates(strata: Sequence[tuple[int, float, float]]) -> tuple[float, float, float]:
    """Return the mean share over strata, weighted by their texts, with its 95 % Wilson interval.

    Strata are (texts, share, trials). The interval is that of a simple random sample with the same variance.
    """
    texts = sum(count for count, _, _ in strata)
    weights = [count / texts for count, _, _ in strata]
    share = sum(weight * share for weight, (_, share, _) in zip(weights, strata, strict=True))
    # Without smoothing, the variance of a small sample without errors would be 0.
    smooth = [(share * trials + 1) / (trials + 2) for _, share, trials in strata]
    mean = sum(weight * value for weight, value in zip(weights, smooth, strict=True))
    parts = zip(weights, smooth, strata, strict=True)
    variance = sum(weight**2 * value * (1 - value) / trials for weight, value, (_, _, trials) in parts)
    trials = mean * (1 - mean) / variance
    return share, *wilson_interval(share * trials, trials)


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Return Krippendorff's alpha of nominal ratings by unit, or None if all ratings are equal."""
    totals: Counter[str] = Counter()
    disagreement = 0.0
    for counts in (Counter(ratings) for ratings in units if len(ratings) > 1):
        totals += counts
        disagreement += _unequal_pairs(counts) / (counts.total() - 1)
    expected = _unequal_pairs(totals) / max(1, totals.total() - 1)
    return 1 - disagreement / expected if expected else None


def _unequal_pairs(counts: Counter[str]) -> int:
    return counts.total() ** 2 - sum(count**2 for count in counts.values())


def audit_in_words(audit: Mapping[str, Any] | None) -> str:
    """Return the shares of wrong texts by task, such as `4.1 % of captions are wrong [2.1, 7.2], ...`."""
    rates = [
        f"{percent(rate['wrong'])} % of {rate['task']} are wrong "
        f"[{percent(rate['low'])}, {percent(rate['high'])}], {rate['reviewed']} reviewed"
        for rate in whole_tasks(audit)
        if rate["wrong"] is not None
    ]
    if not audit or not rates:
        return NOT_MEASURED
    reviewers = f"{audit['reviewers']} reviewer{'s' if audit['reviewers'] > 1 else ''}"
    agreement = "" if audit["agreement"] is None else f", agreement {audit['agreement']:.2f}"
    return f"{'; '.join(rates)}; by {reviewers}{agreement}"


def whole_tasks(audit: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the rate of each task, over all its styles."""
    rates: list[Mapping[str, Any]] = audit["rates"] if audit else []
    return list({rate["task"]: rate for rate in reversed(rates)}.values())[::-1]
