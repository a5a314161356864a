"""Intervals of error rates contain the truth as often as they state, also if reviewers err."""

import numpy as np
import pytest

from pipeline.dataset.error_rates import MAX_ERROR, NO_ERROR, UPPER, Estimate, Stratum, Votes


def audit_strata(draw: np.random.Generator, shares: tuple[float, ...], error: float) -> list[Stratum]:
    """Return strata of 4,000 and 1,000 texts, of which 80 and 40 are reviewed, a fourth of them twice."""
    strata = []
    for share, texts, reviewed in zip(shares, (4000, 1000), (80, 40), strict=True):
        is_wrong = draw.random(reviewed) < share
        votes = Votes()
        for n, wrong in enumerate(is_wrong.tolist()):
            looks = 2 if n < reviewed // 4 else 1
            count = sum(wrong ^ (draw.random() < error) for _ in range(looks))
            votes[count, looks - count] += 1
        strata.append(Stratum(texts, votes))
    return strata


@pytest.mark.parametrize("error", [0.0, 0.05])
@pytest.mark.parametrize("shares", [(0.02, 0.4), (0.1, 0.1), (0.3, 0.02)])
def test_intervals_cover_the_true_share_in_95_percent_of_audits(
    shares: tuple[float, ...], error: float
) -> None:
    draw, covered = np.random.default_rng(3), 0
    for _ in range(200):
        low, high = Estimate.of(audit_strata(draw, shares, error)).interval(
            lambda one: 0.8 * one[0] + 0.2 * one[1]
        )
        covered += low <= 0.8 * shares[0] + 0.2 * shares[1] <= high
    assert covered / 200 >= 0.92


def test_audit_of_a_whole_stratum_leaves_no_uncertainty_about_its_texts() -> None:
    part, whole = (
        Estimate.of([Stratum(texts, Votes({(2, 0): 10, (0, 2): 90}))]).interval(lambda shares: shares[0])
        for texts in (10_000, 100)
    )
    assert part[0] < 0.07 and part[1] > 0.15
    assert [*whole] == pytest.approx([0.1, 0.1], abs=0.015)


def test_estimate_of_the_same_verdicts_is_the_same() -> None:
    strata = [Stratum(100, Votes({(1, 0): 3, (0, 1): 7})), Stratum(50)]
    first, second = Estimate.of(strata), Estimate.of(strata)
    assert np.array_equal(first.low, second.low) and np.array_equal(first.error, second.error)
    assert first.high[1].min() < 0.01 and first.high[1].max() > 0.99  # nothing is known about a stratum


def beta_quantile(wrong: float, right: float, chance: float) -> float:
    shares = (np.arange(20_000) + 0.5) / 20_000
    sums = np.cumsum(shares ** (wrong - 1) * (1 - shares) ** (right - 1))
    return float(np.interp(chance, sums / sums[-1], shares))


def test_bounds_without_reviewer_errors_are_quantiles_of_beta_distributions() -> None:
    one = Estimate.of([Stratum(10**9, Votes({(1, 0): 1, (0, 1): 49}))], NO_ERROR)
    low, high = beta_quantile(1.25, 49.75, 0.025), beta_quantile(1.5, 49.5, 0.975)
    assert one.interval(lambda shares: shares[0]) == pytest.approx((low, high), rel=0.05)
    assert one.central_interval(lambda shares: shares[0])[0] == pytest.approx(
        beta_quantile(1.5, 49.5, 0.025), rel=0.05
    )


@pytest.mark.parametrize(
    "votes", [{(1, 1): 6, (0, 2): 20, (2, 0): 4, (0, 1): 70}, {(0, 1): 30, (1, 0): 20, (1, 1): 2, (2, 0): 3}]
)
def test_reviewer_error_is_the_mean_of_the_posterior(votes: dict[tuple[int, int], int]) -> None:
    grid = (np.arange(600) + 0.5) / 600
    shares, errors = np.sin(grid * np.pi / 2) ** 2, MAX_ERROR * grid[:, None]
    posterior = errors**-0.5 * (1 - errors) ** (UPPER[1] - 1) * np.ones(600)
    for (wrong, right), texts in votes.items():
        if_wrong = (1 - errors) ** wrong * errors**right
        if_right = errors**wrong * (1 - errors) ** right
        posterior *= (if_wrong * shares + if_right * (1 - shares)) ** texts
    mean = (posterior * errors).sum() / posterior.sum()
    assert Estimate.of([Stratum(10**9, Votes(votes))]).error.mean() == pytest.approx(mean, rel=0.02)


def test_interval_is_narrower_by_the_square_root_of_the_unreviewed_share() -> None:
    votes = Votes({(1, 0): 100, (0, 1): 100})
    widths = [
        np.subtract(*Estimate.of([Stratum(texts, votes)], NO_ERROR).interval(lambda shares: shares[0]))
        for texts in (10**9, 400)
    ]
    assert widths[1] / widths[0] == pytest.approx(0.5**0.5, abs=0.02)


def test_most_likely_share_of_a_stratum_without_wrong_texts_is_zero() -> None:
    estimate = Estimate.of([Stratum(1000, Votes({(0, 1): 10})), Stratum(10)])
    assert estimate.likely.tolist() == [0, 0]


def test_interval_of_a_whole_stratum_has_the_variance_of_wrong_verdicts_alone() -> None:
    votes, errors = Votes({(1, 0): 60, (0, 1): 140}), np.array([0.2])
    widths = [
        np.subtract(*Estimate.of([Stratum(texts, votes)], errors).interval(lambda shares: shares[0]))
        for texts in (10**9, 200)
    ]
    share = (0.3 - 0.2) / (1 - 2 * 0.2)
    sampling, noise = share * (1 - share) * (1 - 2 * 0.2) ** 2, 0.2 * 0.8
    assert widths[1] / widths[0] == pytest.approx((noise / (sampling + noise)) ** 0.5, abs=0.04)
