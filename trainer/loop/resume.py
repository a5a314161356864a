"""Interrupt a training between two steps, and resume it from `resume.pt`: the state that the next step depends on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import TrainError, one_line
from pipeline.storage.files import atomic_write
from pipeline.storage.untrusted import UnsafeFileError
from trainer.config import TrainConfig, describe_changes, read_settings


def save_resume(folder: Path, state: dict[str, Any]) -> None:
    """Write the state that the next step depends on to resume.pt, atomically."""
    with atomic_write(folder / "resume.pt") as draft:
        torch.save(state, draft)


def load_resume(folder: Path, config: TrainConfig, run_of: Callable[[int], str]) -> dict[str, Any]:
    """Return the state that `save_resume` wrote. Raises TrainError if there is none, or if another run wrote it.

    `run_of` gives the digest of a run with the settings and so many processes: it may go on with more of them, or fewer.
    """
    path = folder / "resume.pt"
    if not path.exists():
        raise TrainError(
            f"nothing to resume in {folder}", hint="leave --resume out: a training begins, or one that is finished is shown"
        )
    state = read_resume(path)
    if state["run"] != run_of(state.get("processes", 1)):
        hint = f"use the same, name another folder (--out DIR), or remove {path} to start anew without --resume"
        raise TrainError(f"{folder} was trained with {_describe_run(folder, config)}", hint=hint)
    return state


def _describe_run(folder: Path, config: TrainConfig) -> str:
    """Return what another run in a folder had otherwise."""
    try:
        others = describe_changes(read_settings(folder), config.model_dump())
    except (OSError, ValueError, UnsafeFileError):
        return "other settings or data"
    return f"other settings ({'; '.join(others)})" if others else "other data"


def read_resume(path: Path) -> dict[str, Any]:
    """Return the state in a resume.pt. Raises TrainError for a truncated file, or one of another program."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if not {"run", "step"} <= state.keys() or not isinstance(state["step"], int):
            raise ValueError("it is of another program")
    except Exception as error:  # noqa: BLE001  # whatever torch raises
        hint = f"remove {path}, and start anew without --resume"
        reason = one_line(error) if isinstance(error, OSError | ValueError) else "it is not what a training has written"
        raise TrainError(f"{path} is damaged: {reason}", hint=hint) from None
    return state


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Yield a list that gets Ctrl-C and SIGTERM, so that a step is finished and its state saved; the same a second time acts.

    A parent that was interrupted as well sends the other one: the step goes on.
    """
    noted: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        if number in noted:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        noted.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
