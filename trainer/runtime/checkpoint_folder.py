"""Find checkpoint folders, and compare their settings with those of a new run. Loads no weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.dataset.card import list_training_data
from pipeline.dataset.directory import LOCK_FILE, DatasetDir
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, TrainError, did_you_mean, one_line
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from pipeline.storage.files import read_json
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from trainer.config import TrainConfig

CAPTIONER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
MAX_CONFIG_BYTES = 10_000_000
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, UnsafeFileError)


def find_captioner(name: str | Path) -> Path:
    """Return a captioner's folder. Downloads its files (but no code) if `name` is a Hub repository.

    Raises TrainError if there is no captioner, or if the Hub does not answer and the captioner is not cached.
    """
    match = HUB_NAME.fullmatch(str(name))
    if not match or Path(name).exists():
        folder = Path(name).expanduser()
        require_checkpoint(folder)
        return folder
    from huggingface_hub import snapshot_download  # a folder does not need this slow import

    repo, revision = match[1], match[2]
    hint = "check the name and the network, then try again"
    with translate_hub_errors(str(name), "model", TrainError, hint, or_folder=True):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CAPTIONER_FILES)))
    if missing := [file for file in CAPTIONER_FILES if not (folder / file).is_file()]:
        problem = f"{repo} is not a captioner made by synth: it lacks {missing[0]}"
        raise TrainError(problem, hint="pass the repository of a captioner")
    return folder


def no_captioner(folder: Path, reason: str) -> TrainError:
    """Return the error to raise for a folder without a valid captioner."""
    return TrainError(f"no captioner in {folder}: {reason}", hint="pass a folder of `synth train`")


def require_checkpoint(folder: Path) -> None:
    """Raise TrainError if the folder lacks a file of a captioner."""
    if missing := [name for name in CAPTIONER_FILES if not (folder / name).is_file()]:
        raise no_captioner(folder, f"it lacks {missing[0]}")


def require_learned(prompts: Sequence[tuple[str, str]], style: str | None = None, question: str = "") -> None:
    """Raise TrainError if a captioner has not learned the style or, given a question, to answer questions.

    `style` None means any style. `prompts` are pairs of source and style. The style of answers is "".
    """
    styles = list(dict.fromkeys(learned for _, learned in prompts if learned))
    if question:
        if all(learned for _, learned in prompts):
            hint = f"leave out --question: it writes captions ({', '.join(styles)})"
            raise TrainError("the captioner was not trained to answer questions", hint=hint)
    elif not styles:
        raise TrainError("the captioner was trained only on questions", hint="ask a question: --question")
    elif style and style not in styles:
        hint = did_you_mean(style, styles, f"choose one of {', '.join(styles)}")
        raise TrainError(f"the captioner was not trained on the style {style}", hint=hint)


def require_prompt(folder: Path, style: str | None, question: str = "") -> None:
    """Call `require_learned` for the captioner in a folder without loading its weights."""
    try:
        config = json.loads(read_regular(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
        prompts = [(str(source), str(learned)) for source, learned in config["prompts"]]
    except READ_ERRORS as error:
        raise no_captioner(folder, one_line(error)) from None
    require_learned(prompts, style, question)


def read_models(folder: Path) -> dict[str, Any]:
    """Return the settings of a new run that the captioner in a folder determines, without its weights."""
    try:
        config = json.loads(read_regular(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
        encoder = config["encoder"]
        return {
            "encoder": str(encoder["made_from"]["name"]),
            "encoder_layer": encoder["layer"],
            "encoder_states": encoder["states"],
            "decoder": str(config["data"]["decoder"]),
        }
    except READ_ERRORS as error:
        lacks = "its config.json lacks " if isinstance(error, KeyError) else ""
        raise no_captioner(folder, f"{lacks}{one_line(error)}") from None


def read_settings(folder: Path) -> TrainConfig:
    """Read the settings of the training run in a folder. Raises one of READ_ERRORS."""
    return TrainConfig.model_validate(read_json(folder / "train.json"))


def other_settings(folder: Path, config: TrainConfig) -> list[str]:
    """Describe how settings differ from a finished run, as in "batch_size 64, now 32".

    Returns an empty list if the folder has no finished run.
    """
    if not (folder / "metrics.json").exists():
        return []
    try:
        trained = read_settings(folder)
    except READ_ERRORS:
        return ["train.json cannot be read"]
    return describe_changes(trained, config.model_dump(exclude={"preset"}))


def describe_changes(trained: TrainConfig, values: dict[str, Any]) -> list[str]:
    """Describe each setting whose new value differs from an earlier run."""

    def shown(value: Any) -> str:
        return "unset" if value is None else json.dumps(value, default=str, ensure_ascii=False)

    before = {name: getattr(trained, name) for name in values}
    changed = [name for name, value in values.items() if before[name] != value]
    return [f"{name} {shown(before[name])}, now {shown(values[name])}" for name in changed]


def describe_difference(folder: Path, config: TrainConfig) -> str:
    """Describe how the run in a folder differs from a run with these settings."""
    try:
        changes = describe_changes(read_settings(folder), config.model_dump())
    except READ_ERRORS:
        return "other settings or data"
    return f"other settings ({', '.join(changes)})" if changes else "other data"


def read_data_digests(folder: Path) -> list[str]:
    """Return the digests of the data of all trainings, the last one first, or [] if they cannot be read."""
    try:
        data = read_json(folder / "config.json")["data"]
        return [str(part["digest"]) for part in list_training_data(data)]
    except READ_ERRORS:
        return []


def find_interrupted(version: Version) -> Path | None:
    """Return the folder of the dataset's interrupted run, or None. Raises ConfigError for several runs."""
    folders = sorted(state.parent for state in (version.dataset_dir / "checkpoints").glob("*/resume.pt"))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        hint = f"choose one: --out {folders[0]}"
        raise ConfigError(f"several training runs were interrupted: {names}", hint=hint)
    return folders[0] if folders else None


def is_training_folder(folder: Path) -> bool:
    """Return whether a folder is empty or was written by a training run."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names <= {LOCK_FILE}:
        return True
    try:
        read_settings(folder)
    except READ_ERRORS:
        return False
    return True


def require_free(folder: Path, config: TrainConfig, version: Version) -> None:
    """Raise ConfigError if a run would overwrite other files, or a captioner with other settings or data."""
    hint = "choose a new folder: --out DIR"
    if others := other_settings(folder, config):
        raise ConfigError(
            f"{folder} has a captioner trained with other settings ({', '.join(others)})", hint=hint
        )
    trained_on = read_data_digests(folder) if (folder / "metrics.json").exists() else []
    if trained_on and trained_on[0] != version.manifest["digest"]:
        raise ConfigError(f"{folder} has a captioner trained on other data", hint=hint)
    if (folder / "resume.pt").exists():
        with DatasetDir(folder).lock():  # raises an error if that run is still in progress
            pass
        resume_hint = f"continue it with --resume, or remove {folder / 'resume.pt'} to start again"
        raise ConfigError(f"{folder} has an interrupted training run", hint=resume_hint)
    if folder.exists() and not is_training_folder(folder):
        raise ConfigError(f"{folder} has other files, which training would overwrite", hint=hint)
