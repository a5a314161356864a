"""Estimate shares of wrong texts in strata, from the verdicts of reviewers who sometimes err.

Given the share p of wrong texts in a stratum and the rate e of wrong verdicts, a text has w verdicts "wrong"
and r verdicts "right" with the probability p (1 - e)^w e^r + (1 - p) e^w (1 - e)^r. Texts with several
verdicts show e. The posteriors of e and of each p are computed on grids, and the strata are combined by size.

The prior of p is that of Jeffreys for upper bounds and Beta(1/4, 3/4) for lower bounds. The latter is halfway
to the lower bound of Clopper and Pearson, since the prior masses of strata without wrong texts add up. Lower
bounds also have a prior with larger e, since verdicts "wrong" may be errors of reviewers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# The number of texts by their verdicts (wrong, right).
Votes = Counter[tuple[int, int]]
TAIL = 0.025
NUM_SHARES, NUM_ERRORS, NUM_DRAWS = 512, 32, 2048
MAX_ERROR = 0.3
# The priors of a bound are Beta(1/2 + tilt, 1/2 - tilt) for p and Beta(1/2, b) for e. With b = 20, e is about
# 2 %, and below 9 % with a probability of .95. With b = 7, it is about 7 %, and below 25 %.
Priors = tuple[float, float]  # (tilt, b)
LOWER: Priors = (-0.25, 7)
UPPER: Priors = (0.0, 20)
# These grids are uniform in the arcsine of the square root, so equal weights are the prior of Jeffreys.
SHARES: Floats = np.sin((np.arange(NUM_SHARES) + 0.5) / NUM_SHARES * np.pi / 2) ** 2
ERRORS: Floats = np.sin((np.arange(NUM_ERRORS) + 0.5) / NUM_ERRORS * np.arcsin(MAX_ERROR**0.5)) ** 2
NO_ERROR: Floats = np.array([1e-9])


@dataclass(slots=True)
class Stratum:
    """A stratum of `texts` texts. `votes` has the verdicts on reviewed texts.

    `removed` has the verdicts on texts that were reviewed and then removed or edited. They are evidence about
    the unreviewed texts, but are not counted in `texts`.
    """

    texts: int
    votes: Votes = field(default_factory=Counter)
    removed: Votes = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The shares of wrong texts by stratum: the most likely ones, and draws with the priors of each bound.

    Shapes: `likely` (strata), `low` and `high` (strata, NUM_DRAWS), `error` (NUM_DRAWS).
    """

    likely: Floats
    low: Floats
    high: Floats
    error: Floats

    @classmethod
    def of(cls, strata: Sequence[Stratum], errors: Floats = ERRORS) -> "Estimate":
        """Estimate the shares in all strata. `errors` are the possible rates of wrong verdicts."""
        fits = [_Fit.of(stratum, errors) for stratum in strata]
        low, _, _ = _draw(fits, errors, LOWER)
        high, error, likely = _draw(fits, errors, UPPER)
        return cls(likely, low, high, error)

    def interval(self, total: Callable[[Floats], Floats]) -> tuple[float, float]:
        """Return the 95 % interval of a value that grows with each share, such as a weighted sum."""
        return float(np.quantile(total(self.low), TAIL)), float(np.quantile(total(self.high), 1 - TAIL))

    def central_interval(self, value: Callable[[Floats], Floats]) -> tuple[float, float]:
        """Return the 95 % interval of any value, from the draws with the prior of Jeffreys."""
        low, high = np.quantile(value(self.high), (TAIL, 1 - TAIL))
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class _Fit:
    """The verdicts of a stratum, for each rate of wrong verdicts.

    `likelihood` is the log-likelihood of each share in SHARES (errors, SHARES). `likely` is the most likely
    share among all texts that were drawn, and `center` that among the texts of the version (errors). Only
    unreviewed texts vary. Their variance is `sampled` times that of the sample.
    """

    likelihood: Floats
    likely: Floats
    center: Floats
    sampled: float

    @classmethod
    def of(cls, stratum: Stratum, errors: Floats) -> "_Fit":
        likelihood = _log_likelihood(stratum.votes + stratum.removed, errors)
        of_kept = _log_likelihood(stratum.votes, errors) if stratum.removed else likelihood
        reviewed, unseen = stratum.votes.total(), stratum.texts - stratum.votes.total()
        known = reviewed / max(1, stratum.texts)
        likely = _most_likely(likelihood)
        sampled = (
            (1 - known) ** 2 * (1 + (reviewed + stratum.removed.total()) / unseen) if unseen > 0 else 0.0
        )
        return cls(likelihood, likely, known * _most_likely(of_kept) + (1 - known) * likely, sampled)

    def shares_of_version(self, mean: Floats, errors: Floats) -> Floats:
        """Return the share in the version for each share in SHARES. Shape: (errors, SHARES).

        The variance of a share of verdicts has a part from sampling, and a part from errors of reviewers.
        """
        sampling, noise = mean * (1 - mean) * (1 - 2 * errors) ** 2, errors * (1 - errors)
        spread = np.sqrt((sampling * self.sampled + noise) / (sampling + noise))
        return np.clip(self.center[:, None] + (SHARES - self.likely[:, None]) * spread[:, None], 0, 1)


