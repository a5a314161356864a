"""What the cells of an experiment say together: means, intervals, and whether two arms differ.

Shapes: S seeds, I test images, R draws of the bootstrap.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.storage.files import read_json
from trainer.checkpoint import read_log
from trainer.experiment.grid import FACTORS
from trainer.experiment.runs import Run
from trainer.experiment.slices import SLICES, slice_scores
from trainer.metrics import cider_d, tokenize

DRAWS = 2000
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arm:
    """All seeds of one place in the grid; images are in the order of their ids."""

    key: tuple[str, ...]  # the values of FACTORS, and settings that are not those of the first grid
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
        data, encoder, decoder, alignment, images, otherwise = self.key
        encoder, decoder = Path(encoder).name, Path(decoder).name  # of a folder its last part
        aligned = {"none": "", "connector": ", connector first", "contrast": ", connector first, contrast"}[alignment]
        more = (f"{images} images" if images != "0" else "", otherwise)
        return f"{data}, {encoder}, {decoder}{aligned}" + "".join(f", {words}" for words in more if words)


def read_arms(runs: list[Run]) -> list[Arm]:
    """Return the arms of finished runs, in the order of the grid."""
    of_arm: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        of_arm[run.cell.arm].append(run)
    arms = [_read_arm(key, mine) for key, mine in of_arm.items()]
    assert all(arm.sample_ids == arms[0].sample_ids for arm in arms), "arms were not scored on the same images"
    return arms


def _read_arm(key: tuple[str, ...], runs: list[Run]) -> Arm:
    lines = [(run.folder / "captions.jsonl").read_text(encoding="utf-8").split("\n") for run in runs]
    told = [sorted((json.loads(line) for line in mine if line), key=lambda about: about["sample_id"]) for mine in lines]
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
    seeds for each of the two. Means of S drawn seeds have (S - 1) / S of the variance that they should, so they are spread.
    With one seed, nothing is known of how much another would change.
    """
    rng = np.random.default_rng(0)
    images_RI = rng.integers(scores_SI.shape[1], size=(DRAWS, scores_SI.shape[1]))

    def drawn_R(values_SI: Scores) -> Scores:
        seeds = len(values_SI)
        mean_I, spread = values_SI.mean(0), np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
        seeds_RS = rng.integers(seeds, size=(DRAWS, seeds))
        drawn = (mean_I + spread * (values_SI[s].mean(0) - mean_I) for s in seeds_RS)
        return np.array([values_I[i].mean() for values_I, i in zip(drawn, images_RI, strict=True)])

    means_R = drawn_R(scores_SI) - (drawn_R(other_SI) if other_SI is not None else 0.0)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


def verdict(low: float, high: float, seeds: int = 2) -> str:
    """Return what the interval of a difference allows to say, of arms that have so many seeds at least."""
    found = "better" if low > 0 else "worse" if high < 0 else "cannot tell at this size"
    return f"{found} with this seed" if seeds == 1 and found in ("better", "worse") else found


def compare(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return how every two arms differ that are alike in all but one factor; the later one of the grid beside the earlier."""
    found = []
    for at, factor in enumerate(FACTORS):
        for base, arm in itertools.combinations(arms, 2):
            if base.key[at] == arm.key[at] or base.key[:at] + base.key[at + 1 :] != arm.key[:at] + arm.key[at + 1 :]:
                continue
            mine, theirs, seeds = arm.cider_d_SI, base.cider_d_SI, min(len(arm.seeds), len(base.seeds))
            low, high = interval(mine, theirs)
            found.append(
                {
                    "factor": factor,
                    "arm": arm.name,
                    "than": base.name,
                    "difference": float(mine.mean() - theirs.mean()),
                    "interval": [low, high],
                    "verdict": verdict(low, high, seeds),
                    "length_matched_difference": float(arm.matched_SI.mean() - base.matched_SI.mean()),
                    "length_matched_verdict": verdict(*interval(arm.matched_SI, base.matched_SI), seeds),
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
