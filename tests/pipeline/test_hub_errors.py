"""Errors of the Hub's client become one of ours, which says what became of the repository and what to do next."""

import errno

import httpx2
import pytest
from huggingface_hub import errors

from pipeline.errors import SourceError, StoreError
from pipeline.hub_errors import translate_hub_errors


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example"))


OFFLINE = "check the network"
SILENT = "does not answer, and me/cats@v2 is not in the cache"
NAME = "me/cats@v2"


@pytest.mark.parametrize(
    ("error", "problem", "hint"),
    [
        (
            errors.GatedRepoError("x", response=answer(403)),
            "me/cats is gated",
            "/datasets/me/cats, then `hf auth login`",
        ),
        (errors.RevisionNotFoundError("x", response=answer(404)), "me/cats has no revision v2", "a branch"),
        (
            errors.RepositoryNotFoundError("x", response=answer(404)),
            "no dataset me/cats at https://",
            "check the name",
        ),
        (
            errors.HfHubHTTPError("x", response=answer(500), server_message="on fire"),
            "refused me/cats@v2 (500): on fire",
            "later",
        ),
        (errors.HFValidationError("x"), "not the name of a dataset: me/cats@v2", "ORG/NAME"),
        (errors.LocalEntryNotFoundError("x"), SILENT, OFFLINE),
        (errors.OfflineModeIsEnabled("x"), SILENT, OFFLINE),
        (httpx2.ConnectError("x"), SILENT, OFFLINE),
        (TimeoutError(), SILENT, OFFLINE),
        (
            OSError(errno.ENOSPC, "No space left"),
            "cannot fetch me/cats@v2: [Errno 28] No space left",
            "the disk has room",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_client_error_becomes_one_line_with_hint(error: Exception, problem: str, hint: str) -> None:
    with pytest.raises(SourceError) as caught, translate_hub_errors(NAME, "dataset", SourceError, OFFLINE):
        raise error
    assert problem in str(caught.value) and hint in caught.value.hint
    with (
        pytest.raises(StoreError) as other,
        translate_hub_errors(NAME, "model", StoreError, OFFLINE, or_folder=True),
    ):
        raise error
    assert str(other.value).startswith("me/cats@v2 is not a folder here; ")


@pytest.mark.parametrize("error", [StoreError("ours"), ZeroDivisionError()])
def test_unrelated_error_is_raised_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, translate_hub_errors(NAME, "dataset", SourceError, OFFLINE):
        raise error
    assert caught.value is error
