"""Compare the arms of an experiment: means, intervals, verdicts. Shapes: S seeds, I test images, R draws of the bootstrap."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.storage.files import read_json
from trainer.experiment.grid import FACTORS
from trainer.experiment.runs import Run
from trainer.metrics import cider_d, tokenize
from trainer.runtime.training_state import read_log

# The 97.5 % point of Student's t by degrees of freedom, as in any table of it.
STUDENT_T = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042, math.inf: 1.96,
}  # fmt: skip
DRAWS = 2000
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arm:
    """All seeds of one grid point; images are sorted by id."""

    key: tuple[str, ...]  # the values of FACTORS, and settings that differ from the first grid
    seeds: tuple[int, ...]
    sample_ids: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    captions: tuple[tuple[str, ...], ...]  # of each seed
    cider_d_SI: Scores
    shuffled_SI: Scores
    matched_SI: Scores  # with captions cut to the length of the references
    metrics: tuple[dict[str, Any], ...]
    curves: tuple[list[dict[str, Any]], ...]

    @property
    def name(self) -> str:
        """Return the key in words, without default values."""
        data, encoder, decoder, alignment, images, overrides = self.key
        encoder, decoder = Path(encoder).name, Path(decoder).name  # the last part of a folder
        aligned = {"none": "", "connector": ", connector first", "contrast": ", connector first, contrast"}[alignment]
        extras = (f"{images} images" if images != "0" else "", overrides)
        return f"{data}, {encoder}, {decoder}{aligned}" + "".join(f", {extra}" for extra in extras if extra)


def read_arms(runs: list[Run]) -> list[Arm]:
    """Return the arms of finished runs, in the order of the grid."""
    runs_by_arm: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        runs_by_arm[run.cell.arm].append(run)
    arms = [_read_arm(key, arm_runs) for key, arm_runs in runs_by_arm.items()]
    assert all(arm.sample_ids == arms[0].sample_ids for arm in arms), "arms were not scored on the same images"
    return arms


def _read_arm(key: tuple[str, ...], runs: list[Run]) -> Arm:
    lines = [(run.folder / "captions.jsonl").read_text(encoding="utf-8").split("\n") for run in runs]
    rows = [sorted((json.loads(line) for line in group if line), key=lambda row: row["sample_id"]) for group in lines]
    references = tuple(tuple(row["references"]) for row in rows[0])
    tokens = [[reference.split(" ") for reference in group] for group in references]
    lengths = [round(float(np.mean([len(reference) for reference in group]))) for group in tokens]
    matched = [cider_d([tokenize(row["caption"])[:n] for row, n in zip(group, lengths, strict=True)], tokens) for group in rows]
    return Arm(
        key=key,
        seeds=tuple(run.cell.seed for run in runs),
        sample_ids=tuple(row["sample_id"] for row in rows[0]),
        references=references,
        captions=tuple(tuple(row["caption"] for row in group) for group in rows),
        cider_d_SI=np.array([[row["cider_d"] for row in group] for group in rows]),
        shuffled_SI=np.array([[row["shuffled_cider_d"] for row in group] for group in rows]),
        matched_SI=np.array(matched),
        metrics=tuple(read_json(run.folder / "metrics.json") for run in runs),
        curves=tuple(read_log(run.folder / "log.jsonl") for run in runs),
    )


def interval(scores_SI: Scores, other_SI: Scores | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a mean over seeds and images, or of its difference from another mean.

    Two-level bootstrap: images are drawn with replacement, the same for both arms, which were scored on the same images; seeds
    are drawn for each arm. Means of S drawn seeds have (S - 1) / S of the true variance, so they are rescaled; and since that
    variance is estimated from few seeds, by Student's t as well, with the degrees of freedom of Welch (1947). With one seed,
    the variance between seeds is unknown and not included.
    """
    widened = _student_factor([scores_SI] if other_SI is None else [scores_SI, other_SI])
    rng = np.random.default_rng(0)
    images_RI = rng.integers(scores_SI.shape[1], size=(DRAWS, scores_SI.shape[1]))

    def drawn_R(values_SI: Scores) -> Scores:
        seeds = len(values_SI)
        mean_I, spread = values_SI.mean(0), widened * np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
        seeds_RS = rng.integers(seeds, size=(DRAWS, seeds))
        drawn = (mean_I + spread * (values_SI[s].mean(0) - mean_I) for s in seeds_RS)
        return np.array([values_I[i].mean() for values_I, i in zip(drawn, images_RI, strict=True)])

    means_R = drawn_R(scores_SI) - (drawn_R(other_SI) if other_SI is not None else 0.0)
    low, high = np.quantile(means_R, [0.025, 0.975])
    lowest = 0.0 if other_SI is None else -np.inf  # rescaled draws may lie below any score
    return max(float(low), lowest), max(float(high), lowest)


