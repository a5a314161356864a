"""Compare captioners trained with different data or settings. Intervals account for seeds and test images.

    python benchmarks/compare_captioners.py human=runs/h0,runs/h1,runs/h2 mixed=runs/m0,runs/m1,runs/m2

Each argument names an arm and its folders, one training per seed, all scored on the same test images. Prints
the CIDEr-D of each arm and the difference of each later arm from the first. The interval is a two-level
bootstrap: images are drawn with replacement, the same ones for both arms, and seeds separately for each arm.
With few seeds, the deviations between seeds are widened by Student's t.

Shapes: S seeds, I test images, R draws.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

DRAWS = 2000
# 97.5 % quantiles of Student's t distribution, divided by that of the normal distribution.
WIDENING = {1: 6.48, 2: 2.20, 3: 1.62, 4: 1.42, 5: 1.31, 6: 1.25, 7: 1.21, 8: 1.18, 9: 1.15}
Scores = npt.NDArray[np.float64]


def read_scores(folders: list[Path]) -> Scores:
    """Return the CIDEr-D of each seed and image: (S, I). Images are sorted by id."""
    rows = [
        sorted(
            map(json.loads, (folder / "captions.jsonl").read_text("utf-8").splitlines()),
            key=lambda row: row["sample_id"],
        )
        for folder in folders
    ]
    if len({tuple(row["sample_id"] for row in seed) for seed in rows}) > 1:
        raise SystemExit(f"{folders[0]} and the other folders were scored on different images")
    return np.array([[row["cider_d"] for row in seed] for seed in rows])


def draw_means(scores_SI: Scores, images_RI: npt.NDArray[np.int64], rng: np.random.Generator) -> Scores:
    """Return the mean score of each bootstrap sample: (R,)."""
    S, mean_I = len(scores_SI), scores_SI.mean(0)
    # The means of S sampled seeds have only (S - 1) / S of the true variance.
    spread = WIDENING.get(S - 1, 1.0) * np.sqrt(S / (S - 1)) if S > 1 else 0.0
    drawn_RI = mean_I + spread * (scores_SI[rng.integers(S, size=(len(images_RI), S))].mean(1) - mean_I)
    means_R: Scores = np.take_along_axis(drawn_RI, images_RI, 1).mean(1)
    return means_R


def interval(scores_SI: Scores, base_SI: Scores | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean score, or of its difference from the mean of `base_SI`."""
    rng, num_images = np.random.default_rng(0), scores_SI.shape[1]
    images_RI = rng.integers(num_images, size=(DRAWS, num_images))
    means_R = draw_means(scores_SI, images_RI, rng)
    if base_SI is not None:
        means_R = means_R - draw_means(base_SI, images_RI, rng)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


def print_comparison(title: str, arms: dict[str, Scores]) -> None:
    """Print the mean score of each group, and its difference from the first group."""
    base = next(iter(arms))
    for name, scores_SI in arms.items():
        low, high = interval(scores_SI)
        line = f"{name}: {title} {scores_SI.mean():.3f} [{low:.3f}, {high:.3f}], {len(scores_SI)} seeds"
        if name != base:
            low, high = interval(scores_SI, arms[base])
            line += f"; {scores_SI.mean() - arms[base].mean():+.3f} [{low:+.3f}, {high:+.3f}] to {base}"
        print(line, flush=True)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arms", nargs="+", metavar="NAME=FOLDER,...")
    arms: dict[str, Scores] = {}
    for arm in parser.parse_args().arms:
        name, _, folders = arm.partition("=")
        arms[name] = read_scores([Path(folder) for folder in folders.split(",")])
    print_comparison("CIDEr-D", arms)


if __name__ == "__main__":
    main()
