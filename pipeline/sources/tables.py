"""Sources: tables with images, in Parquet files (`parquet:PATH`) or on the Hugging Face Hub (`hub:ORG/NAME`).

`--columns` maps columns to roles. For other roles, columns are guessed from their names and types. A Hub
dataset is pinned to a commit, and read from its own Parquet files or from the Hub's conversion to Parquet.
Scripts in a repository are never run.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pyarrow as pa

from pipeline.config import CONTEXT, Config
from pipeline.dataset.version import REJECTIONS_FILE
from pipeline.errors import ImageError, SourceError
from pipeline.hub_errors import translate_hub_errors
from pipeline.sources.base import SourceSpec, as_text, check_samples, require_columns
from pipeline.sources.parquet import NAMED_IMAGES_HINT, Tables, embedded_bytes, is_binary, is_list, is_text
from pipeline.sources.source_files import find_source_files
from pipeline.sources.splits import (
    SPLIT_OF_WORD,
    describe_held_out,
    group_by_split,
    split_of_path,
    stored_split,
)
from pipeline.sources.texts import FILE_NAMES, TEXT_KEYS, extract_texts, read_question
from pipeline.tables import ANSWERS, CAPTION_COLUMNS, PIXELS, QUESTION
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import GATED, UNDECLARED, UNKNOWN, RawSample, Rejected, Sample, Source

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ROLES = ("image", "pages", "references", "question", "answer", "split", CONTEXT)
# In --columns, this value states that no column has the role `split` or `question`.
NO_COLUMN = "none"
PARTIAL_MESSAGE = (
    "the Hub has converted only the first part of {name} to Parquet: to read the rest, download the dataset"
)
OFFLINE = "check the network; without one, --source scenes and folder:PATH work"
DEFAULT_CONFIG = "default"
CONVERSION_BRANCH = "refs/convert/parquet"
PARTIAL_FILE = re.compile(r"(^|/)partial-")  # the Hub converts only the first 5 GB of a large split
# A small --limit needs less than fsspec's default of 50 MB per request.
BLOCK_BYTES = 1 << 20
# Columns of multiple-choice questions, whose answers may be numbers or letters.
_CHOICE_COLUMNS = frozenset(("choices", "options", "candidates"))
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
_MAPPING_HINT = "set the columns, for example: --columns image=COLUMN,references=COLUMN"

Columns = dict[str, list[str]]
FilesBySplit = dict[str | None, list[str]]


def open_mapped(tables: Tables, columns: Columns, config: Config, name: str) -> Source:
    """Return a source with the rows of one split or all splits. Raises SourceError for a missing split."""
    split = config.source_split
    split_column = columns["split"][0] if "split" in columns else None
    if not split_column:
        check_split(tables, split)

    def split_of(value: object) -> str | None:
        return SPLIT_OF_WORD.get(str(value).strip().casefold())

    def is_unknown(value: object) -> bool:
        is_missing = value is None or value != value or not str(value).strip()
        return not is_missing and split_of(value) is None

    def count() -> int:
        if split is None or not split_column:
            return tables.count(split)
        return sum(split_of(value) == split for value in tables.values(split_column))

    def raw_samples(start: int) -> Iterator[RawSample | Rejected]:
        wanted = [column for role_columns in columns.values() for column in role_columns]
        for row_name, file_split, row in tables.rows(wanted, None if split_column else split, start):
            if isinstance(row, Rejected):
                yield row
                continue
            row_split = split_of(row[split_column]) if split_column else file_split
            if split_column and is_unknown(row[split_column]):
                value = f"{row[split_column]!r} in the column {split_column}"
                detail = f"{value} is not a split ({', '.join(SPLIT_OF_WORD)})"
                yield Rejected(source_row=row_name, reason="unknown_split", detail=detail)
            elif split in (None, row_split):
                fields = {"license": tables.license, "split": stored_split(row_split, split)}
                yield _read_row(row_name, row, columns, **fields)

    def row_number(column: str, start: int) -> int:
        """Return the index of the table row that follows the first `start` rows in the requested split."""
        numbers = (
            number
            for number, (_, _, row) in enumerate(tables.rows([column]), 1)
            # Rows with an unknown split count too, because they are read as rejections.
            if isinstance(row, Rejected) or split_of(row[column]) == split or is_unknown(row[column])
        )
        return next(islice(numbers, start - 1, None), tables.count()) if start else 0

    def read(start: int) -> Iterator[Sample | Rejected]:
        return check_samples(
            raw_samples(row_number(split_column, start) if split_column and split else start)
        )

    messages = [PARTIAL_MESSAGE.format(name=tables.name)] if tables.is_partial else []
    messages += [] if split or split_column else describe_held_out(tables.files)
    return Source(
        name=name,
        revision=tables.revision,
        read=read,
        count=count,
        decks="pages" in columns,
        is_partial=tables.is_partial,
        license=tables.license,
        messages=tuple(messages),
    )


def check_split(tables: Tables, split: str | None) -> None:
    """Check that the tables have the split. Raises SourceError if they lack it."""
    if split is not None and split not in tables.files:
        known = ", ".join(map(str, tables.files))
        raise SourceError(f"{tables.name} has no split {split}", hint=f"it has {known}")


# --- columns


def read_mapping(schema: pa.Schema, mapping: dict[str, str]) -> Columns:
    """Return the columns for each role. Roles that are not in `mapping` are guessed.

    Raises SourceError if the column for a role is missing or does not fit.
    """
    ignored = [(CONTEXT, mapping.get(CONTEXT)), ("split", NO_COLUMN), (QUESTION, NO_COLUMN)]
    roles = [item for item in mapping.items() if item not in ignored]
    columns = {role: named_columns(schema, role, name) for role, name in roles}
    if CONTEXT in mapping:
        names = (name.strip() for name in mapping[CONTEXT].split(","))
        columns[CONTEXT] = list(dict.fromkeys(name for name in names if name))
        require_columns(columns[CONTEXT], schema.names)
        for name in columns[CONTEXT]:
            kind = schema.field(name).type
            item = kind.value_type if is_list(kind) else kind
            if is_binary(item) or pa.types.is_nested(item):
                problem = f"the column {name} contains {kind}, which prompts cannot use"
                raise SourceError(problem, hint="use columns of strings or numbers")
    if "image" not in columns and "pages" not in columns:
        columns |= _guess_images(schema)
    for name in (*columns.get("image", ()), *columns.get("pages", ())):
        kind = schema.field(name).type
        if is_text(kind.value_type if is_list(kind) else kind):
            problem = f"the column {name} contains {kind}, not images"
            raise SourceError(problem, hint=f"if it names the images: {NAMED_IMAGES_HINT}")
    if "references" not in mapping:
        known = ("references",) if _is_own_version(schema) else CAPTION_COLUMNS
        texts = [name for name in known if name in schema.names and _holds_texts(schema.field(name).type)]
        columns["references"] = texts[:1]
    elif not _holds_texts(kind := schema.field(columns["references"][0]).type):
        problem = f"the column {mapping['references']} contains {kind}, not captions"
        raise SourceError(problem, hint=_MAPPING_HINT)
    if "question" not in mapping and _is_own_version(schema) and "reference_qa" in schema.names:
        columns["reference_qa"] = ["reference_qa"]
    if "question" not in mapping and "answer" not in mapping:
        columns |= _guess_questions(schema)
    num_questions, num_answers = (len(columns.get(role, ())) for role in ("question", "answer"))
    if num_questions != num_answers:
        hint = "pass both columns: --columns question=COLUMN,answer=COLUMN"
        raise SourceError(f"{num_questions} question columns, but {num_answers} answer columns", hint=hint)
    if len(columns.get("split", ())) > 1:
        problem = f"several columns match the role split: {', '.join(columns['split'])}"
        raise SourceError(problem, hint="pass one: --columns split=COLUMN")
    if "split" not in mapping and "split" in schema.names and is_text(schema.field("split").type):
        columns["split"] = ["split"]
    return columns


def named_columns(schema: pa.Schema, role: str, name: str) -> list[str]:
    """Return the columns that match a name, sorted by the number that `*` stands for, as in `page_*`.

    Raises SourceError if no column matches or the role is unknown.
    """
    if role not in ROLES:
        raise SourceError(f"--columns does not support the role {role}", hint=f"roles: {', '.join(ROLES)}")
    pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
    matches = [match for column in schema.names if (match := pattern.fullmatch(column))]
    if not matches:
        require_columns([name], schema.names)
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1]) if match.groups() else 0)]


def _guess_questions(schema: pa.Schema) -> Columns:
    """Return the question and answer columns, or {} if types do not fit or questions are multiple-choice."""
    answer = next((name for name in ANSWERS if name in schema.names), None)
    has_choices = not _CHOICE_COLUMNS.isdisjoint(schema.names)
    if answer is None or QUESTION not in schema.names or _is_own_version(schema) or has_choices:
        return {}
    question_type, answer_type = schema.field(QUESTION).type, schema.field(answer).type
    are_lists = is_list(question_type) and is_text(question_type.value_type)
    matches = is_list(answer_type) if are_lists else is_text(question_type)
    return {"question": [QUESTION], "answer": [answer]} if matches and _holds_texts(answer_type) else {}


def _guess_images(schema: pa.Schema) -> Columns:
    """Return the column of images, or the columns of pages.

    Raises SourceError if no column holds images, or if the choice is ambiguous.
    """
    images = [field.name for field in schema if _is_image(field.type)]
    lists = [field.name for field in schema if is_list(field.type) and _is_image(field.type.value_type)]
    binary = [f.name for f in schema if is_binary(f.type) and f.name.rstrip("_0123456789") in _IMAGE_NAMES]
    if len(images) > 1 and all(re.fullmatch(r"page_\d+", name) for name in images):
        return {"pages": named_columns(schema, "pages", "page_*")}
    if not images and len(lists) == 1:
        return {"pages": lists}
    candidates = images or binary
    if len(candidates) == 1 or "image" in candidates:
        return {"image": ["image" if "image" in candidates else candidates[0]]}
    columns, hint = f"(columns: {', '.join(schema.names)})", _MAPPING_HINT
    if candidates := [*images, *lists] or binary:
        raise SourceError(f"several columns contain images: {', '.join(candidates)} {columns}", hint=hint)
    names = (*_IMAGE_NAMES, *FILE_NAMES, "url")
    if texts := [name for name in names if name in schema.names and is_text(schema.field(name).type)]:
        hint = f"if {texts[0]} names the images: {NAMED_IMAGES_HINT}"
    raise SourceError(f"no column contains images {columns}", hint=hint)


def _is_image(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _holds_texts(kind: pa.DataType) -> bool:
    """Return whether a column has strings, lists of strings, or objects with one of TEXT_KEYS."""
    if is_list(kind):
        return _holds_texts(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in TEXT_KEYS)
    return is_text(kind)


def _is_own_version(schema: pa.Schema) -> bool:
    """Return whether synth published a table. Such a table has the human captions in `references`."""
    kind = schema.field("captions").type if "captions" in schema.names else None
    item = kind.value_type if kind is not None and is_list(kind) else None
    return bool(item is not None and pa.types.is_struct(item) and item.get_field_index("prompt_id") >= 0)


# --- rows


def build_sample(
    name: str, images: list[Any], license: str, split: str | None, **fields: Any
) -> RawSample | Rejected:
    """Return the sample for a row, or a rejection. Empty pages at the end are left out."""
    while len(images) > 1 and images[-1] is None:
        images = images[:-1]
    if len(images) > MAX_PAGES:
        detail = f"{len(images)} pages are more than {MAX_PAGES}"
        return Rejected(source_row=name, reason="too_many_pages", detail=detail)
    try:
        pages = tuple(embedded_bytes(image) for image in images or [None])
    except ImageError as error:
        return Rejected(source_row=name, reason=error.reason, detail=str(error))
    return RawSample(source_row=name, images=pages, license=license, fields={"split": split, **fields})


def _read_row(name: str, row: dict[str, Any], columns: Columns, **fields: Any) -> RawSample | Rejected:
    """Return the sample for a row with its texts, or a rejection."""
    image_columns = columns.get("pages", columns.get("image", []))
    images = [image for column in image_columns for image in _as_list(row[column])]
    if "pages" not in columns and len(images) > 1:
        return Rejected(source_row=name, reason="several_images", detail="for decks: --columns pages=COLUMN")
    texts = [text for column in columns["references"] for text in extract_texts(row[column])]
    context = [(column, as_text(row[column], f"the column {column}")) for column in columns.get(CONTEXT, ())]
    fields |= {"references": tuple(texts), "context": tuple(context)}
    pairs = [pair for column in columns.get("reference_qa", ()) for pair in row[column] or ()]
    question_columns = zip(columns.get("question", ()), columns.get("answer", ()), strict=True)
    for question_column, answer_column in question_columns:
        question, answer = row[question_column], row[answer_column]
        questions, answers = _as_list(question), _as_list(answer) if isinstance(question, list) else [answer]
        if len(questions) != len(answers):
            detail = f"{len(questions)} questions, but {len(answers)} answers"
            return Rejected(source_row=name, reason="unpaired_answers", detail=detail)
        pairs += [{"question": q, "answers": a} for q, a in zip(questions, answers, strict=True)]
    fields["reference_qa"] = tuple(question for pair in pairs if (question := read_question(pair)))
    return build_sample(name, images, **fields)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# --- Parquet files


def _open_parquet(config: Config, path: str) -> Source:
    files = find_source_files(path, (".parquet",), follow_links=config.follow_links)
    if not files.names:
        hint = "pass a Parquet file, or a folder on this disk or in an object store: --source parquet:PATH"
        raise SourceError(f"no Parquet file at {path}", hint=hint)
    by_split, license = group_by_split(files.names), config.license or UNKNOWN
    translate = files.translate_errors
    tables = Tables(files.name, files.revision, license, by_split, files.open, translate)
    is_version = any(name.endswith(REJECTIONS_FILE) for name in files.names)
    if is_version and not {*PIXELS} & {*tables.schema.names}:
        hint = f"`synth export {path} --format parquet --out FOLDER` writes files that contain the images"
        raise SourceError(f"{path} is a version of synth, whose images are stored elsewhere", hint=hint)
    source = open_mapped(tables, read_mapping(tables.schema, config.columns), config, "parquet")
    return replace(source, messages=(*files.messages, *source.messages))


PARQUET = SourceSpec(
    name="parquet:PATH",
    what="images in a Parquet file, or in all files in a folder; also s3://, gs://, hf:// and https://",
    example="synth generate --source parquet:rows.parquet --columns image=photo,references=alt_text",
    open=_open_parquet,
    options=frozenset({"source_split", "columns", "follow_links", "license"}),
)


# --- the Hub


def open_hub(name: str) -> Tables:
    """Return the tables of ORG/NAME[:CONFIG][@REVISION], pinned to a commit.

    Raises SourceError if they cannot be read.
    """
    # At module level, this import would double the start time of commands that do not need it.
    from huggingface_hub import HfApi, HfFileSystem

    before, _, revision = name.partition("@")
    repo, _, config = before.partition(":")
    api = HfApi()
    place = f"{repo}@{revision}" if revision else repo
    translate = partial(translate_hub_errors, place, "dataset", SourceError, OFFLINE)
    with translate():
        info = api.dataset_info(repo, revision=revision or None)
        commit, paths = str(info.sha), _list_parquet(api, repo, str(info.sha))
        is_converted = not paths and not revision
        if is_converted:
            commit, paths = _find_conversion(api, repo)
    if not paths:
        hint = "download it, and use --source folder:PATH or parquet:PATH"
        raise SourceError(f"{repo} has no Parquet files, and the Hub has not converted it", hint=hint)
    card: Any = info.card_data or {}
    declared = {} if is_converted else _declared_configs(card.get("configs"), paths)
    files = _choose_files(repo, config, declared, paths)
    is_partial = any(PARTIAL_FILE.search(path) for split_paths in files.values() for path in split_paths)
    license = card.get("license")
    license = ", ".join(map(str, license if isinstance(license, list) else [license or UNDECLARED]))
    license = f"{GATED}, {license}" if info.gated else license
    filesystem = HfFileSystem(endpoint=api.endpoint, skip_instance_cache=True)

    def open_file(path: str) -> BinaryIO:
        url = f"datasets/{repo}@{commit}/{path}"
        return cast(BinaryIO, filesystem.open(url, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))

    return Tables(repo, commit, license, files, open_file, translate, is_partial=is_partial)


def _list_parquet(api: "HfApi", repo: str, commit: str) -> list[str]:
    paths = api.list_repo_files(repo, repo_type="dataset", revision=commit)
    return sorted(path for path in paths if path.endswith(".parquet") and not path.endswith(REJECTIONS_FILE))


def _find_conversion(api: "HfApi", repo: str) -> tuple[str, list[str]]:
    """Return the commit and files of the Hub's conversion to Parquet, or ("", []) if there is none."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    try:
        commit = str(api.dataset_info(repo, revision=CONVERSION_BRANCH).sha)
    except GatedRepoError:
        raise
    except HfHubHTTPError:
        return "", []
    return commit, _list_parquet(api, repo, commit)


