"""Package a captioner for the Hub."""

from pathlib import Path

from pipeline.hub.package import Package, build_checkpoint_package
from trainer.config import DECODERS, ENCODERS
from trainer.publish.transformers_files import transformers_files


def package_captioner(folder: Path, repo: str) -> Package:
    """Return the package to push for a checkpoint folder. Raises TrainError if the captioner is damaged."""
    if (folder / "model.safetensors").is_file():
        from trainer.model.checkpoint import load_checkpoint  # imports torch

        load_checkpoint(folder)
    return build_checkpoint_package(folder, repo, transformers_files, {**ENCODERS, **DECODERS})
