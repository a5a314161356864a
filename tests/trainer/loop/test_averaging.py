"""The average of weights: it follows those that learn, stands in for them for a while, and is the same when it is restored."""

import pytest
import torch
from torch import nn

from trainer.loop.averaging import WeightAverage


def test_it_follows_what_learns_and_forgets_the_first_weights_soon() -> None:
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    average, expected = WeightAverage(0.9, {}), 0.0
    for step in range(40):
        value = float(step)
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert average.weights_by_name["weight"].item() == pytest.approx(expected)
    assert list(average.weights_by_name) == ["weight"]
    assert 25 < expected < 39


def test_what_no_longer_learns_is_what_it_is() -> None:
    model, average = nn.Linear(1, 1), WeightAverage(0.9, {})
    for step in range(5):
        with torch.no_grad():
            model.weight.fill_(float(step))
        model.weight.requires_grad_(step < 4)
        average.update(model)
    assert average.weights_by_name["weight"].item() == 4.0
    average.clear()
    assert (average.weights_by_name, average.steps) == ({}, 0)


def test_it_stands_in_for_a_while_also_where_that_fails() -> None:
    model = nn.Linear(2, 2)
    own, average = model.weight.detach().clone(), WeightAverage(0.5, {"weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="an evaluation"), average.instead(model):
        assert model.weight.eq(0).all()
        raise RuntimeError("an evaluation failed")
    assert torch.equal(model.weight, own)
    assert average.weights_by_name["weight"].eq(0).all()


def test_it_goes_on_from_its_state() -> None:
    model = nn.Linear(2, 2)
    average, again = WeightAverage(0.99, {}), WeightAverage(0.99, {})
    for number in range(4):
        if number == 2:
            again.restore(average.state(), torch.device("cpu"))
            again.weights_by_name = {name: weights.clone() for name, weights in again.weights_by_name.items()}
        with torch.no_grad():
            model.weight.add_(1)
        average.update(model)
        if number >= 2:
            again.update(model)
    assert torch.equal(average.weights_by_name["weight"], again.weights_by_name["weight"])
