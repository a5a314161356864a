"""Checkpoint folders, without loading any weights: find one, and tell which training it belongs to."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from pipeline.dataset.directory import LOCK_FILE, DatasetDir
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, TrainError
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from pipeline.storage.files import read_json
from pipeline.storage.untrusted import UnsafeFileError
from trainer.config import DERIVED_KEYS, TrainConfig

PUBLISHED_TYPE = "synth_captioner"  # the model type of a captioner for transformers
CAPTIONER_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def find_captioner(name: str | Path) -> Path:
    """Return the folder of a captioner: the one that is named, or that of a download from the Hub.

    Only the settings, the tokenizer and the weights are fetched, and no code. Raises TrainError if there is no such
    repository, it or the folder holds no captioner, or the Hub does not answer and nothing is cached.
    """
    match = HUB_NAME.fullmatch(str(name))
    if not match or Path(name).exists():
        folder = Path(name).expanduser()
        require_checkpoint(folder)
        return folder
    repo, revision = match[1], match[2]
    with translate_hub_errors(str(name), "model", TrainError, "check the name and the network, then try again", or_folder=True):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CAPTIONER_FILES)))
    if missing := [file for file in CAPTIONER_FILES if not (folder / file).is_file()]:
        raise TrainError(f"{repo} is not a captioner of synth: it lacks {missing[0]}", hint="name another repository")
    return folder


def no_captioner(folder: Path, reason: str = "") -> TrainError:
    """Return the error that a folder holds no captioner."""
    return TrainError(
        f"no captioner in {folder}{f': {reason}' if reason else ''}", hint="pass the folder that `synth train` printed"
    )


def require_checkpoint(folder: Path) -> None:
    """Raise TrainError if a folder lacks a file of a captioner. Nothing is loaded: the import of torch alone takes a second."""
    if missing := [name for name in CAPTIONER_FILES if not (folder / name).is_file()]:
        raise no_captioner(folder, f"it lacks {missing[0]}")


def read_settings(folder: Path) -> TrainConfig:
    """Return the settings of the training in a folder. Raise OSError, ValueError or UnsafeFileError if it has none."""
    return TrainConfig.model_validate(read_json(folder / "train.json"))


def other_settings(folder: Path, config: TrainConfig) -> list[str]:
    """Return which settings the finished captioner in a folder was trained with otherwise, such as `batch_size 64, now 32`."""
    if not (folder / "metrics.json").exists():
        return []
    try:
        trained = read_settings(folder)
    except (OSError, ValueError, UnsafeFileError):
        return ["train.json cannot be read"]
    given = config.model_dump(exclude_unset=True)
    derived = {"preset", *DERIVED_KEYS, *(["align_steps"] if config.align_epochs else [])}
    compared = {name: value for name, value in TrainConfig().model_dump().items() if name not in derived} | given
    return describe_changes(trained, {name: value for name, value in compared.items() if name != "preset"})


def describe_changes(trained: TrainConfig, values: dict[str, Any]) -> list[str]:
    """Return which of these values of settings are others than those of a training, with both."""
    before = {name: getattr(trained, name) for name in values}
    changed = [name for name, value in values.items() if before[name] != value]
    return [f"{name} {_shown(before[name])}, now {_shown(values[name])}" for name in changed]


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, default=str, ensure_ascii=False)


def read_data_digest(folder: Path) -> str | None:
    """Return the digest of the data of the captioner in a folder; None if its config does not state it."""
    try:
        return str(read_json(folder / "config.json")["data"]["digest"])
    except (OSError, ValueError, LookupError, TypeError, UnsafeFileError):
        return None


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
    if (folder / "metrics.json").exists() and read_data_digest(folder) not in (None, version.manifest["digest"]):
        raise ConfigError(f"{folder} holds a captioner of other data", hint="say where this one goes: --out DIR")
    if (folder / "resume.pt").exists():
        with DatasetDir(folder).lock():  # a training that goes on holds it, and says so
            pass
        hint = f"go on with it: --resume; to start anew, remove {folder / 'resume.pt'}"
        raise ConfigError(f"{folder} holds a training that was interrupted", hint=hint)
    if folder.exists() and not is_training_folder(folder):
        hint = "say where the captioner goes: --out DIR, which is not there yet"
        raise ConfigError(f"{folder} holds other files, which a training would write over", hint=hint)
