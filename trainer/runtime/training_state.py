"""The files of a training besides its weights: `resume.pt`, on which the next step depends, and `log.jsonl`, its curves.

A training is interrupted between two steps, so that its state is saved.
"""

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import TrainError, one_line
from pipeline.install import install_command
from pipeline.storage.files import atomic_write, read_json, remove, write_text
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from trainer.config import TrainConfig
from trainer.model.checkpoint import load_checkpoint
from trainer.runtime.checkpoint_folder import CAPTIONER_FILES, describe_changes, no_captioner, read_settings


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


def describe_checkpoint(folder: Path) -> str:
    """Return what a checkpoint folder holds, in words, after every file in it was read. Raises TrainError for a damaged one."""
    if not any((folder / name).exists() for name in CAPTIONER_FILES):
        if not (folder / "resume.pt").exists():
            return "a training that has saved nothing so far"
        return f"an unfinished training at step {read_resume(folder / 'resume.pt')['step']:,}, without a captioner so far"
    captioner = load_checkpoint(folder, torch.device("cpu")).captioner
    steps = max((entry["step"] for entry in read_log(folder / "log.jsonl")), default=0)
    parts = [
        f"a captioner of {sum(weights.numel() for weights in captioner.parameters()):,} weights",
        f"{steps:,} steps logged",
    ]
    for name in ("train.json", "metrics.json"):
        try:
            if (folder / name).exists():
                read_json(folder / name)
        except (OSError, ValueError, RecursionError, UnsafeFileError) as error:
            raise no_captioner(folder, f"{name} is damaged: {one_line(error)}") from None
    parts.append("scored" if (folder / "metrics.json").exists() else "not scored yet")
    if (folder / "resume.pt").exists():
        parts.append(f"a state to resume from at step {read_resume(folder / 'resume.pt')['step']:,}")
    return ", ".join(parts)
