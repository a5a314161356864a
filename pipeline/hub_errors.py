"""Errors of the Hub's client in words of this project: what became of a repository, and what to do next."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pipeline.errors import SynthError, one_line

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")  # ORG/NAME, or ORG/NAME@REVISION


@contextmanager
def translate_hub_errors(
    name: str, kind: Literal["dataset", "model"], error_type: type[SynthError], offline: str, *, or_folder: bool = False
) -> Iterator[None]:
    """Turn errors of huggingface_hub about a repository, ORG/NAME or ORG/NAME@REVISION, into one of ours, with a hint.

    `offline`: what to do where the Hub does not answer. `or_folder`: the name might have been that of a local folder, too.
    """
    try:
        yield
    except Exception as error:
        problem_and_hint = _explain(error, name, kind)
        if problem_and_hint is None:
            raise
        problem, hint = problem_and_hint
        before = f"{name} is not a folder here; " if or_folder else ""
        raise error_type(f"{before}{problem}", hint=hint or offline) from None


def _explain(error: Exception, name: str, kind: str) -> tuple[str, str] | None:
    """Return what happened and a hint, which is empty where the Hub does not answer; None for an error of something else."""
    import httpx2
    from huggingface_hub import constants, errors

    repo, _, revision = name.partition("@")
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
            hint = f"accept them at {page}, then `hf auth login` with the same account"
            return f"{repo} is gated: its owner wants you to accept terms first", hint
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision}", "name a branch, a tag or a commit, or leave it out for the newest"
        case errors.RepositoryNotFoundError():
            hint = "check the name; `hf auth login` if it is private"
            return f"no {kind} {repo} at {constants.ENDPOINT}, or no access to it", hint
        case errors.HFValidationError():
            return f"not the name of a {kind}: {name}", "it looks like ORG/NAME"
        case errors.LocalEntryNotFoundError() | httpx2.TransportError() | ConnectionError() | TimeoutError():
            return f"the Hub at {constants.ENDPOINT} does not answer, and {name} is not in the cache: {one_line(error)}", ""
        case errors.HfHubHTTPError():
            answer = f"{error.response.status_code}): {error.server_message or 'no message'}"
            return f"the Hub refused {name} ({answer}", "check the name and the revision, or try again later"
        case OSError():
            return f"cannot fetch {name}: {one_line(error)}", "see that the disk has room and may be written to, then try again"
    return None
