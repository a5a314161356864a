"""Errors of the Hub's client are translated, with a hint."""

import errno

import httpx2
import pytest
from huggingface_hub import errors

from pipeline.errors import SourceError, StoreError
from pipeline.hub_errors import translate_hub_errors

NAME = "me/cats@v2"
OFFLINE = "check the network"
SILENT = f"does not answer, and {NAME} is not in the cache"
UNREACHABLE = "does not answer: "
REQUEST = httpx2.Request("GET", "https://hub.example")
UNKNOWN, FORBIDDEN, NOT_FOUND, FAILED = (
    httpx2.Response(status, request=REQUEST) for status in (401, 403, 404, 500)
)
GATED = errors.GatedRepoError("x", response=FORBIDDEN)
MISSING = errors.RepositoryNotFoundError("x", response=NOT_FOUND)
BROKEN = errors.HfHubHTTPError("x", response=FAILED, server_message="on fire")
FULL = OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize(
    ("error", "problem", "hint"),
    [
        (GATED, "me/cats is gated", "/datasets/me/cats, then run `hf auth login`"),
        (errors.RevisionNotFoundError("x", response=NOT_FOUND), "me/cats has no revision v2", "a branch"),
        (MISSING, "no dataset me/cats at https://", "check the name"),
        (BROKEN, f"refused {NAME} (500): on fire", "later"),
        (errors.HFValidationError("x"), f"not the name of a dataset: {NAME}", "ORG/NAME"),
        (errors.LocalEntryNotFoundError("x"), SILENT, OFFLINE),
        (errors.OfflineModeIsEnabled("x"), UNREACHABLE, OFFLINE),
        (httpx2.ConnectError("x"), UNREACHABLE, OFFLINE),
        (TimeoutError(), UNREACHABLE, OFFLINE),
        (errors.LocalTokenNotFoundError("x"), "no Hub token", "hf auth login"),
        (errors.HfHubHTTPError("x", response=UNKNOWN), "the Hub rejects the token", "hf auth login"),
        (errors.HfHubHTTPError("x", response=FORBIDDEN), "token has no access to me/cats", "write access"),
        (FULL, f"cannot read or write files of {NAME}: [Errno 28] No space left", "has free space"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_client_error_becomes_one_line_with_hint(error: Exception, problem: str, hint: str) -> None:
    with pytest.raises(SourceError) as caught, translate_hub_errors(NAME, "dataset", SourceError, OFFLINE):
        raise error
    assert problem in str(caught.value) and hint in caught.value.hint
    translated = translate_hub_errors(NAME, "model", StoreError, OFFLINE, or_folder=True)
    with pytest.raises(StoreError, match=f"^{NAME} is not a local folder; "), translated:
        raise error


@pytest.mark.parametrize("error", [StoreError("ours"), ZeroDivisionError()])
def test_unrelated_error_is_raised_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, translate_hub_errors(NAME, "dataset", SourceError, OFFLINE):
        raise error
    assert caught.value is error
