"""Find captioners and check checkpoint folders, without loading weights."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.dataset.card import list_training_data
from pipeline.dataset.directory import LOCK_FILE, DatasetDir
from pipeline.errors import ConfigError, TrainError, one_line
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from pipeline.storage.files import read_json
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from trainer.config import TrainConfig

CAPTIONER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
MAX_CONFIG_BYTES = 10_000_000
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, RecursionError, UnsafeFileError)


def find_captioner(name: str | Path) -> Path:
    """Return a captioner's folder. If `name` is a Hub repository, its files are downloaded, but no code.

    Raises TrainError if there is no captioner, or if it is not cached and the Hub does not answer.
    """
    match = HUB_NAME.fullmatch(str(name))
    if not match or Path(name).exists():
        folder = Path(name).expanduser()
        require_checkpoint(folder)
        return folder
    from huggingface_hub import snapshot_download

    repo, revision = match[1], match[2]
    hint = "check the name and the network, then try again"
    with translate_hub_errors(str(name), "model", TrainError, hint, or_folder=True):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CAPTIONER_FILES)))
    require_checkpoint(folder)
    return folder


def no_captioner(folder: Path, reason: str) -> TrainError:
    """Return the error to raise for a folder without a valid captioner."""
    return TrainError(f"no captioner in {folder}: {reason}", hint="pass a folder of `synth train`")


def require_checkpoint(folder: Path) -> None:
    """Raise TrainError if the folder lacks a file of a captioner."""
    if missing := [name for name in CAPTIONER_FILES if not (folder / name).is_file()]:
        raise no_captioner(folder, f"it lacks {missing[0]}")


def require_learned(prompts: Sequence[tuple[str, str]], style: str | None = None, question: str = "") -> None:
    """Raise TrainError if a captioner has not learned the style, or to answer a `question`.

    A `style` of None means any style. `prompts` are (source, style) pairs. Answers have the style "".
    """
    styles = list(dict.fromkeys(learned for _, learned in prompts if learned))
    if question:
        if all(learned for _, learned in prompts):
            hint = f"leave out --question, to get captions ({', '.join(styles)})"
            raise TrainError("the captioner was not trained to answer questions", hint=hint)
    elif not styles:
        raise TrainError("the captioner was trained only on questions", hint="ask a question: --question")
    elif style and style not in styles:
        problem = f"the captioner was not trained on the style {style}"
        raise TrainError(problem, unknown=style, known=styles, hint=f"choose one of {', '.join(styles)}")


def require_prompt(folder: Path, style: str | None, question: str = "") -> None:
    """Call `require_learned` for the captioner in a folder without loading its weights."""
    with _config_of(folder) as config:
        prompts = [(str(source), str(learned)) for source, learned in config["prompts"]]
    require_learned(prompts, style, question)


def read_models(folder: Path) -> dict[str, Any]:
    """Return the settings that a run must copy from the captioner it continues. Loads no weights."""
    with _config_of(folder) as config:
        encoder = config["encoder"]
        return {
            "encoder": str(encoder["made_from"]["name"]),
            "encoder_states": encoder["states"],
            "decoder": str(config["data"]["decoder"]),
        }


@contextmanager
def _config_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the config.json of a captioner. Raises TrainError if it is damaged or lacks a key."""
    try:
        yield json.loads(read_regular(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
    except READ_ERRORS as error:
        lacks = "its config.json lacks " if isinstance(error, KeyError) else ""
        raise no_captioner(folder, f"{lacks}{one_line(error)}") from None


def read_data_digests(folder: Path) -> list[str]:
    """Return the digests of the datasets of a captioner, newest first, or [] if unreadable."""
    try:
        data = read_json(folder / "config.json")["data"]
        return [str(part["digest"]) for part in list_training_data(data)]
    except READ_ERRORS:
        return []


def read_settings(folder: Path) -> TrainConfig:
    """Read the settings of the training run in a folder. Raises one of READ_ERRORS."""
    return TrainConfig.model_validate(read_json(folder / "train.json"))


def describe_difference(folder: Path, config: TrainConfig) -> str:
    """Describe how the run in a folder differs from a run with these settings."""
    try:
        before = read_settings(folder).digest_values()
    except READ_ERRORS:
        return "other settings or data"
    values = config.digest_values()
    changes = [
        f"{name} {json.dumps(before[name])}, now {json.dumps(value)}"
        for name, value in values.items()
        if before[name] != value
    ]
    return f"other settings ({', '.join(changes)})" if changes else "other data or other initial weights"


def require_free(folder: Path) -> None:
    """Raise ConfigError if a folder has an interrupted run, or files that no training wrote."""
    if (folder / "resume.pt").exists():
        # This raises an error if that run is still in progress.
        with DatasetDir(folder).lock():
            pass
        hint = f"continue it with --resume, or remove {folder / 'resume.pt'} to start again"
        raise ConfigError(f"{folder} has an interrupted training run", hint=hint)
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_FILE}):
        return
    try:
        read_settings(folder)
    except READ_ERRORS:
        problem = f"{folder} has other files, which training would overwrite"
        raise ConfigError(problem, hint="choose a new folder: --out DIR") from None
