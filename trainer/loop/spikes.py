"""Leave out steps whose gradient is a spike: a single bad batch may undo hours of training."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

SPIKE = 10.0  # times the median gradient norm: such a step is skipped
SPIKE_STEPS = 64  # steps in the median
MOST_SPIKES = 3  # skipped in a row: then the norms have changed for good, as when a captioner knows its texts by heart


@dataclass(slots=True)
class SpikeFilter:
    """Compares the gradient of each step with those before."""

    norms: list[float] = field(default_factory=list)  # of recent gradients
    skipped_steps: int = 0  # in a row

    def clear(self) -> None:
        """Forget the gradients before."""
        self.norms = []

    def should_step(self, loss: float, norm: float) -> bool:
        """Return whether to apply a step: loss and gradient norm are finite, and the norm is not a spike. Records the norm."""
        median = statistics.median(self.norms) if len(self.norms) >= SPIKE_STEPS // 4 else math.inf
        is_finite, is_spike = math.isfinite(loss) and math.isfinite(norm), 0 < SPIKE * median < norm
        is_good = is_finite and (not is_spike or self.skipped_steps >= MOST_SPIKES)
        if is_good and norm:  # none, where all rewards of a step are equal, says nothing of the others
            self.norms = [norm] if is_spike else [*self.norms[1 - SPIKE_STEPS :], norm]
        self.skipped_steps = 0 if is_good else self.skipped_steps + 1
        return is_good

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on."""
        return {"norms": self.norms, "skipped": self.skipped_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from a state. Raises KeyError if it is damaged."""
        self.norms, self.skipped_steps = state["norms"], state["skipped"]
