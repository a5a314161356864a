"""Simulate the claims check with known truth: coverage of its intervals, and captions lost and found.

    python benchmarks/claim_errors.py [--rounds 300] [--texts 200] [--claims 8] [--seed 0]

In a share of the captions, one claim is false. The model gives a wrong answer with one probability, and says
"yes" to any question with another. Errors are independent. 200 images have three known truths and three known
falsehoods. A line states how often the 95 % interval of the corrected share of true claims contains the true
share, its width, the width of an interval without correction, and the shares of true captions kept and of
false captions found: by this check, and by a limit (1 or .8) on the share of claims that the first two
questions confirm.
"""

import argparse
from collections import Counter
from itertools import product

import numpy as np
import numpy.typing as npt

from pipeline.dataset.calibration import NEVER, TRUE, Evidence, Findings

IMAGES, KNOWN, MAX_LOST = 200, 3, 0.1
ERRORS, WRONG, ALWAYS_YES = (0.02, 0.1, 0.3), (0.0, 0.05, 0.1, 0.2), (0.0, 0.3)
Array = npt.NDArray[np.bool_]


def ask(is_true: Array, wrong: float, always_yes: float, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return whether each of four answers refutes a claim (1) or confirms it (-1). Shape: (*claims, 4)."""
    expects_yes = np.array([True, False, True, False])
    is_yes = is_true[..., None] == expects_yes
    is_yes ^= draw.random(is_yes.shape) < wrong
    is_yes |= draw.random(is_yes.shape) < always_yes
    return np.where(is_yes == expects_yes, -1, 1)


def evidence_of(answers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the evidence against each claim. The first pair may confirm the claim."""
    first = answers[..., :2].sum(-1)
    evidence: npt.NDArray[np.int64] = np.where(first > -2, answers.sum(-1), first)
    return evidence


def evidence_by_image(evidence: npt.NDArray[np.int64]) -> Evidence:
    """Return the evidence against the claims of each image. Shape of `evidence`: (images, claims)."""
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
        for kind, truth in ((TRUE, True), ("color", False)):
            known = evidence_of(ask(np.full((IMAGES, KNOWN), truth), wrong, always_yes, draw))
            findings.known[kind] = evidence_by_image(known)
        findings.found = evidence_by_image(evidence)
        level = findings.choose_level(MAX_LOST)
        summary = findings.describe(level)
        true, passed = summary["true"], summary["passed"]
        goal = 1 - error / claims
        is_good, confirmed = is_true.all(1), (answers[..., :2].sum(-1) == -2).mean(1)
        kept = {"check": (evidence < level).all(1), "share 1": confirmed >= 1, "share .8": confirmed >= 0.8}
        results.append(
            {
                "covered": float(true is not None and true["low"] <= goal <= true["high"]),
                "width": true["high"] - true["low"] if true else 1.0,
                "plain width": passed["high"] - passed["low"],
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


def main() -> None:
    """Print one line for each combination of texts, errors and model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--texts", type=int, nargs="*", default=[200, 2000])
    parser.add_argument("--claims", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
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
