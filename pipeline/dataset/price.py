"""Compute the cost of a version's texts in tokens and money, per kept text and per correct text.

Tokens of all attempts count. A reply that several images use counts for each of them. The share of correct
texts comes from an audit.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from pipeline.config.sections import Servers, cost_of
from pipeline.tasks import Tasks
from pipeline.tasks.checks import CHECKING
from pipeline.types import UNITS

CAPTIONS, QUESTIONS, CHECKS = "captions", "questions", ""
_HUMAN = {CAPTIONS: "human_captions", QUESTIONS: "human_questions"}
Entry = Mapping[str, Any]


def describe_price(
    spent: Mapping[str, int], measured: Mapping[str, Any], tasks: Tasks, servers: Servers
) -> list[dict[str, Any]]:
    """Return the price for the manifest: an entry for each kind of text, and one for all checks.

    `spent` has requests and tokens by TASK.MODEL.UNIT (Journal.spent), and `measured` the statistics of the
    rows. In an entry, `kept` is the number of kept model texts, or of images with a value of a custom task.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, model in sorted({(*key.split(".")[:2],) for key in spent}):
        kind = _kind_of(name, tasks)
        if kind in _HUMAN:
            parts = measured.get("captions" if kind == CAPTIONS else "answers", {}).values()
            kept = sum(part["count"] for part in parts) - measured.get(_HUMAN[kind], 0)
        else:
            kept = measured.get("custom_tasks", {}).get(kind, {"images": 0})["images"]
        entry = entries.setdefault(kind, {"texts": kind, "kept": kept})
        amounts = {unit: spent[f"{name}.{model}.{unit}"] for unit in UNITS}
        cost = cost_of({model: (amounts["prompt_tokens"], amounts["reply_tokens"])}, servers)
        for unit, amount in (amounts | ({} if cost is None else {"cost": cost})).items():
            entry[unit] = entry.get(unit, 0) + amount
    return [entries[kind] for kind in sorted(entries, reverse=True)]


def _kind_of(name: str, tasks: Tasks) -> str:
    """Return the kind of texts that a task writes: captions, questions, or the column of a custom task."""
    task = tasks[name]
    if task in CHECKING:
        return CHECKS
    if task.text_field:
        return CAPTIONS
    return QUESTIONS if "question" in task.row.model_fields else name


def price_in_words(manifest: Mapping[str, Any], asking_s: float = 0.0) -> list[str]:
    """Return a line for each kind of text, and one for all texts with their checks.

    `asking_s` is the time that all requests took.
    """
    entries: list[Entry] = manifest.get("price", [])
    lines = [f"{one['texts']}: {_amounts_in_words([one], manifest)}" for one in entries if one["kept"]]
    kept = sum(entry["kept"] for entry in entries)
    if len(entries) > 1 and kept:
        checks = " with their checks" if any(entry["texts"] == CHECKS for entry in entries) else ""
        lines.append(f"all texts{checks}: {_amounts_in_words(entries, manifest)}")
    if asking_s and kept:
        lines.append(f"all requests in this folder: {_plain(asking_s / kept)} s per kept text")
    return lines


def _amounts_in_words(entries: list[Entry], manifest: Mapping[str, Any]) -> str:
    kept = sum(entry["kept"] for entry in entries)
    tokens = sum(entry["prompt_tokens"] + entry["reply_tokens"] for entry in entries)
    cost = sum(entry.get("cost", 0.0) for entry in entries)
    words = f"{_rate(tokens, cost, kept)} per kept text ({kept:,} kept)"
    numbers = [(entry["kept"], _right_share(entry["texts"], manifest)) for entry in entries if entry["kept"]]
    measured = [(number, share) for number, share in numbers if share]
    right, low, high = (sum(number * share[n] for number, share in measured) for n in range(3))
    if len(measured) < len(numbers) or not right or not high:
        problem = "per correct text: not measured" if len(measured) < len(numbers) else "no correct text"
        return f"{words}; {problem}"
    bounds = f"[{tokens / high:,.0f}, {f'{tokens / low:,.0f}' if low else 'no upper bound'}]"
    return f"{words}; {_rate(tokens, cost, right)} per correct text, tokens {bounds} (audit)"


def _rate(tokens: int, cost: float, number: float) -> str:
    return f"{tokens / number:,.0f} tokens{f', cost {_plain(cost / number)}' if cost else ''}"


def _plain(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    return f"{Decimal(f'{value:.3g}'):,f}"


def _right_share(kind: str, manifest: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return the share of correct texts of a kind and its 95 % interval, or None if not measured.

    The estimates cover all texts, so nothing is known about the texts of a model if human texts were kept.
    """
    if manifest["measured"].get(_HUMAN.get(kind, "")):
        return None
    rates = [rate for rate in (manifest.get("audit") or {"rates": []})["rates"] if rate["task"] == kind]
    texts = sum(rate["texts"] for rate in rates)
    if not texts or any(rate["wrong"] is None for rate in rates):
        return None
    wrong, low, high = (
        sum(rate["texts"] * rate[name] for rate in rates) / texts for name in ("wrong", "low", "high")
    )
    return 1 - wrong, 1 - high, 1 - low
