"""Source: data sets of the Hugging Face Hub, pinned to a commit: their Parquet files, or the Hub's conversion to Parquet.

The Hub converts script-based repositories on a separate branch. Scripts are never run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, cast

from pipeline.config import Config
from pipeline.dataset.licenses import GATED, UNDECLARED
from pipeline.errors import SourceError, one_line
from pipeline.sources.base import SourceSpec
from pipeline.sources.columns import open_mapped, read_mapping
from pipeline.sources.parquet import Tables, group_by_split
from pipeline.types import Source, SourceSlice

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONVERSION_BRANCH = "refs/convert/parquet"
BLOCK_BYTES = 1 << 20  # of one request; the default of 50 MB is more than a small --limit needs in all


def open_hub(name: str) -> Tables:
    """Return the tables of ORG/NAME or ORG/NAME@REVISION, pinned to a commit. Raise SourceError if they cannot be read."""
    from huggingface_hub import HfApi, HfFileSystem  # half of the time in which a command starts that does not need them

    repo, _, revision = name.partition("@")
    api = HfApi()
    with translate_errors(repo, api.endpoint):
        info = api.dataset_info(repo, revision=revision or None)
        commit, files = str(info.sha), _parquet(api, repo, str(info.sha))
        if not files and not revision:
            commit, files = _converted(api, repo)
    if not files:
        hint = "download it, and use --source folder:PATH or parquet:PATH"
        raise SourceError(f"{repo} holds no Parquet files, nor has the Hub converted it", hint=hint)
    files = _one_config(repo, files)
    card_license = info.card_data.get("license") if info.card_data else None
    licence = ", ".join(card_license) if isinstance(card_license, list) else card_license or UNDECLARED
    filesystem = HfFileSystem(endpoint=api.endpoint, skip_instance_cache=True)
    licence = f"{GATED}, {licence}" if info.gated else licence

    def open_file(path: str) -> BinaryIO:
        name = f"datasets/{repo}@{commit}/{path}"
        return cast(BinaryIO, filesystem.open(name, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))

    return Tables(repo, commit, licence, files, open_file, partial(translate_errors, repo, api.endpoint))


@contextmanager
def translate_errors(repo: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub's client into SourceError, one line with a hint."""
    import httpx2
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        yield
        return
    except GatedRepoError:
        problem = f"{repo} is gated: its owner wants you to accept terms first"
        hint = f"accept them at {endpoint}/datasets/{repo}, then `hf auth login` with the same account"
    except RepositoryNotFoundError:
        problem, hint = (
            f"no data set {repo} at {endpoint}, or no access to it",
            "check the name; `hf auth login` if it is private",
        )
    except HFValidationError:
        problem, hint = f"not the name of a data set: {repo}", "it looks like ORG/NAME"
    except HfHubHTTPError as error:
        problem = f"the Hub refused {repo} ({error.response.status_code}): {error.server_message or 'no message'}"
        hint = "check the name and the revision, or try again later"
    except (OSError, httpx2.TransportError) as error:
        problem = f"cannot reach the Hub at {endpoint}: {one_line(error)}"
        hint = "check the network; without one, --source scenes and folder:PATH work"
    raise SourceError(problem, hint=hint)


def _one_config(repo: str, files: dict[str | None, list[str]]) -> dict[str | None, list[str]]:
    """Return all files of a repository with one configuration (a folder), else those of `default`, or raise SourceError."""
    folders = {path.partition("/")[0] if path.count("/") > 1 else "" for paths in files.values() for path in paths}
    if len(folders) == 1:
        return files
    if "default" not in folders:
        hint = "download the one you want, and use parquet:PATH"
        raise SourceError(f"{repo} holds several tables: {', '.join(sorted(folders))}", hint=hint)
    default_files = {split: [path for path in paths if path.startswith("default/")] for split, paths in files.items()}
    return {split: paths for split, paths in default_files.items() if paths}


def _parquet(api: "HfApi", repo: str, commit: str) -> dict[str | None, list[str]]:
    """Return the Parquet files at a commit by split, sorted."""
    paths = sorted(api.list_repo_files(repo, repo_type="dataset", revision=commit))
    return group_by_split(path for path in paths if path.endswith(".parquet"))


def _converted(api: "HfApi", repo: str) -> tuple[str, dict[str | None, list[str]]]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        commit = str(api.dataset_info(repo, revision=CONVERSION_BRANCH).sha)
    except GatedRepoError:
        raise
    except HfHubHTTPError:
        return "", {}
    return commit, _parquet(api, repo, commit)


def _open(config: Config, repo: str, part: SourceSlice) -> Source:
    tables, name = replace(open_hub(repo), part=part), f"hub:{repo.partition('@')[0]}"
    return open_mapped(tables, read_mapping(tables.schema, config.columns), config, name)


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
