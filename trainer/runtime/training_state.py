"""Files of a training run besides its weights: resume.pt (state to resume from) and log.jsonl (curves)."""

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import TrainError, one_line
from pipeline.storage.files import atomic_write, write_text
from pipeline.storage.untrusted import read_regular
from trainer.config import TrainConfig
from trainer.runtime.checkpoint_folder import describe_difference

MAX_LOG_BYTES = 1_000_000_000


def save_resume(folder: Path, state: dict[str, Any]) -> None:
    """Atomically write the state to resume from to resume.pt."""
    with atomic_write(folder / "resume.pt") as draft:
        torch.save(state, draft)


def load_resume(folder: Path, config: TrainConfig, run: str) -> dict[str, Any]:
    """Load resume.pt. Raises TrainError if it is missing, damaged, or from a run with another digest."""
    path = folder / "resume.pt"
    if not path.exists():
        hint = "repeat --encoder and --decoder, pass --out FOLDER, or leave out --resume"
        raise TrainError(f"nothing to resume in {folder}", hint=hint)
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if not {"run", "step"} <= state.keys() or not isinstance(state["step"], int):
            raise ValueError("it has no `run`, or no integer `step`")
    except Exception as error:  # noqa: BLE001  # torch may raise any exception for a damaged file
        is_known = isinstance(error, OSError | ValueError)
        reason = one_line(error) if is_known else "it is not a saved training state"
        hint = f"remove {path} and start without --resume"
        raise TrainError(f"{path} is damaged: {reason}", hint=hint) from None
    if state["run"] != run:
        hint = f"restore these, choose another folder (--out DIR), or remove {path} and leave out --resume"
        raise TrainError(f"{folder} was trained with {describe_difference(folder, config)}", hint=hint)
    return state


@contextmanager
def delay_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the current step can end and its state can be saved.

    If the same signal arrives twice, the original handler runs at once. A second signal of the other kind is
    only collected, because it may come from the parent process.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def record(number: int, _: object) -> None:
        if number in received:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        received.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """Writes log.jsonl, one JSON object per line. Existing lines after `first_step` are dropped.

    `seconds` is the training time up to that step.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        kept = [line for line in read_log(path) if line["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.seconds: float = next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)

    def add(self, **values: float | int | str | Tensor) -> None:
        """Add a line, which `flush` writes. Tensors are read only by `flush`."""
        self._lines.append(values)

    def flush(self) -> None:
        """Append the added lines to the file. NaN and infinity become null."""
        with self._path.open("a", encoding="utf-8") as file:
            for values in self._lines:
                line = {name: v.item() if isinstance(v, Tensor) else v for name, v in values.items()}
                odd = {n for n, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
                file.write(json.dumps(line | dict.fromkeys(odd)) + "\n")
        self._lines = []


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a log. Raises TrainError if a line is damaged."""
    text = read_regular(path, max_bytes=MAX_LOG_BYTES).decode("utf-8", "replace") if path.exists() else ""
    complete_lines, _, _ = text.rpartition("\n")
    try:
        entries = [json.loads(line) for line in complete_lines.split("\n") if line.strip()]
        if not all(isinstance(entry, dict) and isinstance(entry["step"], int) for entry in entries):
            raise ValueError('a line has no integer "step"')
    except (ValueError, KeyError, RecursionError) as error:
        hint = "move it away: only the curves are lost"
        raise TrainError(f"{path} is damaged: {one_line(error)}", hint=hint) from None
    return entries
