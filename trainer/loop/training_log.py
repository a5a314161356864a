"""The curves of a training (`log.jsonl`, and event files of TensorBoard), its speed, and the memory that it takes."""

import json
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import TrainError, one_line
from pipeline.install import install_command
from pipeline.storage.files import remove, write_text
from pipeline.storage.untrusted import read_regular
from trainer.loop.batch_loader import Batch

MAX_LOG_BYTES = 1_000_000_000


class Log:
    """`log.jsonl`: one JSON object a line; on resume, lines from later steps are dropped.

    With `tensorboard`, the curves are also written as event files to the folder `tensorboard` beside it.
    """

    def __init__(self, path: Path, first_step: int, *, tensorboard: bool = False) -> None:
        self._path = path
        self._curves: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if first_step == 0:
                remove(path.with_name("tensorboard"))  # a new run discards old curves
            self._curves = SummaryWriter(str(path.with_name("tensorboard")), purge_step=first_step + 1)
        kept = [line for line in read_log(path) if line["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.seconds: float = next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)  # up to there

    def write(self, **values: float | int | str) -> None:
        """Append one line, and a point to each TensorBoard curve; each stage has its own curves."""
        with self._path.open("a", encoding="utf-8") as file:
            # A step that is skipped may have a loss that is no number, which JSON does not know.
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
            }
            file.write(json.dumps(finite) + "\n")
        if self._curves and values["step"]:  # before the first step there are no curves
            for name, value in values.items():
                if name != "step" and not isinstance(value, str):
                    self._curves.add_scalar(f"{values.get('stage', 'validation')}/{name}", value, values["step"])
            self._curves.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log, or an empty list if the file does not exist.

    A line without its end was cut off, by a full disk or a kill: it is left out. Raises TrainError for any other damage.
    """
    text = read_regular(path, max_bytes=MAX_LOG_BYTES).decode("utf-8", "replace") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    try:
        entries = [json.loads(line) for line in whole.split("\n") if line.strip()]
        if not all(isinstance(entry, dict) and isinstance(entry["step"], int) for entry in entries):
            raise ValueError("an entry has no step")
    except (ValueError, KeyError, RecursionError) as error:
        raise TrainError(f"{path} is damaged: {one_line(error)}", hint="move it away: only the curves are lost") from None
    return entries


def require_tensorboard() -> None:
    """Raise TrainError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise TrainError("TensorBoard is not installed", hint=install_command("export")) from None


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
