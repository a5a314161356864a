"""Dropout: how many features are zero, that the mean stays, and that a seed repeats it."""

import pytest
import torch

from trainer.model.dropout import Dropout, scaled_mask


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_as_many_features_are_dropped_as_asked_for(probability: float) -> None:
    torch.manual_seed(0)
    count = 1_000_003  # no multiple of four
    dropped = int((Dropout(probability)(torch.ones(count)) == 0).sum())
    deviation = (count * probability * (1 - probability)) ** 0.5
    assert abs(dropped - count * probability) < 5 * deviation


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    torch.manual_seed(0)
    mask = scaled_mask(torch.empty(1000, 1000), 0.1)
    share = round(0.1 * 65536) / 65536
    assert mask.unique().tolist() == [0, pytest.approx(1 / (1 - share))]
    assert mask.mean().item() == pytest.approx(1, abs=0.002)
    # Features of one random number are apart from each other, and rows are too.
    kept = (mask > 0).double()
    for other in (kept.roll(1, 1), kept.roll(2, 1), kept.roll(1, 0)):
        assert torch.corrcoef(torch.stack([kept.flatten(), other.flatten()]))[0, 1].abs() < 0.005


def test_a_seed_draws_the_same_features_and_the_next_step_draws_others() -> None:
    dropout, x = Dropout(0.5), torch.ones(4, 64)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


def test_gradients_pass_through_what_was_kept() -> None:
    x = torch.ones(3, 5, dtype=torch.bfloat16, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert out.dtype is torch.bfloat16
    assert x.grad is not None and torch.equal(x.grad, out.detach())  # of ones, what comes out is the mask


@pytest.mark.parametrize("dropout", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_drawn_where_nothing_is_dropped(dropout: Dropout) -> None:
    x, before = torch.ones(8), torch.get_rng_state()
    assert dropout(x) is x
    assert torch.equal(torch.get_rng_state(), before)
