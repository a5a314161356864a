"""Simulate the claims check on captions with known errors, and measure its ranges and rejections.

    python benchmarks/claim_errors.py [--rounds 300] [--texts 200] [--claims 8] [--seed 0] [--log-odds]

The claims check asks a model about each claim of a caption, and rejects captions with a refuted claim. Here,
some captions have one false claim. The simulated model sometimes answers wrongly, and sometimes "yes" to any
question, independently. The human captions of 200 images have three claims each, which are true.

Each output line is one setting. It shows how often the range of the share of true claims contains the true
share, the width of this range, and how often the check measures no range. It also shows the shares of true
captions kept and of false captions found, by the claims check and by a simpler rule: keep captions if the
first two questions confirm all (or 80 %) of their claims.

With --log-odds, the claims check is compared with two checks that use answer probabilities. One limits the
sum of the log-odds, and loses at most 10 % of the true captions. The other is the claims check without the
least certain quarter of the answers. The log-odds are a signal with normal noise, multiplied by log-normal
noise. AUROC is the probability that a right answer has larger log-odds than a wrong one.
"""

import argparse
from collections import Counter
from itertools import product
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from pipeline.dataset.calibration import NEVER, Evidence, Findings

IMAGES, CLAIMS, MAX_LOST = 200, 3, 0.1
ERRORS, WRONG, ALWAYS_YES = (0.02, 0.1, 0.3), (0.0, 0.05, 0.1, 0.2), (0.0, 0.3)
NOISE = (0.0, 1.0, 2.0)
UNSURE_FRAC = 0.25
Array = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def ask(is_true: Array, wrong: float, always_yes: float, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return whether each of four answers refutes a claim (1) or confirms it (-1). Shape: (*claims, 4)."""
    expects_yes = np.array([True, False, True, False])
    is_yes = is_true[..., None] == expects_yes
    is_yes ^= draw.random(is_yes.shape) < wrong
    is_yes |= draw.random(is_yes.shape) < always_yes
    return np.where(is_yes == expects_yes, -1, 1)


def evidence_of(answers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, per claim, the number of refuting answers minus that of confirming answers."""
    first = answers[..., :2].sum(-1)
    evidence: npt.NDArray[np.int64] = np.where(first > -2, answers.sum(-1), first)
    return evidence


def evidence_by_image(evidence: npt.NDArray[np.int64]) -> Evidence:
    """Count the images with the same evidence. Shape of `evidence`: (images, claims)."""
    return Counter(map(tuple, evidence.tolist()))


def simulate(
    texts: int,
    claims: int,
    error: float,
    wrong: float,
    always_yes: float,
    rounds: int,
    draw: np.random.Generator,
) -> dict[str, float]:
    """Return the mean results of all rounds."""
    results: list[dict[str, float]] = []
    for _ in range(rounds):
        is_true = np.ones((texts, claims), bool)
        is_true[:, 0] = draw.random(texts) >= error
        answers = ask(is_true, wrong, always_yes, draw)
        evidence = evidence_of(answers)
        findings = Findings()
        findings.claims[claims] = texts
        references = evidence_of(ask(np.ones((IMAGES, CLAIMS), bool), wrong, always_yes, draw))
        findings.references = evidence_by_image(references)
        findings.found = evidence_by_image(evidence)
        level = findings.choose_level(MAX_LOST)
        bounds = findings.describe(level)["range"]
        goal = 1 - error / claims
        is_good, confirmed = is_true.all(1), (answers[..., :2].sum(-1) == -2).mean(1)
        kept = {"check": (evidence < level).all(1), "share 1": confirmed >= 1, "share .8": confirmed >= 0.8}
        results.append(
            {
                "covered": float(bounds is None or bounds["low"] <= goal <= bounds["high"]),
                "width": bounds["high"] - bounds["low"] if bounds else 1.0,
                "no range": float(bounds is None),
                "no level": float(level == NEVER),
                **{f"kept, {name}": rows[is_good].mean() for name, rows in kept.items()},
                **{
                    f"found, {name}": 1 - rows[~is_good].mean()
                    for name, rows in kept.items()
                    if not is_good.all()
                },
            }
        )
    names = dict.fromkeys(name for result in results for name in result)
    return {name: float(np.mean([one[name] for one in results if name in one])) for name in names}


def log_odds_against(is_true: Array, wrong: float, noise: float, draw: np.random.Generator) -> Floats:
    """Return the log-odds of four answers against each claim. Shape: (*claims, 4)."""
    signal = np.where(is_true, -1, 1)[..., None] * NormalDist().inv_cdf(1 - wrong)
    log_odds = signal + draw.standard_normal((*is_true.shape, 4))
    return np.asarray(log_odds * np.exp(noise * draw.standard_normal(log_odds.shape)))


def auroc(log_odds: Floats, is_true: Array) -> float:
    """Return the probability that a right answer has larger log-odds than a wrong one."""
    is_right = (log_odds < 0) == is_true[..., None]
    ranks = np.abs(log_odds).ravel().argsort().argsort()[is_right.ravel()]
    num_right, num_wrong = is_right.sum(), (~is_right).sum()
    return float((ranks.sum() - num_right * (num_right - 1) / 2) / (num_right * num_wrong))


def compare_log_odds(
    texts: int, claims: int, error: float, wrong: float, noise: float, rounds: int, draw: np.random.Generator
) -> dict[str, float]:
    """Return the mean shares of true captions kept and of false captions found by each check."""
    results: list[dict[str, float]] = []
    for _ in range(rounds):
        is_true = np.ones((texts, claims), bool)
        is_true[:, 0] = draw.random(texts) >= error
        log_odds = log_odds_against(is_true, wrong, noise, draw)
        known = log_odds_against(np.ones((IMAGES, CLAIMS), bool), wrong, noise, draw)
        limit = np.quantile(known.sum(-1), (1 - MAX_LOST) ** (1 / claims))
        kept = {"log-odds": (log_odds.sum(-1) <= limit).all(1)}
        for name, least in (("check", 0.0), ("sure answers", np.quantile(abs(known), UNSURE_FRAC))):
            answers = [(np.sign(odds) * (abs(odds) >= least)).astype(int) for odds in (log_odds, known)]
            findings = Findings()
            findings.claims[claims] = texts
            findings.references = evidence_by_image(evidence_of(answers[1]))
            kept[name] = (evidence_of(answers[0]) < findings.choose_level(MAX_LOST)).all(1)
        is_good = is_true.all(1)
        shares = {f"kept, {name}": rows[is_good].mean() for name, rows in kept.items()}
        shares |= {f"found, {name}": 1 - rows[~is_good].mean() for name, rows in kept.items()}
        results.append({"AUROC": auroc(log_odds, is_true), **shares})
    return {name: float(np.mean([one[name] for one in results])) for name in results[0]}


def main() -> None:
    """Print one line for each combination of texts, errors and model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--texts", type=int, nargs="*", default=[200, 2000])
    parser.add_argument("--claims", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-odds", action="store_true")
    options = parser.parse_args()
    if options.log_odds:
        for texts, wrong, noise in product(options.texts, WRONG[1:], NOISE):
            draw = np.random.default_rng([options.seed, round(100 * wrong), round(100 * noise)])
            values = compare_log_odds(texts, options.claims, 0.1, wrong, noise, options.rounds, draw)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"{texts:,} texts, {wrong:.0%} wrong, noise {noise:g}: {shown}", flush=True)
        return
    for texts, error, wrong, always_yes in product(options.texts, ERRORS, WRONG, ALWAYS_YES):
        draw = np.random.default_rng([options.seed, *(round(100 * x) for x in (error, wrong, always_yes))])
        values = simulate(texts, options.claims, error, wrong, always_yes, options.rounds, draw)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(
            f"{texts:,} texts, {error:.0%} false, {wrong:.0%} wrong, {always_yes:.0%} yes: {shown}",
            flush=True,
        )


if __name__ == "__main__":
    main()
