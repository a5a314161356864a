"""Say in words what a checkpoint folder holds."""

from pathlib import Path

import torch

from pipeline.errors import one_line
from pipeline.storage.files import read_json
from pipeline.storage.untrusted import UnsafeFileError
from trainer.checkpoint import load_checkpoint
from trainer.config import CAPTIONER_FILES, no_captioner
from trainer.loop.resume import read_resume
from trainer.loop.training_log import read_log


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
