"""Translate errors from the Hub client into errors with a clear message and a hint."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pipeline.errors import SynthError, one_line

LOGIN_HINT = "log in with `hf auth login`, or set HF_TOKEN"
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?")  # ORG/NAME, or ORG/NAME@REVISION


@contextmanager
def translate_hub_errors(
    name: str,
    kind: Literal["dataset", "model"],
    error_type: type[SynthError],
    offline: str,
    *,
    or_folder: bool = False,
) -> Iterator[None]:
    """Turn huggingface_hub errors about ORG/NAME or ORG/NAME@REVISION into `error_type`.

    `offline` is the hint if the Hub does not answer. With `or_folder`, `name` could also be a local folder.
    """
    try:
        yield
    except Exception as error:
        if (explained := _explain(error, name, kind)) is None:
            raise
        problem, hint = explained
        prefix = f"{name} is not a local folder; " if or_folder else ""
        raise error_type(f"{prefix}{problem}", hint=hint or offline) from None


def _explain(error: Exception, name: str, kind: str) -> tuple[str, str] | None:
    """Return the problem and a hint for a Hub, network or disk error, or None for any other error."""
    import httpx2
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    repo, _, revision = name.partition("@")
    match error:
        case errors.LocalTokenNotFoundError():
            return "no Hub token", LOGIN_HINT
        case errors.GatedRepoError():
            page = f"{ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
            hint = f"accept them at {page}, then run `hf auth login` with the same account"
            return f"{repo} is gated: its owner requires you to accept terms first", hint
        case errors.RevisionNotFoundError():
            hint = "pass a branch, a tag or a commit; default: the newest commit"
            return f"{repo} has no revision {revision}", hint
        case errors.RepositoryNotFoundError():
            hint = "check the name; run `hf auth login` if it is private"
            return f"no {kind} {repo} at {ENDPOINT}, or no access to it", hint
        case errors.HFValidationError():
            return f"not the name of a {kind}: {name}", "a name has the form ORG/NAME"
        case errors.LocalEntryNotFoundError():
            problem = f"the Hub at {ENDPOINT} does not answer, and {name} is not in the cache"
            return f"{problem}: {one_line(error.__cause__ or error)}", ""
        case httpx2.TransportError() | ConnectionError() | TimeoutError():
            return f"the Hub at {ENDPOINT} does not answer: {one_line(error)} ({name})", ""
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "the Hub rejects the token", LOGIN_HINT
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            return f"the token has no access to {repo}", "use a token with access; a push needs write access"
        case errors.HfHubHTTPError():
            hint = "check the name and the revision, or try again later: finished transfers are kept"
            status, message = error.response.status_code, error.server_message or "no message"
            return f"the Hub refused {name} ({status}): {message}", hint
        case OSError():
            hint = "check that the disk is writable and has free space, then try again"
            return f"cannot read or write files of {name}: {one_line(error)}", hint
    return None
