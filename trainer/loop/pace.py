"""The speed of a training, and the memory that it takes."""

import resource
import time
from dataclasses import dataclass, field

import torch

from trainer.loop.batch_loader import Batch


@dataclass(slots=True)
class Pace:
    """The speed of the steps of this process."""

    before_s: float = 0.0  # that earlier processes have trained, up to the state that is gone on with
    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    images: int = 0
    tokens: int = 0

    def after(self, batch: Batch, steps_left: int) -> dict[str, float]:
        """Count a batch; return the speed so far, for the log, where so many steps are left."""
        self.steps, self.images, self.tokens = self.steps + 1, self.images + batch.num_images, self.tokens + batch.num_tokens
        seconds = time.monotonic() - self.started
        return {
            "seconds": self.before_s + seconds,
            "seconds_left": seconds / self.steps * steps_left,
            "images_per_s": self.images / seconds,
            "tokens_per_s": self.tokens / seconds,
        }


def memory_mb() -> float:
    """Return the peak memory of this process so far: of the GPU, if there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
