"""Spikes: a gradient far above those before it is left out, unless gradients have grown for good."""

import math

import pytest

from trainer.loop.spikes import MOST_SPIKES, SpikeFilter


def test_steps_without_a_gradient_make_no_spikes_of_the_others() -> None:
    """As where all rewards of a step are equal."""
    spikes = SpikeFilter()
    assert all(spikes.should_step(1.0, float(step % 4 == 0)) for step in range(200))
    assert not spikes.should_step(1.0, 1e6)


def test_norms_that_have_grown_for_good_are_no_spikes() -> None:
    spikes = SpikeFilter(norms=[1.0] * 32)
    assert [spikes.should_step(1.0, 100.0) for _ in range(MOST_SPIKES + 2)] == [False] * MOST_SPIKES + [True, True]


def test_few_norms_are_nothing_to_compare_with() -> None:
    spikes = SpikeFilter(norms=[1.0] * 8)
    assert spikes.should_step(1.0, 100.0)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_no_number_is_left_out_however_often_it_comes(loss: float, norm: float) -> None:
    spikes = SpikeFilter(norms=[1.0] * 32)
    assert [spikes.should_step(loss, norm) for _ in range(20)] == [False] * 20
    assert (spikes.skipped_steps, spikes.norms) == (20, [1.0] * 32)


def test_restored_filter_equals_the_saved_one() -> None:
    again = SpikeFilter()
    again.restore(SpikeFilter([3.0], 1).state())
    assert again == SpikeFilter([3.0], 1)
