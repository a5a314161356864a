"""Source: data sets of the Hugging Face Hub, pinned to a commit: their Parquet files, or the Hub's conversion to Parquet.

The Hub converts script-based repositories on a separate branch. Scripts are never run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import httpx2
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from pipeline.config import Config
from pipeline.dataset.licenses import GATED, UNDECLARED
from pipeline.errors import SourceError, one_line
from pipeline.sources.base import SourceSpec
from pipeline.sources.columns import open_mapped, read_mapping
from pipeline.sources.parquet import Tables, group_by_split
from pipeline.types import Source, SourceSlice

CONVERSION_BRANCH = "refs/convert/parquet"
BLOCK_BYTES = 1 << 20  # of one request; the default of 50 MB is more than a small --limit needs in all


def open_hub(name: str) -> Tables:
    """Return the tables of `ORG/NAME` or `ORG/NAME@REVISION`, pinned to a commit.

    Raise SourceError if the data set does not exist, is not accessible or has no Parquet files, or the Hub is unreachable.
    """
    repo, _, revision = name.partition("@")
    api = HfApi()
    with translate_errors(repo, api.endpoint):
        info = api.dataset_info(repo, revision=revision or None)
        commit, files = str(info.sha), _parquet(api, repo, str(info.sha))
        if not files and not revision:
            commit, files = _converted(api, repo)
    if not files:
        raise SourceError(
            f"{repo} holds no Parquet files, nor has the Hub converted it",
            hint="download it, and use --source folder:PATH or parquet:PATH",
        )
    files = _one_config(repo, files)
    card_license = info.card_data.get("license") if info.card_data else None
    licence = ", ".join(card_license) if isinstance(card_license, list) else card_license or UNDECLARED
    filesystem = HfFileSystem(endpoint=api.endpoint, skip_instance_cache=True)
    return Tables(
        name=repo,
        revision=commit,
        licence=f"{GATED}, {licence}" if info.gated else licence,
        files=files,
        open=lambda path: filesystem.open(
            f"datasets/{repo}@{commit}/{path}", "rb", block_size=BLOCK_BYTES, cache_type="readahead"
        ),
        translate_errors=partial(translate_errors, repo, api.endpoint),
    )


@contextmanager
def translate_errors(repo: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub's client into SourceError, one line with a hint."""
    try:
        yield
    except GatedRepoError:
        raise SourceError(
            f"{repo} is gated: its owner wants you to accept terms first",
            hint=f"accept them at {endpoint}/datasets/{repo}, then `hf auth login` with the same account",
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"no data set {repo} at {endpoint}, or no access to it", hint="check the name; `hf auth login` if it is private"
        ) from None
    except HFValidationError:
        raise SourceError(f"not the name of a data set: {repo}", hint="it looks like ORG/NAME") from None
    except HfHubHTTPError as error:
        raise SourceError(
            f"the Hub refused {repo} ({error.response.status_code}): {error.server_message or 'no message'}",
            hint="check the name and the revision, or try again later",
        ) from None
    except (OSError, httpx2.TransportError) as error:
        raise SourceError(
            f"cannot reach the Hub at {endpoint}: {one_line(error)}",
            hint="check the network; without one, --source scenes and folder:PATH work",
        ) from None


def _one_config(repo: str, files: dict[str | None, list[str]]) -> dict[str | None, list[str]]:
    """Return all files of a repository with one configuration (a folder), else those of `default`, or raise SourceError."""
    folders = {path.partition("/")[0] if path.count("/") > 1 else "" for paths in files.values() for path in paths}
    if len(folders) == 1:
        return files
    if "default" not in folders:
        raise SourceError(
            f"{repo} holds several tables: {', '.join(sorted(folders))}", hint="download the one you want, and use parquet:PATH"
        )
    default_files = {split: [path for path in paths if path.startswith("default/")] for split, paths in files.items()}
    return {split: paths for split, paths in default_files.items() if paths}


def _parquet(api: HfApi, repo: str, commit: str) -> dict[str | None, list[str]]:
    """Return the Parquet files at a commit by split, sorted."""
    paths = sorted(api.list_repo_files(repo, repo_type="dataset", revision=commit))
    return group_by_split(path for path in paths if path.endswith(".parquet"))


def _converted(api: HfApi, repo: str) -> tuple[str, dict[str | None, list[str]]]:
    try:
        commit = str(api.dataset_info(repo, revision=CONVERSION_BRANCH).sha)
    except GatedRepoError:
        raise
    except HfHubHTTPError:
        return "", {}
    return commit, _parquet(api, repo, commit)


def _open(config: Config, repo: str, part: SourceSlice) -> Source:
    tables, name = replace(open_hub(repo), part=part), f"hub:{repo.partition('@')[0]}"
    columns = read_mapping(tables.schema, config.columns)
    return open_mapped(tables, columns, config.source_split, name, allow_urls=config.allow_urls)


SPEC = SourceSpec(
    name="hub:ORG/NAME",
    what="any data set of the Hub that is Parquet, or that the Hub has converted; @REVISION pins another commit",
    splits="as upstream files them",
    size="streamed: --limit downloads little",
    license="as its card says",
    needs="the Hub, a vision-language model",
    example="synth generate --source hub:ORG/NAME --split train --limit 1000",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls"}),
)