def _draw(fits: Sequence[_Fit], errors: Floats, priors: Priors) -> tuple[Floats, Floats, Floats]:
    """Return draws of all shares, draws of the error rate, and the most likely shares. See Estimate."""
    tilt, b = priors
    prior = tilt * np.log(SHARES / (1 - SHARES))
    log_errors = (b - 0.5) * np.log1p(-errors)
    values, sums = [], []
    for fit in fits:
        posterior = fit.likelihood + prior
        top = posterior.max(1, keepdims=True)
        weights = np.exp(posterior - top)
        totals = weights.sum(1)
        log_errors = log_errors + np.log(totals) + top[:, 0]
        sums.append((np.cumsum(weights, 1) - weights / 2) / totals[:, None])
        values.append(fit.shares_of_version(weights @ SHARES / totals, errors))
    chances = np.exp(log_errors - log_errors.max())
    places = _lattice(len(fits) + 1)
    rows = np.searchsorted(np.cumsum(chances) / chances.sum(), places[:, 0]).clip(0, len(errors) - 1)
    draws = np.empty((len(fits), NUM_DRAWS))
    for row in np.unique(rows):
        is_row = rows == row
        for n in range(len(fits)):
            draws[n, is_row] = np.interp(places[is_row, n + 1], sums[n][row], values[n][row])
    return draws, errors[rows], np.array([fit.center[log_errors.argmax()] for fit in fits])


def _log_likelihood(votes: Votes, errors: Floats) -> Floats:
    """Return the log-likelihood of verdicts. Shape: (errors, SHARES)."""
    result = np.zeros((len(errors), NUM_SHARES))
    for (wrong, right), texts in sorted(votes.items()):
        if_wrong = (1 - errors) ** wrong * errors**right
        if_right = errors**wrong * (1 - errors) ** right
        result += texts * np.log(np.outer(if_wrong, SHARES) + np.outer(if_right, 1 - SHARES))
    return result


def _most_likely(likelihood: Floats) -> Floats:
    """Return the most likely share for each rate of errors, which is 0 if all texts are right."""
    best = likelihood.argmax(1)
    return np.where(best == 0, 0.0, SHARES[best])


@cache
def _lattice(dimensions: int) -> Floats:
    """Return NUM_DRAWS points that fill a cube evenly: the R-sequence of Roberts (2018)."""
    ratio = 1.5
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = np.arange(1, NUM_DRAWS + 1)[:, None] * ratio ** -np.arange(1.0, dimensions + 1)
    return np.asarray((0.5 + steps) % 1)