def _declared_configs(configs: Any, paths: list[str]) -> dict[str, FilesBySplit]:
    """Return the files of each config that a dataset card declares. Invalid entries are skipped.

    The config that the card marks as default is also returned under the key DEFAULT_CONFIG.
    """
    declared: dict[str, FilesBySplit] = {}
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict):
            continue
        folder = str(config.get("data_dir") or "").removeprefix("./").strip("/")
        entries = _as_list(config.get("data_files", f"{folder}/**" if folder else None))
        matched: dict[str | None, dict[str, None]] = {}
        for entry in entries:
            split = entry.get("split") if isinstance(entry, dict) else None
            patterns = entry.get("path") if isinstance(entry, dict) else entry
            globs = [_compile_glob(str(pattern).removeprefix("./")) for pattern in _as_list(patterns)]
            for path in (path for path in paths if any(glob.fullmatch(path) for glob in globs)):
                matched.setdefault(split_of_path(str(split) if split else path), {})[path] = None
        files: FilesBySplit = {split: [*split_files] for split, split_files in matched.items()}
        if files and isinstance(config.get("config_name"), str):
            declared[config["config_name"]] = files
            if config.get("default") is True:
                declared.setdefault(DEFAULT_CONFIG, files)
    return declared


def _compile_glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob pattern from a card as `datasets` does: only `**` matches across folders."""
    from fsspec.utils import glob_translate

    try:
        return re.compile(glob_translate(pattern))
    except (ValueError, re.error):  # `**` within a name, or an invalid pattern
        return re.compile(re.escape(pattern))


def _choose_files(
    repo: str, config: str, declared: dict[str, FilesBySplit], paths: list[str]
) -> FilesBySplit:
    """Return the files of a config. The card declares the configs, or else each folder is a config.

    Without a name, return the files of the default or only config.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(path.partition("/")[0] if path.count("/") > 1 else "", []).append(path)
    configs = declared or {name: group_by_split(files) for name, files in folders.items()}
    if config:
        in_folder = (path for path in paths if f"/{config}/" in f"/{path}")
        if files := configs.get(config) or group_by_split(in_folder):
            return files
        folders_of_files = (path.rpartition("/")[0].partition("/")[0] for path in paths)
        known = sorted({*configs, *folders_of_files} - {""})
        hint = f"it has {', '.join(known) or 'one table'}"
        raise SourceError(f"{repo} has no config {config}", unknown=config, known=known, hint=hint)
    if DEFAULT_CONFIG in configs:
        return configs[DEFAULT_CONFIG]
    first, *others = configs.values()
    if any(other != first for other in others):
        hint = f"pass one: --source hub:{repo}:{min(filter(None, configs))}"
        raise SourceError(f"{repo} has several configs: {', '.join(sorted(configs))}", hint=hint)
    return first


def _open_repository(config: Config, repo: str) -> Source:
    tables = open_hub(repo)
    name = f"hub:{repo.partition('@')[0]}"
    return open_mapped(tables, read_mapping(tables.schema, config.columns), config, name)


HUB = SourceSpec(
    name="hub:ORG/NAME",
    what="a Hub dataset, stored as or converted to Parquet; ORG/NAME:CONFIG; @REVISION pins a commit",
    license="as its card states",
    needs="the Hub, a vision-language model",
    example="synth generate --source hub:ORG/NAME --split train --limit 1000",
    open=_open_repository,
    options=frozenset({"source_split", "columns"}),
)
