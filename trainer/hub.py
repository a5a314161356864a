"""Find a captioner by name: a folder, or a repository of the Hub, whose files are downloaded once."""

from pathlib import Path

from huggingface_hub import snapshot_download

from pipeline.errors import TrainError
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from trainer.config import CAPTIONER_FILES


def find_captioner(name: str | Path) -> Path:
    """Return the folder of a captioner: the one that is named, or that of a download from the Hub.

    Only the settings, the tokenizer and the weights are fetched, and no code. Raises TrainError if there is no such
    repository, it holds no captioner, or the Hub does not answer and nothing is cached.
    """
    match = HUB_NAME.fullmatch(str(name))
    if not match or Path(name).exists():
        return Path(name).expanduser()
    repo, revision = match[1], match[2]
    with translate_hub_errors(str(name), "model", TrainError, "check the name and the network, then try again", or_folder=True):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CAPTIONER_FILES)))
    if missing := [file for file in CAPTIONER_FILES if not (folder / file).is_file()]:
        raise TrainError(f"{repo} is not a captioner of synth: it lacks {missing[0]}", hint="name another repository")
    return folder
