"""Decide what a training will be before it begins: its settings, by options, a file, a preset and the data, and its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import DECKS, SCENES
from pipeline.dataset.directory import LOCK_FILE, DatasetDir
from pipeline.dataset.version import Version, slugify
from pipeline.errors import ConfigError
from pipeline.storage.untrusted import UnsafeFileError
from trainer.config import TrainConfig, other_settings, read_data_digest, read_settings, resolve, usual_texts
from trainer.presets import choose_preset, usual_precision


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """The settings of a training, and its checkpoint folder."""

    config: TrainConfig
    folder: Path


def plan_training(
    version: Version,
    options: dict[str, Any],
    config_file: Path | None,
    out: Path | None,
    message: Callable[[str], None],
    *,
    resume: bool,
) -> PlannedTraining:
    """Return what a training on a version will be.

    `options` are settings that win over the file; those that nobody names follow from the version and this machine. A training
    that goes on has the settings with which it began.

    Raises ConfigError if the folder holds another captioner or an interrupted training, or if several could go on.
    """
    if resume and out is None and options.get("encoder") == options.get("decoder") == "auto":
        out = find_interrupted(version)
    if resume and config_file is None and out and (out / "train.json").exists():
        config_file = out / "train.json"
    config = choose_settings(version, options, config_file, message)
    name = slugify(f"{version.name}-{Path(config.encoder).name}-{Path(config.decoder).name}")
    folder = out or version.dataset_dir / "checkpoints" / name
    if resume and config_file is None and (folder / "train.json").exists():
        config = resolve(folder / "train.json", **options)
    if not resume:
        require_free(folder, config, version)
    return PlannedTraining(config, folder)


def choose_settings(
    version: Version, options: dict[str, Any], config_file: Path | None, message: Callable[[str], None]
) -> TrainConfig:
    """Return the settings that options and file come to; preset, encoder, precision and texts that are not named follow."""
    config = resolve(config_file, **options)
    is_drawn = version.manifest["source"]["name"] in (SCENES, DECKS)
    if config.preset == "auto" or (config.preset is None and config_file is None):
        num_images = version.manifest["rows"]["train"]
        preset = choose_preset(is_drawn=is_drawn, images=num_images, decoder=config.decoder)
        config = resolve(config_file, **options | {"preset": preset})

    # What imports torch takes seconds: only once paths and settings are right.
    from trainer.build import choose_encoder
    from trainer.devices import best_device, multiplies_bfloat16

    chosen: dict[str, Any] = {}
    if "encoder" not in config.model_fields_set:
        chosen["encoder"] = choose_encoder(message, is_drawn=is_drawn)
    if config.preset and "precision" not in config.model_fields_set:
        device = best_device()
        has_bfloat16 = multiplies_bfloat16(device)
        chosen["precision"] = usual_precision(config.preset, on_gpu=device.type == "cuda", has_bfloat16=has_bfloat16)
    if "text_source" not in config.model_fields_set:
        chosen["text_source"] = usual_texts(version.manifest)
    return config.model_copy(update=chosen)


def find_interrupted(version: Version) -> Path | None:
    """Return the folder of the only training of a dataset that was interrupted. Raises ConfigError if there are several."""
    folders = sorted(state.parent for state in (version.dataset_dir / "checkpoints").glob("*/resume.pt"))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise ConfigError(f"several trainings were interrupted: {names}", hint=f"name one: --out {folders[0]}")
    return folders[0] if folders else None


def is_training_folder(folder: Path) -> bool:
    """Return whether a folder is empty, or one that a training has made."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names <= {LOCK_FILE}:
        return True
    try:
        read_settings(folder)
    except (OSError, ValueError, UnsafeFileError):
        return False
    return True


def require_free(folder: Path, config: TrainConfig, version: Version) -> None:
    """Raise ConfigError if a folder holds a captioner of other settings or data, an interrupted training, or other things."""
    if others := other_settings(folder, config):
        problem = f"{folder} holds a captioner of other settings ({'; '.join(others)})"
        raise ConfigError(problem, hint="say where this one goes: --out DIR")
    if read_data_digest(folder) not in (None, version.manifest["digest"]):
        raise ConfigError(f"{folder} holds a captioner of other data", hint="say where this one goes: --out DIR")
    if (folder / "resume.pt").exists():
        with DatasetDir(folder).lock():  # a training that goes on holds it, and says so
            pass
        hint = f"go on with it: --resume; to start anew, remove {folder / 'resume.pt'}"
        raise ConfigError(f"{folder} holds a training that was interrupted", hint=hint)
    if folder.exists() and not is_training_folder(folder):
        hint = "say where the captioner goes: --out DIR, which is not there yet"
        raise ConfigError(f"{folder} holds other files, which a training would write over", hint=hint)