def _student_factor(arms: Sequence[Scores]) -> float:
    """Return by how much Student's t is wider than the normal distribution, at 95 %, for the means of arms (seeds, images)."""
    variances = [float(scores_SI.mean(1).var(ddof=1)) / len(scores_SI) for scores_SI in arms if len(scores_SI) > 1]
    freedoms = [len(scores_SI) - 1 for scores_SI in arms if len(scores_SI) > 1]
    if not sum(variances):
        return 1.0
    freedom = sum(variances) ** 2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    known = sorted(STUDENT_T)
    return float(np.interp(-1 / freedom, [-1 / one for one in known], [STUDENT_T[one] for one in known])) / STUDENT_T[math.inf]


def verdict(low: float, high: float, seeds: int = 2) -> str:
    """Return the verdict that the interval of a difference supports; `seeds` is the smaller seed count of the two arms."""
    text = "better" if low > 0 else "worse" if high < 0 else "cannot tell at this size"
    return f"{text} with this seed" if seeds == 1 and text in ("better", "worse") else text


def compare(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return the difference of every two arms that differ in exactly one factor: later minus earlier in the grid."""
    differences = []
    for n, factor in enumerate(FACTORS):
        for base, arm in itertools.combinations(arms, 2):
            if base.key[n] == arm.key[n] or base.key[:n] + base.key[n + 1 :] != arm.key[:n] + arm.key[n + 1 :]:
                continue
            scores, base_scores, seeds = arm.cider_d_SI, base.cider_d_SI, min(len(arm.seeds), len(base.seeds))
            low, high = interval(scores, base_scores)
            differences.append(
                {
                    "factor": factor,
                    "arm": arm.name,
                    "than": base.name,
                    "difference": float(scores.mean() - base_scores.mean()),
                    "interval": [low, high],
                    "verdict": verdict(low, high, seeds),
                    "length_matched_difference": float(arm.matched_SI.mean() - base.matched_SI.mean()),
                    "length_matched_verdict": verdict(*interval(arm.matched_SI, base.matched_SI), seeds),
                    "seeds": [len(arm.seeds), len(base.seeds)],
                }
            )
    return differences


def summarise(arm: Arm, images: int, words: int) -> dict[str, Any]:
    """Return the result row of an arm that learned from this number of images and caption words."""
    questions = {
        kind: {name: float(np.mean([m["questions"][kind][name] for m in arm.metrics])) for name in ("accuracy", "majority")}
        for kind in arm.metrics[0].get("questions", {})
    }
    return {
        "name": arm.name,
        **dict(zip((*FACTORS, "otherwise"), arm.key, strict=True)),
        "seeds": list(arm.seeds),
        "train_images_learned": images,
        "caption_words_learned": words,
        "images": len(arm.sample_ids),
        "cider_d": float(arm.cider_d_SI.mean()),
        "interval": list(interval(arm.cider_d_SI)),
        "of_seeds": [round(float(value), 4) for value in arm.cider_d_SI.mean(1)],
        "shuffled_cider_d": float(arm.shuffled_SI.mean()),
        "length_matched_cider_d": float(arm.matched_SI.mean()),
        "bleu_4": float(np.mean([m["scores"]["bleu_4"] for m in arm.metrics])),
        "rouge_l": float(np.mean([m["scores"]["rouge_l"] for m in arm.metrics])),
        "mean_words": float(np.mean([m["words"]["mean"] for m in arm.metrics])),
        "words_of_references": float(np.mean([m["words"]["of_references"] for m in arm.metrics])),
        "questions": questions,
    }


def examples(arms: Sequence[Arm], count: int) -> list[dict[str, Any]]:
    """Return `count` images with the captions of each arm: half where the scores differ most, the rest spread evenly."""
    scores_AI = np.stack([arm.cider_d_SI[0] for arm in arms])
    order = np.argsort(-(scores_AI.max(0) - scores_AI.min(0)), kind="stable")
    rest = np.setdiff1d(np.arange(scores_AI.shape[1]), order[: count // 2])
    chosen = [*order[: count // 2].tolist(), *rest[:: max(1, len(rest) // max(1, count - count // 2))].tolist()][:count]
    return [
        {
            "sample_id": arms[0].sample_ids[index],
            "references": list(arms[0].references[index]),
            "said": [
                {"arm": arm.name, "caption": arm.captions[0][index], "cider_d": float(arm.cider_d_SI[0, index])} for arm in arms
            ],
        }
        for index in chosen
    ]
