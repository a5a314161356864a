"""Source: datasets of the Hugging Face Hub, pinned to a commit: their Parquet files, or the Hub's conversion to Parquet.

The Hub converts script-based repositories on a separate branch. Scripts are never run.
"""

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fsspec.utils import glob_translate

from pipeline.config import Config
from pipeline.dataset.version import REJECTIONS_FILE
from pipeline.errors import SourceError, did_you_mean
from pipeline.hub_errors import translate_hub_errors
from pipeline.sources.base import SourceSpec
from pipeline.sources.columns import open_mapped, read_mapping
from pipeline.sources.parquet import Tables, group_by_split, split_of_path
from pipeline.types import GATED, UNDECLARED, Source, SourceSlice

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OFFLINE = "check the network; without one, --source scenes and folder:PATH work"
DEFAULT = "default"  # the name of a config, on a card and as a folder
CONVERSION_BRANCH = "refs/convert/parquet"
PARTIAL = re.compile(r"(^|/)partial-")  # of a split, of which the Hub has converted the first 5 GB
BLOCK_BYTES = 1 << 20  # of one request; the default of 50 MB is more than a small --limit needs in all


def open_hub(name: str, *, allow_partial: bool = False) -> Tables:
    """Return the tables of ORG/NAME, ORG/NAME:CONFIG or either @REVISION, pinned to a commit.

    Raise SourceError if they cannot be read, or the Hub has converted a part of them only, unless that is allowed.
    """
    from huggingface_hub import HfApi, HfFileSystem  # half of the time in which a command starts that does not need them

    repo, config, revision = parse_name(name)
    api = HfApi()
    translate = partial(translate_hub_errors, f"{repo}@{revision}" if revision else repo, "dataset", SourceError, OFFLINE)
    with translate():
        info = api.dataset_info(repo, revision=revision)
        commit, paths = str(info.sha), _parquet(api, repo, str(info.sha))
        is_converted = not paths and not revision
        if is_converted:
            commit, paths = _converted(api, repo)
    if not paths:
        hint = "download it, and use --source folder:PATH or parquet:PATH"
        raise SourceError(f"{repo} holds no Parquet files, nor has the Hub converted it", hint=hint)
    declared = {} if is_converted or not info.card_data else _declared_configs(info.card_data.get("configs"), paths)
    files = group_by_split(paths) if config is None else {}
    files = _of_config(repo, config, declared, paths) if config is not None else _one_config(repo, files, declared)
    is_partial = any(PARTIAL.search(path) for of_split in files.values() for path in of_split)
    if is_partial and not allow_partial:
        hint = "--allow-partial takes what is there; all of it: download the dataset, and use folder:PATH or parquet:PATH"
        raise SourceError(f"the Hub has converted only a first part of {repo} to Parquet", hint=hint)
    card_license = info.card_data.get("license") if info.card_data else None
    license = ", ".join(card_license) if isinstance(card_license, list) else card_license or UNDECLARED
    filesystem = HfFileSystem(endpoint=api.endpoint, skip_instance_cache=True)
    license = f"{GATED}, {license}" if info.gated else license

    def open_file(path: str) -> BinaryIO:
        name = f"datasets/{repo}@{commit}/{path}"
        return cast(BinaryIO, filesystem.open(name, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))

    return Tables(repo, commit, license, files, open_file, translate, is_partial=is_partial)


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """Return (repository, config, revision) of ORG/NAME, ORG/NAME:CONFIG, ORG/NAME@REVISION or ORG/NAME:CONFIG@REVISION."""
    before, _, revision = name.partition("@")
    repo, _, config = before.partition(":")
    return repo, config or None, revision or None


Files = dict[str | None, list[str]]  # paths by split


