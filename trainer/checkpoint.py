"""A checkpoint folder: it loads with `from_pretrained`, and training resumes from `resume.pt`.

`log.jsonl` holds the training curves, `captions.jsonl` the caption and scores of each test image.
"""

import json
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from pipeline.errors import TrainError
from pipeline.install import install_command
from pipeline.storage.files import atomic_write, remove, write_text
from trainer.config import CAPTIONER_FILES, no_captioner, require_checkpoint
from trainer.distributed import best_device
from trainer.model.captioner import Captioner
from trainer.tokenizer import CaptionTokenizer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained captioner with its tokenizer."""

    captioner: Captioner
    words: CaptionTokenizer

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and tokenizer.json, each file atomically."""
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            self.captioner.save_pretrained(draft)
            self.words.tokenizer.save(str(Path(draft) / "tokenizer.json"))
            for name in CAPTIONER_FILES:
                (Path(draft) / name).replace(folder / name)


def load_checkpoint(folder: Path | str, device: torch.device | None = None) -> Checkpoint:
    """Load a checkpoint folder in evaluation mode. Raises TrainError if the folder holds no valid captioner."""
    folder = Path(folder)
    require_checkpoint(folder)
    try:
        with redirect_stdout(StringIO()):  # huggingface_hub prints there, and stdout is for data
            captioner = Captioner.from_pretrained(str(folder), strict=True).eval().to(device or best_device())
    except (TypeError, KeyError, RuntimeError, ValueError, SafetensorError):  # another kind of model, or a truncated file
        raise no_captioner(folder) from None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if "language_model" in captioner.config.decoder:
        return Checkpoint(captioner, CaptionTokenizer(tokenizer, "pretrained", captioner.config.eos_id))
    tokenizer.encode_special_tokens = True
    return Checkpoint(captioner, CaptionTokenizer(tokenizer, "scratch", captioner.config.eos_id))


def save_resume(folder: Path, state: dict[str, Any]) -> None:
    """Write the state that the next step depends on to resume.pt, atomically."""
    with atomic_write(folder / "resume.pt") as draft:
        torch.save(state, draft)


def load_resume(folder: Path, run: str) -> dict[str, Any]:
    """Return the state that `save_resume` wrote. Raises TrainError if there is none, or if another run wrote it."""
    path = folder / "resume.pt"
    if not path.exists():
        raise TrainError(f"nothing to resume in {folder}", hint="leave --resume out to start anew")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state["run"] != run:
        raise TrainError(f"{folder} was trained with other settings or data", hint="use the same, or leave --resume out")
    return state


def write_captions(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the caption and scores of each image as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, **values: float | int | str) -> None:
        """Append one line, and a point to each TensorBoard curve; each stage has its own curves."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self._curves:
            for name, value in values.items():
                if name != "step" and not isinstance(value, str):
                    self._curves.add_scalar(f"{values.get('stage', 'validation')}/{name}", value, values["step"])
            self._curves.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log, or an empty list if the file does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def require_tensorboard() -> None:
    """Raise TrainError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise TrainError("TensorBoard is not installed", hint=install_command("export")) from None
