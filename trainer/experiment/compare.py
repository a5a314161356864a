"""Compare the arms of an experiment: means, confidence intervals and verdicts.

Shapes: A arms, S seeds, I test images, R bootstrap draws.
"""

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
from trainer.runtime.training_state import read_log

# 97.5 % quantile of Student's t distribution by degrees of freedom.
STUDENT_T = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042,
    math.inf: 1.96,
}  # fmt: skip
DRAWS = 2000
UNDECIDED = "cannot tell at this size"
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arm:
    """The results of all seeds of one grid point. Images are sorted by id.

    `key` holds the values of FACTORS. `captions` holds one tuple per seed.
    """

    key: tuple[str, ...]
    seeds: tuple[int, ...]
    sample_ids: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    captions: tuple[tuple[str, ...], ...]
    cider_d_SI: Scores
    shuffled_SI: Scores
    metrics: tuple[dict[str, Any], ...]
    curves: tuple[list[dict[str, Any]], ...]

    @property
    def name(self) -> str:
        """A readable form of the key, without default values."""
        data, encoder, decoder, images = self.key
        sizes = "" if images == "0" else f"{images} images"
        parts = (data, Path(encoder).name, Path(decoder).name, sizes)
        return ", ".join(part for part in parts if part)


def read_arms(runs: list[Run]) -> list[Arm]:
    """Read the arms of finished runs, in grid order."""
    runs_by_arm: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        runs_by_arm[run.cell.arm].append(run)
    arms = [_read_arm(key, arm_runs) for key, arm_runs in runs_by_arm.items()]
    assert all(arm.sample_ids == arms[0].sample_ids for arm in arms), (
        "arms were not scored on the same images"
    )
    return arms


def _read_captions(run: Run) -> list[dict[str, Any]]:
    with (run.folder / "captions.jsonl").open(encoding="utf-8") as lines:
        return sorted(map(json.loads, lines), key=lambda row: row["sample_id"])


def _read_arm(key: tuple[str, ...], runs: list[Run]) -> Arm:
    rows = [_read_captions(run) for run in runs]
    return Arm(
        key=key,
        seeds=tuple(run.cell.seed for run in runs),
        sample_ids=tuple(row["sample_id"] for row in rows[0]),
        references=tuple(tuple(row["references"]) for row in rows[0]),
        captions=tuple(tuple(row["caption"] for row in seed_rows) for seed_rows in rows),
        cider_d_SI=np.array([[row["cider_d"] for row in seed_rows] for seed_rows in rows]),
        shuffled_SI=np.array([[row["shuffled_cider_d"] for row in seed_rows] for seed_rows in rows]),
        metrics=tuple(read_json(run.folder / "metrics.json") for run in runs),
        curves=tuple(read_log(run.folder / "log.jsonl") for run in runs),
    )