def _declared_configs(configs: Any, paths: list[str]) -> dict[str, Files]:
    """Return the files of each config that the card of a repository declares, by split. What is odd is left out.

    One that is declared to be the default has that name as well.
    """
    declared: dict[str, Files] = {}
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict):
            continue
        folder = str(config.get("data_dir") or "").removeprefix("./").strip("/")
        data_files = config.get("data_files", f"{folder}/**" if folder else None)
        entries = data_files if isinstance(data_files, list) else [data_files]
        matched: dict[str | None, dict[str, None]] = {}  # each file once, in order
        for entry in entries:
            split, patterns = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, entry)
            listed = patterns if isinstance(patterns, list) else [patterns]
            globs = [_compile_glob(str(one).removeprefix("./")) for one in listed]
            for path in (path for path in paths if any(glob.fullmatch(path) for glob in globs)):
                matched.setdefault(split_of_path(str(split) if split else path), {})[path] = None
        files: Files = {split: [*of_split] for split, of_split in matched.items()}
        if files and isinstance(config.get("config_name"), str):
            declared[config["config_name"]] = files
            if config.get("default") is True:
                declared.setdefault(DEFAULT, files)
    return declared


def _compile_glob(pattern: str) -> re.Pattern[str]:
    """Return what a pattern of a card matches, as `datasets` reads it: a star stays within a folder, and two do not."""
    try:
        return re.compile(glob_translate(pattern))
    except (ValueError, re.error):  # two stars that are no folder of their own
        return re.compile(re.escape(pattern))


def _of_config(repo: str, config: str, declared: dict[str, Files], paths: list[str]) -> Files:
    """Return the files of a config: one that the card declares, else a folder. Raise SourceError if there is none."""
    if config in declared:
        return declared[config]
    in_folder = [path for path in paths if path.startswith(f"{config}/") or f"/{config}/" in path]
    if not in_folder:
        known = sorted({*declared, *(path.partition("/")[0] for path in paths if "/" in path)})
        hint = f"{did_you_mean(config, known)} it has {', '.join(known) or 'one table'}".strip()
        raise SourceError(f"{repo} has no config {config}", hint=hint)
    return group_by_split(in_folder)


def _one_config(repo: str, files: Files, declared: dict[str, Files]) -> Files:
    """Return the files of the only config, or of the default one; a config is what the card declares, else a folder.

    Raise SourceError if there are several, and none is the default.
    """
    configs = declared
    if not declared:
        configs = {}
        for split, paths in files.items():
            for path in paths:
                folder = path.partition("/")[0] if path.count("/") > 1 else ""
                configs.setdefault(folder, {}).setdefault(split, []).append(path)
    if DEFAULT in configs:
        return configs[DEFAULT]
    first, *others = configs.values()
    if any(other != first for other in others):
        hint = f"name one: --source hub:{repo}:{min(filter(None, configs))}"
        raise SourceError(f"{repo} holds several tables: {', '.join(sorted(configs))}", hint=hint)
    return first


def _parquet(api: "HfApi", repo: str, commit: str) -> list[str]:
    """Return the Parquet files at a commit, sorted."""
    paths = sorted(api.list_repo_files(repo, repo_type="dataset", revision=commit))
    return [path for path in paths if path.endswith(".parquet") and path.rpartition("/")[2] != REJECTIONS_FILE]


def _converted(api: "HfApi", repo: str) -> tuple[str, list[str]]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        commit = str(api.dataset_info(repo, revision=CONVERSION_BRANCH).sha)
    except GatedRepoError:
        raise
    except HfHubHTTPError:
        return "", []
    return commit, _parquet(api, repo, commit)


def _open(config: Config, repo: str, part: SourceSlice) -> Source:
    tables = replace(open_hub(repo, allow_partial=config.allow_partial), part=part)
    name = f"hub:{repo.partition('@')[0]}"
    return open_mapped(tables, read_mapping(tables.schema, config.columns), config, name)


SPEC = SourceSpec(
    name="hub:ORG/NAME",
    what="any dataset of the Hub that is Parquet, or that the Hub has converted; ORG/NAME:CONFIG; @REVISION pins a commit",
    license="as its card says",
    needs="the Hub, a vision-language model",
    example="synth generate --source hub:ORG/NAME --split train --limit 1000",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls", "allow_partial"}),
)
