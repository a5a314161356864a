"""What the cells of an experiment say together: means, intervals, and whether two arms differ.

Shapes: S seeds, I test images, R draws of the bootstrap.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.store import read_json
from trainer.checkpoint import read_log
from trainer.experiment.cells import Run
from trainer.experiment.grid import FACTORS
from trainer.experiment.slices import SLICES, slice_scores
from trainer.metrics import cider_d, tokenize

DRAWS = 2000
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arm:
    """All seeds of one place in the grid."""

    key: tuple[str, ...]  # the values of FACTORS
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
        """Return its key in words, without what is as usual."""
        data, encoder, decoder, alignment, images = self.key
        encoder, decoder = Path(encoder).name, Path(decoder).name  # of a folder its last part
        aligned = {"none": "", "connector": ", connector first", "contrast": ", connector first, contrast"}[alignment]
        return f"{data}, {encoder}, {decoder}{aligned}{f', {images} images' if images != '0' else ''}"


def read_arms(runs: list[Run]) -> list[Arm]:
    """Return the arms of finished runs, in the order of the grid."""
    of_arm: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        of_arm[run.cell.arm].append(run)
    return [_read_arm(key, mine) for key, mine in of_arm.items()]


def _read_arm(key: tuple[str, ...], runs: list[Run]) -> Arm:
    told = [[json.loads(line) for line in (r.folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()] for r in runs]
    references = tuple(tuple(about["references"]) for about in told[0])
    tokens = [[reference.split(" ") for reference in mine] for mine in references]
    lengths = [round(float(np.mean([len(reference) for reference in mine]))) for mine in tokens]
    return Arm(
        key=key,
        seeds=tuple(run.cell.seed for run in runs),
        sample_ids=tuple(about["sample_id"] for about in told[0]),
        references=references,
        captions=tuple(tuple(about["caption"] for about in mine) for mine in told),
        cider_d_SI=np.array([[about["cider_d"] for about in mine] for mine in told]),
        shuffled_SI=np.array([[about["shuffled_cider_d"] for about in mine] for mine in told]),
        matched_SI=np.array(
            [cider_d([tokenize(a["caption"])[:n] for a, n in zip(mine, lengths, strict=True)], tokens) for mine in told]
        ),
        metrics=tuple(read_json(run.folder / "metrics.json") for run in runs),
        curves=tuple(read_log(run.folder / "log.jsonl") for run in runs),
    )


def interval(scores_SI: Scores, other_SI: Scores | None = None) -> tuple[float, float]:
    """Return the 95 % interval of a mean over seeds and images, or of how far it lies above another one.

    By a bootstrap of two levels: images are drawn with replacement, for both alike since they were scored on the same ones, and
    seeds for each of the two. With one seed, nothing is known of how much another would change.
    """
    rng = np.random.default_rng(0)
    images_RI = rng.integers(scores_SI.shape[1], size=(DRAWS, scores_SI.shape[1]))

    def drawn_R(values_SI: Scores) -> Scores:
        seeds_RS = rng.integers(len(values_SI), size=(DRAWS, len(values_SI)))
        return np.array([values_SI[s].mean(0)[i].mean() for s, i in zip(seeds_RS, images_RI, strict=True)])

    means_R = drawn_R(scores_SI) - (drawn_R(other_SI) if other_SI is not None else 0.0)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """Return what the interval of a difference allows to say."""
    return "better" if low > 0 else "worse" if high < 0 else "cannot tell at this size"


def compare(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return how each arm differs from the one that has the first value of one factor and is like it in all else."""
    found = []
    first = {name: list(dict.fromkeys(arm.key[at] for arm in arms)) for at, name in enumerate(FACTORS)}
    known = {arm.key: arm for arm in arms}
    for at, factor in enumerate(FACTORS):
        for arm in arms:
            base = known.get((*arm.key[:at], first[factor][0], *arm.key[at + 1 :]))
            if base is None or base is arm:
                continue
            mine, theirs = arm.cider_d_SI, base.cider_d_SI
            low, high = interval(mine, theirs)
            matched = interval(arm.matched_SI, base.matched_SI)
            found.append(
                {
                    "factor": factor,
                    "arm": arm.name,
                    "than": base.name,
                    "difference": float(mine.mean() - theirs.mean()),
                    "interval": [low, high],
                    "verdict": verdict(low, high),
                    "length_matched_difference": float(arm.matched_SI.mean() - base.matched_SI.mean()),
                    "length_matched_verdict": verdict(*matched),
                    "seeds": [len(arm.seeds), len(base.seeds)],
                }
            )
    return found


def summarise(arm: Arm, images: int, words: int) -> dict[str, Any]:
    """Return the row of an arm, which learned from so many images and words of captions."""
    questions = {
        kind: {name: float(np.mean([m["questions"][kind][name] for m in arm.metrics])) for name in ("accuracy", "majority")}
        for kind in arm.metrics[0].get("questions", {})
    }
    references = [[reference.split(" ") for reference in mine] for mine in arm.references]
    sliced = [slice_scores([tokenize(text) for text in mine], references) for mine in arm.captions]
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
        "length_matched_cider_d": float(arm.matched_SI.mean()),
        "bleu_4": float(np.mean([m["scores"]["bleu_4"] for m in arm.metrics])),
        "rouge_l": float(np.mean([m["scores"]["rouge_l"] for m in arm.metrics])),
        "mean_words": float(np.mean([m["words"]["mean"] for m in arm.metrics])),
        "words_of_references": float(np.mean([m["words"]["of_references"] for m in arm.metrics])),
        "slices": {name: _mean([each[name] for each in sliced]) for name in SLICES},
        "questions": questions,
    }


def examples(arms: Sequence[Arm], count: int) -> list[dict[str, Any]]:
    """Return the images that the arms caption most differently, half of them, and then others, with what each arm says."""
    scores_AI = np.stack([arm.cider_d_SI[0] for arm in arms])
    order = np.argsort(-(scores_AI.max(0) - scores_AI.min(0)), kind="stable")
    rest = np.setdiff1d(np.arange(scores_AI.shape[1]), order[: count // 2])
    chosen = [*order[: count // 2].tolist(), *rest[:: max(1, len(rest) // max(1, count - count // 2))].tolist()][:count]
    return [
        {
            "sample_id": arms[0].sample_ids[at],
            "references": list(arms[0].references[at]),
            "said": [
                {"arm": arm.name, "caption": arm.captions[0][at], "cider_d": float(arm.cider_d_SI[0, at])} for arm in arms
            ],
        }
        for at in chosen
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
