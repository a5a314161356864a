"""A moving average of the weights that learn: scored and saved in their place, since it is better than any one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class WeightAverage:
    """An exponential moving average; `weights_by_name` is empty until the first step."""

    decay: float
    weights_by_name: dict[str, Tensor]
    steps: int = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights that learn. Early steps weigh more: the first weights are random."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for name, weights in model.named_parameters():
            average = self.weights_by_name.get(name)
            if average is not None:  # what no longer learns is what it is
                average.lerp_(weights, 1 - decay) if weights.requires_grad else average.copy_(weights)
            elif weights.requires_grad:
                self.weights_by_name[name] = weights.detach().clone()

    def clear(self) -> None:
        """Begin anew."""
        self.weights_by_name, self.steps = {}, 0

    @contextmanager
    def instead(self, model: nn.Module) -> Iterator[None]:
        """Put the average in place of the weights of a model for a while."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        by_name = dict(model.named_parameters())
        for name, average in self.weights_by_name.items():
            by_name[name].data, self.weights_by_name[name] = average, by_name[name].data

    def state(self) -> dict[str, object]:
        """Return what `restore` takes."""
        return {"steps": self.steps, "weights": self.weights_by_name}

    def restore(self, state: dict[str, object], device: torch.device) -> None:
        """Go on from a state that was saved."""
        weights, steps = state["weights"], state["steps"]
        assert isinstance(weights, dict) and isinstance(steps, int)
        self.steps, self.weights_by_name = steps, {name: tensor.to(device) for name, tensor in weights.items()}
