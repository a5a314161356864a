"""Simulate audits of datasets with known errors, and count how often the printed intervals contain the truth.

    python benchmarks/audit_coverage.py [--rounds 100] [--texts 5000] [--rejects] [--seed 0]

A check flags texts, and with --rejects it rejects them, so that the version has only the other texts. Checks:
`good` finds .9 of the wrong texts and flags .02 of the others, `bad` .4 and .1, `blind` is like `good` but
never sees a third of the errors, `anti` flags .02 of the wrong texts and .2 of the others, `shared` is like
`good` but overlooks half of the errors. An audit uses no human captions. Each verdict is wrong with the given
probability. A part of the texts is judged twice, as on the page of `synth review`.

A line has the coverage and the mean width of `audit.version` in the manifest, of the Wilson interval of a
random sample of equal size, and of prediction-powered inference (PPI++, Angelopoulos et al., 2023) on it.
"""

import argparse
from collections import Counter
from itertools import product

import numpy as np
import numpy.typing as npt

from pipeline.dataset.audit import FLAGGED, PASSED, REJECTED, Drawn, Frame, describe_rate, read_reviewed
from pipeline.dataset.reviews import Verdict
from pipeline.dataset.statistics import Z, wilson_interval
from pipeline.report.audit_sample import with_repeats

SHARES, AUDITS, REVIEWER_ERRORS = (0.005, 0.02, 0.05, 0.3), (30, 100, 400), (0.0, 0.02, 0.05)
CHECKS = ("good", "bad", "blind", "anti", "shared")
KIND = ("captions", "plain")
Bools = npt.NDArray[np.bool_]


def flag_texts(check: str, is_wrong: Bools, draw: np.random.Generator) -> Bools:
    """Return which texts a check flags."""
    found, alarms = {"bad": (0.4, 0.1), "anti": (0.02, 0.2)}.get(check, (0.9, 0.02))
    chances = np.where(is_wrong, found, alarms)
    if check == "blind":
        chances[is_wrong & (draw.random(len(is_wrong)) < 1 / 3)] = 0
    if check == "shared":
        chances[is_wrong & (draw.random(len(is_wrong)) < 1 / 2)] = 0
    return np.asarray(draw.random(len(is_wrong)) < chances)


def simulate(
    is_wrong: Bools, check: str, number: int, error: float, draw: np.random.Generator, *, rejects: bool
) -> dict[str, tuple[float, float]]:
    """Return the intervals of one audit, minus the true share, by method."""
    is_flagged = flag_texts(check, is_wrong, draw)
    frame = Frame(seed=0)
    flagged = REJECTED if rejects else FLAGGED
    for finding, rows in ((flagged, np.flatnonzero(is_flagged)), (PASSED, np.flatnonzero(~is_flagged))):
        frame.texts[finding, KIND] = len(rows)
        order = draw.permutation(rows)[:number].tolist()
        frame.drawn[finding] = [
            Drawn(n, (f"{row:064x}", "0" * 16), KIND, True) for n, row in enumerate(order)
        ]
    verdicts = [
        Verdict.model_construct(
            seed=0, reviewer="a", sample_id=name[0], content=name[1], error="other", repeat=repeat,
            verdict="wrong" if is_wrong[int(name[0], 16)] ^ (draw.random() < error) else "right",
        )
        for name, repeat in with_repeats(frame.first(number))
    ]  # fmt: skip
    rate = describe_rate(frame, read_reviewed(frame, verdicts), [PASSED] if rejects else [FLAGGED, PASSED])
    in_version = ~is_flagged if rejects else np.ones_like(is_flagged)
    truth = float(is_wrong[in_version].mean())
    low, high = (rate["low"], rate["high"]) if rate["wrong"] is not None else (0.0, 1.0)
    sample = draw.permutation(np.flatnonzero(in_version))[:number]
    judged = is_wrong[sample] ^ (draw.random(len(sample)) < error)
    intervals = {
        "audit": (low, high),
        "Wilson": wilson_interval(judged.sum(), len(sample)),
        "PPI++": ppi_interval(judged, is_flagged[sample], is_flagged[in_version]),
    }
    # Shares are printed with four digits.
    return {name: (low - truth - 5e-5, high - truth + 5e-5) for name, (low, high) in intervals.items()}


def ppi_interval(judged: Bools, flags: Bools, all_flags: Bools) -> tuple[float, float]:
    """Return the 95 % interval of PPI++ for a mean, with the power that minimizes its variance."""
    variance = float(flags.var())
    power = float(np.cov(judged, flags, bias=True)[0, 1]) / variance if variance else 0.0
    share = float(judged.mean() - power * (flags.mean() - all_flags.mean()))
    half = Z * float(np.sqrt((judged - power * flags).var() / len(judged)))
    return share - half, share + half


def main() -> None:
    """Print one line for each cell, and the number of cells with a coverage outside of .93 to .99."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--rejects", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cells: Counter[str] = Counter()
    for check, share, number, error in product(CHECKS, SHARES, AUDITS, REVIEWER_ERRORS):
        draw = np.random.default_rng(
            [options.seed, CHECKS.index(check), number, *map(round, (1000 * share, 100 * error))]
        )
        is_wrong = np.arange(options.texts) < round(share * options.texts)
        results = [
            simulate(is_wrong, check, number, error, draw, rejects=options.rejects)
            for _ in range(options.rounds)
        ]
        shown = []
        for name in results[0]:
            bounds = np.array([result[name] for result in results])
            coverage = float(((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)).mean())
            shown.append(f"{name} {coverage:.3f} / {float((bounds[:, 1] - bounds[:, 0]).mean()):.3f}")
            cells[f"{name} {'low' if coverage < 0.93 else 'high' if coverage > 0.99 else 'within'}"] += 1
        print(
            f"{check}, {share:.1%} wrong, audit of {number}, reviewers err {error:.0%}: {', '.join(shown)}",
            flush=True,
        )
    print(dict(sorted(cells.items())))


if __name__ == "__main__":
    main()
