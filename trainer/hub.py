"""Find a captioner by name: a folder, or a repository of the Hub, whose files are downloaded once."""

import re
from pathlib import Path

import httpx2
from huggingface_hub import errors, snapshot_download

from pipeline.errors import TrainError, one_line
from trainer.config import CAPTIONER_FILES

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")


def find_captioner(name: str | Path) -> Path:
    """Return the folder of a captioner: the one that is named, or that of a download from the Hub.

    Only the settings, the tokenizer and the weights are fetched, and no code. Raises TrainError if there is no such
    repository, it holds no captioner, or the Hub does not answer and nothing is cached.
    """
    match = _NAME.fullmatch(str(name))
    if not match or Path(name).exists():
        return Path(name).expanduser()
    repo, revision = match[1], match[2]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CAPTIONER_FILES)))
    except errors.GatedRepoError:
        raise TrainError(f"{repo} is gated", hint="accept its terms on its page, and log in with `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise TrainError(f"{repo} has no revision {revision}", hint="leave @REVISION out for the newest one") from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private one needs `hf auth login`"
        raise TrainError(f"no folder and no model of the Hub: {name}", hint=hint) from None
    except (OSError, httpx2.TransportError, errors.HFValidationError) as error:
        problem = f"{name} is no folder here and not in the cache, and the Hub does not answer: {one_line(error)}"
        raise TrainError(problem, hint="check the name and the network, then try again") from None
    if missing := [file for file in CAPTIONER_FILES if not (folder / file).is_file()]:
        raise TrainError(f"{repo} is no captioner of synth: it lacks {missing[0]}", hint="name another repository")
    return folder
