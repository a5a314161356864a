"""Statistics of the rows of a version, for the manifest and the card."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from math import log2, sqrt
from typing import Any

from pipeline.dataset.content import Content
from pipeline.tables import HUMAN, ROW, SCORE_NAMES
from pipeline.tasks.checks import REPAIR

Z = 1.96
MAX_LABELS, MAX_LABEL_CHARACTERS = 50, 100


@dataclass(slots=True)
class DatasetStatistics:
    """Counts and means over rows without pixels."""

    captions: dict[str, Content] = field(default_factory=lambda: defaultdict(Content))  # by style
    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    score_counts: Counter[str] = field(default_factory=Counter)
    score_totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    repaired_captions: int = 0
    human_captions: int = 0
    human_questions: int = 0
    images_by_task: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of a version."""
        for row in rows:
            for caption in row["captions"]:
                self.captions[caption["style"]].add(caption["text"], row["sample_id"])
                self.repaired_captions += caption["prompt_id"].startswith(f"{REPAIR.name}/")
                self.human_captions += HUMAN in (caption["prompt_id"], caption["style"])
            self.human_questions += sum(pair["prompt_id"] == HUMAN for pair in row["qa"])
            for pair in row["qa"]:
                self.answers[pair["answer_type"] or "other"][pair["answer"].lower()] += 1
            for annotation in (*row["captions"], *row["qa"]):
                for name in SCORE_NAMES:
                    # Captions with refuted claims were rejected, so their mean precision would be misleading.
                    if annotation.get(name) is not None and name != "precision":
                        self.score_counts[name] += 1
                        self.score_totals[name] += annotation[name]
            for task in row.keys() - {*ROW.names, "split"}:
                value = row[task]
                self.images_by_task[task] += value not in (None, [])
                for item in value if isinstance(value, list) else ():
                    label = item.get("label") if isinstance(item, dict) else item
                    if isinstance(label, str) and len(label) <= MAX_LABEL_CHARACTERS:
                        self.labels[task][label] += 1

    def result(self, language: str | None = None) -> dict[str, Any]:
        """Return all statistics that have data, by name. `language` is that of the captions, if known."""
        parts: dict[str, Any] = {
            "captions": {style: one.result(language) for style, one in sorted(self.captions.items())},
            "answers": {kind: _summarize_answers(counts) for kind, counts in sorted(self.answers.items())},
            "scores": {
                name: {"mean": round(self.score_totals[name] / count, 4), "count": count}
                for name, count in sorted(self.score_counts.items())
            },
            "repaired_captions": self.repaired_captions,
            "human_captions": self.human_captions,
            "human_questions": self.human_questions,
            "custom_tasks": {
                task: {"images": images, "labels": dict(self.labels[task].most_common(MAX_LABELS))}
                for task, images in sorted(self.images_by_task.items())
            },
        }
        return {name: part for name, part in parts.items() if part}


def merge(left: Any, right: Any) -> Any:
    """Return the sum of two statistics, computed field by field."""
    if is_dataclass(left):
        kind: Any = type(left)
        return kind(*(merge(getattr(left, item.name), getattr(right, item.name)) for item in fields(left)))
    if isinstance(left, dict) and not isinstance(left, Counter):
        sums = {name: merge(left[name], value) if name in left else value for name, value in right.items()}
        return left | sums
    return left + right


def _summarize_answers(counts: Counter[str]) -> dict[str, Any]:
    answer, times = min(counts.items(), key=lambda item: (-item[1], item[0]))
    total = counts.total()
    entropy = -sum(count / total * log2(count / total) for count in sorted(counts.values()))
    share = round(times / total, 4)
    return {"count": total, "most_common": answer, "share": share, "entropy_bits": round(abs(entropy), 4)}


def percent(share: float, digits: int = 1) -> str:
    """Return a share in percent, without the percent sign."""
    return f"{100 * float(share):.{digits}f}"


def wilson_interval(hits: float, trials: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, which is valid even for small counts."""
    if trials == 0:
        return 0.0, 1.0
    share, spread = hits / trials, Z**2 / trials
    center = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, center - half), min(1.0, center + half)