def interval(scores_SI: Scores, base_SI: Scores | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds and images, or of its difference from `base_SI`'s mean.

    This is a two-level bootstrap. Images are drawn with replacement, the same ones for both arms, and seeds
    are drawn separately for each arm. Means of S drawn seeds have only (S - 1) / S of the true variance, so
    their deviations are rescaled. The deviations are also widened by Student's t with the degrees of freedom
    of Welch (1947), because a variance from few seeds is uncertain. A single seed adds no variance.
    """
    widening = _student_factor([scores_SI] if base_SI is None else [scores_SI, base_SI])
    rng = np.random.default_rng(0)
    images_RI = rng.integers(scores_SI.shape[1], size=(DRAWS, scores_SI.shape[1]))

    def draw_means_R(values_SI: Scores) -> Scores:
        S = len(values_SI)
        mean_I, spread = values_SI.mean(0), widening * np.sqrt(S / (S - 1)) if S > 1 else 1.0
        seeds_RS = rng.integers(S, size=(DRAWS, S))
        draws = (mean_I + spread * (values_SI[seeds_S].mean(0) - mean_I) for seeds_S in seeds_RS)
        return np.array(
            [values_I[images_I].mean() for values_I, images_I in zip(draws, images_RI, strict=True)]
        )

    means_R = draw_means_R(scores_SI)
    if base_SI is not None:
        means_R = means_R - draw_means_R(base_SI)
    low, high = np.quantile(means_R, [0.025, 0.975])
    # Rescaled draws may fall below the lowest possible score.
    minimum = 0.0 if base_SI is None else -np.inf
    return max(float(low), minimum), max(float(high), minimum)


def _student_factor(arms: Sequence[Scores]) -> float:
    """Return the quantile of Student's t for these arms, divided by that of the normal distribution."""
    several = [scores_SI for scores_SI in arms if len(scores_SI) > 1]
    variances = np.array([scores_SI.mean(1).var(ddof=1) / len(scores_SI) for scores_SI in several])
    if not variances.sum():
        return 1.0
    freedoms = np.array([len(scores_SI) - 1 for scores_SI in several])
    freedom = variances.sum() ** 2 / (variances**2 / freedoms).sum()
    inverse = [-1 / degrees for degrees in STUDENT_T]
    return float(np.interp(-1 / freedom, inverse, list(STUDENT_T.values()))) / STUDENT_T[math.inf]


def verdict(low: float, high: float, seeds: int = 2) -> str:
    """Return the verdict for a difference's interval. `seeds`: the seed count of the arm with fewer seeds."""
    if low <= 0 <= high:
        return UNDECIDED
    return ("better" if low > 0 else "worse") + (" with this seed" if seeds == 1 else "")


def compare(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Compare all pairs of arms that differ in exactly one factor, as the later arm minus the earlier one."""
    differences = []
    for n, factor in enumerate(FACTORS):
        for base, arm in itertools.combinations(arms, 2):
            if [i for i, pair in enumerate(zip(base.key, arm.key, strict=True)) if pair[0] != pair[1]] != [n]:
                continue
            seeds = [len(arm.seeds), len(base.seeds)]
            low, high = interval(arm.cider_d_SI, base.cider_d_SI)
            differences.append(
                {
                    "factor": factor,
                    "arm": arm.name,
                    "than": base.name,
                    "difference": float(arm.cider_d_SI.mean() - base.cider_d_SI.mean()),
                    "interval": [low, high],
                    "verdict": verdict(low, high, min(seeds)),
                    "seeds": seeds,
                }
            )
    return differences


def summarize(arm: Arm, images: int, words: int) -> dict[str, Any]:
    """Return the result row for an arm. `images` and `words` are the sizes of its training data."""

    questions: dict[str, dict[str, float]] = {}
    for kind in arm.metrics[0].get("questions", {}):
        scores = [m["questions"][kind] for m in arm.metrics]
        questions[kind] = {
            name: float(np.mean([score[name] for score in scores])) for name in ("accuracy", "majority")
        }
    return {
        "name": arm.name,
        **dict(zip(FACTORS, arm.key, strict=True)),
        "seeds": list(arm.seeds),
        "train_images_learned": images,
        "caption_words_learned": words,
        "images": len(arm.sample_ids),
        "cider_d": float(arm.cider_d_SI.mean()),
        "interval": list(interval(arm.cider_d_SI)),
        "of_seeds": [round(float(value), 4) for value in arm.cider_d_SI.mean(1)],
        "shuffled_cider_d": float(arm.shuffled_SI.mean()),
        "bleu_4": float(np.mean([m["scores"]["bleu_4"] for m in arm.metrics])),
        "rouge_l": float(np.mean([m["scores"]["rouge_l"] for m in arm.metrics])),
        "mean_words": float(np.mean([m["words"]["mean"] for m in arm.metrics])),
        "words_of_references": float(np.mean([m["words"]["of_references"] for m in arm.metrics])),
        "questions": questions,
    }


def examples(arms: Sequence[Arm], count: int) -> list[dict[str, Any]]:
    """Return `count` images with each arm's captions. Half of them have the largest score differences."""
    scores_AI = np.stack([arm.cider_d_SI[0] for arm in arms])
    most_different = np.argsort(-np.ptp(scores_AI, axis=0), kind="stable")[: count // 2]
    rest = np.setdiff1d(np.arange(scores_AI.shape[1]), most_different)
    step = max(1, len(rest) // max(1, count - count // 2))
    chosen = [*most_different.tolist(), *rest[::step].tolist()][:count]
    return [
        {
            "sample_id": arms[0].sample_ids[n],
            "references": list(arms[0].references[n]),
            "captions": [
                {"arm": arm.name, "caption": arm.captions[0][n], "cider_d": float(arm.cider_d_SI[0, n])}
                for arm in arms
            ],
        }
        for n in chosen
    ]
