"""A checkpoint folder: it loads with `from_pretrained`, and training resumes from `resume.pt` (resume.py).

A checkpoint may be a stranger's, and is checked before it is loaded (checkpoint_checks.py). `log.jsonl` holds the training
curves (training_log.py), `captions.jsonl` the caption and scores of each test image.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers.initialization import no_init_weights

from pipeline.errors import TrainError, one_line
from pipeline.storage.files import flush_file, flush_folder, scratch_folder
from trainer.checkpoint_checks import read_config, read_tokenizer, require_shapes
from trainer.config import CAPTIONER_FILES, no_captioner, require_checkpoint
from trainer.distributed import best_device
from trainer.model.captioner import CaptionerModel
from trainer.prompts import scored_prompt
from trainer.tokenizer import CaptionTokenizer, TargetText


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained captioner with its tokenizer."""

    captioner: CaptionerModel
    tokenizer: CaptionTokenizer

    def scored_prompt(self) -> list[int]:
        """Return the tokens of the prompt that captions are scored with. Raises TrainError if it has learned answers alone."""
        source, style = scored_prompt(self.captioner.config.prompts)
        return self.tokenizer.prompt(TargetText(source, "", style=style))

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and tokenizer.json, each file atomically."""
        with scratch_folder(folder) as draft:
            try:
                self.captioner.without_adapters().save_pretrained(draft)
            except SafetensorError as error:  # as it says that the disk is full, too
                raise TrainError(
                    f"cannot write the weights to {folder}: {error}", hint="free some space, and go on: --resume"
                ) from None
            (draft / "model.safetensors").chmod((draft / "config.json").stat().st_mode)  # others may read the other files
            self.tokenizer.backend.save(str(draft / "tokenizer.json"))
            for name in CAPTIONER_FILES:
                flush_file(draft / name)
                (draft / name).replace(folder / name)
            flush_folder(folder)


def load_checkpoint(folder: Path | str, device: torch.device | None = None) -> Checkpoint:
    """Load a checkpoint folder in evaluation mode. Raises TrainError if the folder holds no valid captioner."""
    folder = Path(folder)
    require_checkpoint(folder)
    try:
        with without_network():
            checkpoint = _load(folder, device)
        _require_numbers(checkpoint.captioner, folder)
        return checkpoint
    except TrainError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever transformers raises for a config that is odd
        raise no_captioner(folder, one_line(error)) from None


def _require_numbers(captioner: CaptionerModel, folder: Path) -> None:
    """Raise TrainError for weights that are no numbers, which a damaged file may have: its captions would be empty."""
    if odd := [name for name, weights in captioner.named_parameters() if not torch.isfinite(weights.sum())]:
        raise no_captioner(folder, f"{odd[0]} has weights that are not numbers")


@contextmanager
def without_network() -> Iterator[None]:
    """Keep huggingface_hub from asking the Hub: the configs of some models fetch others."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load(folder: Path, device: torch.device | None) -> Checkpoint:
    config = read_config(folder)
    require_shapes(config, folder / "model.safetensors")
    tokenizer = read_tokenizer(folder / "tokenizer.json", config)
    # huggingface_hub prints to stdout, which is for data. Every weight is in the file: none needs a random value before.
    with redirect_stdout(StringIO()), no_init_weights():
        captioner = CaptionerModel.from_pretrained(str(folder), strict=True).eval().to(device or best_device())
    return Checkpoint(captioner, tokenizer)
