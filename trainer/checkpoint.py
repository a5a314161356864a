"""A checkpoint folder: it loads with `from_pretrained`, `resume.pt` goes on to the very bit, `log.jsonl` tells how."""

import json
import os
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from pipeline.errors import TrainError
from pipeline.store import write_json
from trainer.model.captioner import Captioner

FILES = ("config.json", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained captioner with the tokenizer that it writes with."""

    captioner: Captioner
    tokenizer: Tokenizer

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and tokenizer.json, each of them whole or not at all."""
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            self.captioner.save_pretrained(aside)
            self.tokenizer.save(str(Path(aside) / "tokenizer.json"))
            for name in FILES:
                (Path(aside) / name).replace(folder / name)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a checkpoint folder for use. Raises TrainError where it is none."""
    nothing = TrainError(f"no captioner in {folder}", hint="pass the folder that `synth train` printed")
    if not all((folder / name).exists() for name in FILES):
        raise nothing
    try:
        with redirect_stdout(StringIO()):  # huggingface_hub prints there, and stdout is for data
            captioner = Captioner.from_pretrained(str(folder)).eval()
    except (TypeError, KeyError, RuntimeError):  # somebody else's model
        raise nothing from None
    return Checkpoint(captioner, Tokenizer.from_file(str(folder / "tokenizer.json")))


def save_resume(folder: Path, captioner: Captioner, optimizer: torch.optim.Optimizer, step: int, best: float, run: str) -> None:
    """Keep all that the next step depends on, whole or not at all; `run` names the settings and the data."""
    state = {
        "captioner": captioner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": step,
        "best": best,
        "run": run,
    }
    aside = folder / ".resume.tmp"
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / "resume.pt")


def load_resume(folder: Path, captioner: Captioner, optimizer: torch.optim.Optimizer, run: str) -> tuple[int, float]:
    """Go back to where `save_resume` was; return the number of steps done and the best score so far."""
    path = folder / "resume.pt"
    if not path.exists():
        raise TrainError(f"nothing to resume in {folder}", hint="leave --resume out to start anew")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["run"] != run:
        raise TrainError(f"{folder} was trained with other settings or data", hint="use the same, or leave --resume out")
    captioner.load_state_dict(state["captioner"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return int(state["step"]), float(state["best"])


class Log:
    """`log.jsonl`: one JSON object a line; on resume, lines from later steps are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        kept = [line for line in read_log(path) if line["step"] <= first_step] if first_step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, **values: float | int | str) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; none where there is no log."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json beside the weights."""
    write_json(folder / "metrics.json", metrics)
