"""Sources: any table with images, in Parquet files (`parquet:PATH`) or on the Hugging Face Hub (`hub:ORG/NAME`).

`--columns` maps columns to roles; the other roles are guessed from column names and types. A dataset of the Hub is pinned to a
commit: its Parquet files, or the Hub's conversion to Parquet. Scripts of a repository are never run.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pyarrow as pa
from fsspec.utils import glob_translate

from pipeline.config import CONTEXT, Config
from pipeline.dataset.version import IMAGES_FILE, REJECTIONS_FILE
from pipeline.errors import ImageError, SourceError, did_you_mean
from pipeline.hub_errors import translate_hub_errors
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import LICENSE_UNLESS_SAID, SourceSpec, as_text, check_samples
from pipeline.sources.image_urls import FETCHED_AT_ONCE, fetch_ahead
from pipeline.sources.parquet import (
    SPLIT_OF_WORD,
    Tables,
    describe_held_out,
    embedded_bytes,
    group_by_split,
    is_list,
    is_text,
    split_of_path,
    stored_split,
)
from pipeline.sources.source_files import find_source_files
from pipeline.sources.texts import FILE_NAMES, TEXT_KEYS, list_in_cell, read_question, read_texts
from pipeline.tables import ANSWERS, CAPTION_COLUMNS, QUESTION
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import ALL, GATED, UNDECLARED, UNKNOWN, RawSample, Rejected, Sample, Source, SourceSlice

ROLES = ("image", "pages", "references", "question", "answer", "split", CONTEXT)
PARTIAL_MESSAGE = "the Hub has converted only a first part of {name} to Parquet: the rest is not read"
Columns = dict[str, list[str]]  # of each role
NO_COLUMN = "none"  # for the split and the question: a column of that name says something else
_OF_CHOICES = frozenset(("choices", "options", "candidates"))  # of which an answer may be a number or a letter
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
_MAPPING_HINT = "say which with --columns, such as --columns image=COLUMN,references=COLUMN"
if TYPE_CHECKING:
    from huggingface_hub import HfApi

OFFLINE = "check the network; without one, --source scenes and folder:PATH work"
DEFAULT = "default"  # the name of a config, on a card and as a folder
CONVERSION_BRANCH = "refs/convert/parquet"
PARTIAL = re.compile(r"(^|/)partial-")  # of a split, of which the Hub has converted the first 5 GB
BLOCK_BYTES = 1 << 20  # of one request; the default of 50 MB is more than a small --limit needs in all


def open_mapped(tables: Tables, columns: Columns, config: Config, name: str, names: dict[str, str] = SPLIT_OF_WORD) -> Source:
    """Return the rows of one split, or of all, as the source `name`. Raise SourceError if the split does not exist.

    A row without a usable image is rejected. `names` maps the values of a split column to train, validation or test.
    """
    split = config.source_split
    split_column = columns["split"][0] if "split" in columns else None
    if not split_column:
        check_split(tables, split)

    def split_of(value: object) -> str | None:
        return names.get(str(value).strip().casefold())

    def count() -> int:
        if split is None or not split_column:
            return tables.count(split)
        return sum(split_of(value) == split for value in tables.values(split_column))

    def jobs(start: int) -> Iterator[Rejected | partial[RawSample | Rejected]]:
        """Yield what is to be done for each row; the rows of other splits are left out, where a column says it."""
        wanted = [column for role_columns in columns.values() for column in role_columns]
        for row_name, file_split, row in tables.rows(wanted, None if split_column else split, start):
            if isinstance(row, Rejected):
                yield row
                continue
            row_split = split_of(row[split_column]) if split_column else file_split
            if row_split is None and split_column and not _is_missing(row[split_column]):
                detail = f"{row[split_column]!r} in the column {split_column} is none of {', '.join(SPLIT_OF_WORD)}"
                yield Rejected(source_row=row_name, reason="unknown_split", detail=detail)
            elif split in (None, row_split):
                fields = {"license": tables.license, "split": stored_split(row_split, split)}
                yield _read_row(row_name, row, columns, allow_urls=config.allow_urls, **fields)

    def first_row(column: str, start: int) -> int:
        """Return which row of the tables follows the first `start` rows of the split; images are not read for it."""
        yielded = number = 0
        for _, _, row in tables.rows([column]):
            if yielded == start:
                break
            yielded += isinstance(row, Rejected) or split_of(row[column]) in (None, split)
            number += 1
        return number

    at_once = min(FETCHED_AT_ONCE, config.limit or FETCHED_AT_ONCE)

    def read(start: int) -> Iterator[Sample | Rejected]:
        todo = jobs(first_row(split_column, start) if split_column and split else start)
        return check_samples(fetch_ahead(todo, _do, at_once) if config.allow_urls else map(_do, todo), config.context)

    held_out = [] if split or split_column else describe_held_out(tables.files)
    return Source(
        name=name,
        revision=tables.revision,
        read=read,
        count=count,
        decks="pages" in columns,
        is_partial=tables.is_partial,
        license=tables.license,
        messages=(*([PARTIAL_MESSAGE.format(name=tables.name)] if tables.is_partial else []), *held_out),
    )


def read_mapping(schema: pa.Schema, mapping: dict[str, str]) -> Columns:
    """Return the columns of each role: from `mapping`, else guessed from names and types. Raise SourceError if it lacks one."""
    left_alone = {role for role in ("split", QUESTION) if mapping.get(role) == NO_COLUMN and NO_COLUMN not in schema.names}
    roles = {role: name for role, name in mapping.items() if role != CONTEXT and role not in left_alone}
    columns = {role: named_columns(schema, role, name) for role, name in roles.items()}
    if CONTEXT in mapping:
        columns[CONTEXT] = _context_columns(schema, mapping[CONTEXT])
    if "image" not in columns and "pages" not in columns:
        columns |= _guess_images(schema)
    if "references" not in mapping:
        names = ("references",) if _is_own_version(schema) else CAPTION_COLUMNS
        texts = [name for name in names if name in schema.names and _holds_texts(schema.field(name).type)]
        columns["references"] = texts[:1]
    elif not _holds_texts(kind := schema.field(columns["references"][0]).type):
        raise SourceError(f"the column {mapping['references']} holds {kind}, and no captions", hint=_MAPPING_HINT)
    if "question" not in mapping and _is_own_version(schema) and "reference_qa" in schema.names:
        columns["reference_qa"] = ["reference_qa"]
    if "question" not in mapping and "answer" not in mapping:
        columns |= _guess_questions(schema)
    if len(columns.get("question", ())) != len(columns.get("answer", ())):
        raise SourceError("questions need answers", hint="name both columns: --columns question=COLUMN,answer=COLUMN")
    if len(columns.get("split", ())) > 1:
        raise SourceError(f"several columns are the split: {', '.join(columns['split'])}", hint="name one of them")
    if "split" not in mapping and "split" in schema.names and is_text(schema.field("split").type):
        columns["split"] = ["split"]
    return columns


def check_split(tables: Tables, split: str | None) -> None:
    """Raise SourceError if the tables lack the split."""
    if split is not None and split not in tables.files:
        raise SourceError(f"{tables.name} has no split {split}", hint=f"it has {', '.join(str(name) for name in tables.files)}")


def named_columns(schema: pa.Schema, role: str, name: str) -> list[str]:
    """Return the columns that a mapped name matches; `*` stands for a number, by which they are sorted: `page_*`."""
    if role not in ROLES:
        raise SourceError(f"--columns knows no {role}", hint=f"it maps {', '.join(ROLES)}")
    pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
    numbered = [(int(match[1]) if match.groups() else 0, n) for n in schema.names if (match := pattern.fullmatch(n))]
    if not numbered:
        raise SourceError(f"there is no column {name}", hint=f"columns: {', '.join(schema.names)}")
    return [column for _, column in sorted(numbered)]


def build_sample(
    name: str, images: list[Any], license: str, split: str | None, *, allow_urls: bool = False, **more: Any
) -> RawSample | Rejected:
    """Return the images of a row, or its rejection. Empty pages at the end of a deck are dropped."""
    while len(images) > 1 and images[-1] is None:
        images = images[:-1]
    if len(images) > MAX_PAGES:
        return Rejected(source_row=name, reason="too_many_pages", detail=f"{len(images)} pages are more than {MAX_PAGES}")
    try:
        pages = tuple(embedded_bytes(image, allow_urls=allow_urls) for image in images or [None])
    except ImageError as error:
        return Rejected(source_row=name, reason=error.reason, detail=str(error))
    return RawSample(source_row=name, images=pages, license=license, fields={"split": split, **more})


def _read_row(
    name: str, row: dict[str, Any], columns: Columns, *, allow_urls: bool, **fields: Any
) -> Rejected | partial[RawSample | Rejected]:
    """Return what is to be done for a row, since an image that it names by address is still to be fetched."""
    images = [image for column in columns.get("pages", columns.get("image", [])) for image in _listed(row[column])]
    if "pages" not in columns and len(images) > 1:
        return Rejected(source_row=name, reason="several_images", detail="map the column as pages, for a deck")
    texts = [text for column in columns.get("references", ()) for item in _listed(row[column]) for text in _texts_of(item)]
    fields["references"] = tuple(text for text in texts if isinstance(text, str) and text.strip())
    fields["context"] = tuple((column, as_text(row[column])) for column in columns.get(CONTEXT, ()))
    if "question" in columns:
        questions, answers = _paired(row, columns)
        if len(questions) != len(answers):
            detail = f"{len(questions)} questions, and {len(answers)} answers"
            return Rejected(source_row=name, reason="unpaired_answers", detail=detail)
        pairs = ({"question": asked, "answers": given} for asked, given in zip(questions, answers, strict=True))
        fields["reference_qa"] = tuple(question for pair in pairs if (question := read_question(pair)))
    elif "reference_qa" in columns:
        listed = row[columns["reference_qa"][0]] or ()
        fields["reference_qa"] = tuple(question for one in listed if (question := read_question(one)))
    return partial(build_sample, name, images, allow_urls=allow_urls, **fields)


def _is_missing(value: object) -> bool:
    """Return whether a row says nothing of its split."""
    return value is None or value != value or not str(value).strip()


def _context_columns(schema: pa.Schema, names: str) -> list[str]:
    """Return the columns that are named with commas. Raise SourceError if one is missing, or can be no text."""
    stripped = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    columns = [name for name in stripped if name in schema.names or not is_exif_name(name)]  # else a field of the image
    for name in columns:
        if name not in schema.names:
            raise SourceError(f"there is no column {name}", hint=f"columns: {', '.join(schema.names)}")
        kind = schema.field(name).type
        if _is_bytes(kind) or pa.types.is_struct(kind) or (is_list(kind) and not is_text(kind.value_type)):
            raise SourceError(
                f"the column {name} holds {kind}, which no prompt can say", hint="name columns of texts or numbers"
            )
    return columns


def _guess_questions(schema: pa.Schema) -> Columns:
    """Return the columns of questions and answers by their usual names, if they fit together and offer no choices."""
    answer = next((name for name in ANSWERS if name in schema.names), None)
    if answer is None or QUESTION not in schema.names or _is_own_version(schema) or not _OF_CHOICES.isdisjoint(schema.names):
        return {}
    asked, answered = schema.field(QUESTION).type, schema.field(answer).type
    are_several = is_list(asked) and is_text(asked.value_type)
    fits = is_list(answered) if are_several else is_text(asked)
    return {"question": [QUESTION], "answer": [answer]} if fits and _holds_texts(answered) else {}


def _guess_images(schema: pa.Schema) -> Columns:
    images = [field.name for field in schema if _is_image(field.type)]
    lists = [field.name for field in schema if is_list(field.type) and _is_image(field.type.value_type)]
    plain = [field.name for field in schema if _is_bytes(field.type) and field.name.rstrip("_0123456789") in _IMAGE_NAMES]
    if len(images) > 1 and all(re.fullmatch(r"page_\d+", name) for name in images):
        return {"pages": named_columns(schema, "pages", "page_*")}
    if len(images) == 1 or "image" in images:
        return {"image": ["image" if "image" in images else images[0]]}
    if not images and len(lists) == 1:
        return {"pages": lists}
    if not images and (len(plain) == 1 or "image" in plain):
        return {"image": ["image" if "image" in plain else plain[0]]}
    candidates, hint = [*images, *lists] or plain, _MAPPING_HINT
    texts = [name for name in (*_IMAGE_NAMES, *FILE_NAMES, "url") if name in schema.names and is_text(schema.field(name).type)]
    if not candidates and texts:
        hint = f"addresses: --columns image={texts[0]} --allow-urls; names of files: a list of them, --source list:FILE.csv"
    message = f"several columns hold images: {', '.join(candidates)}" if candidates else "no column holds images"
    raise SourceError(f"{message} (columns: {', '.join(schema.names)})", hint=hint)


def _is_image(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _holds_texts(kind: pa.DataType) -> bool:
    """Return whether a column has texts, lists of them, or objects with one, such as the `raw` of Karpathy's sentences."""
    if is_list(kind):
        return _holds_texts(kind.value_type)
    return is_text(kind) or (pa.types.is_struct(kind) and any(kind.get_field_index(name) >= 0 for name in TEXT_KEYS))


def _is_own_version(schema: pa.Schema) -> bool:
    """Return whether a table is of a version: its captions may be a model's, and `references` has those of people."""
    kind = schema.field("captions").type if "captions" in schema.names else None
    kind = kind.value_type if kind is not None and is_list(kind) else None
    return bool(kind is not None and pa.types.is_struct(kind) and kind.get_field_index("prompt_id") >= 0)


def _do(job: Rejected | partial[RawSample | Rejected]) -> RawSample | Rejected:
    return job if isinstance(job, Rejected) else job()


def _paired(row: dict[str, Any], columns: Columns) -> tuple[list[Any], list[Any]]:
    """Return the questions of a row and the answers to each: of one question they may be a list."""
    questions, answers = list[Any](), list[Any]()
    for asked, answered in zip(columns["question"], columns["answer"], strict=True):
        question, answer = row[asked], row[answered]
        questions += question if isinstance(question, list) else [question]
        answers += _listed(answer) if isinstance(question, list) else [answer]
    return questions, answers


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts_of(item: Any) -> list[Any]:
    """Return the texts of an item of a column of captions: of an object, or of a list that stands in a cell, several."""
    is_several = isinstance(item, dict) or (isinstance(item, str) and list_in_cell(item) is not None)
    return read_texts({"": item}, ("",)) if is_several else [item]


def _open_parquet(config: Config, path: str, part: SourceSlice) -> Source:
    files = find_source_files(path, (".parquet",), follow_links=config.follow_links, is_whole=part == ALL)
    if not files.names:
        hint = "pass a file, or a folder on the disk or in a store: --source parquet:PATH"
        if files.is_local and any(Path(path).expanduser().rglob("*.arrow")):
            hint = f"datasets.load_from_disk({path!r}) reads it: write it with to_parquet first"
        raise SourceError(f"no Parquet file at {path}", hint=hint)
    if {IMAGES_FILE, REJECTIONS_FILE} <= {Path(name).name for name in files.names}:
        hint = f"`synth export --data {path} --format parquet --out FOLDER` writes files that hold the images"
        raise SourceError(f"{path} is a version that synth has made, and its images are stored outside of it", hint=hint)
    by_split, license = group_by_split(files.names), config.license or UNKNOWN
    tables = Tables(files.name, files.revision, license, by_split, files.open, files.translate_errors, part=part)
    source = open_mapped(tables, read_mapping(tables.schema, config.columns), config, "parquet")
    return replace(source, messages=(*files.messages, *source.messages))


PARQUET = SourceSpec(
    name="parquet:PATH",
    what="the images in a Parquet file, or in all under a folder; also s3://, gs://, hf:// and https://, read in place",
    license=LICENSE_UNLESS_SAID,
    needs="a vision-language model",
    example="synth generate --source parquet:rows.parquet --columns image=photo,references=alt_text",
    open=_open_parquet,
    options=frozenset({"source_split", "columns", "allow_urls", "follow_links", "license"}),
)


# --- the Hub


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


def _open_repository(config: Config, repo: str, part: SourceSlice) -> Source:
    tables = replace(open_hub(repo, allow_partial=config.allow_partial), part=part)
    name = f"hub:{repo.partition('@')[0]}"
    return open_mapped(tables, read_mapping(tables.schema, config.columns), config, name)


HUB = SourceSpec(
    name="hub:ORG/NAME",
    what="any dataset of the Hub that is Parquet, or that the Hub has converted; ORG/NAME:CONFIG; @REVISION pins a commit",
    license="as its card says",
    needs="the Hub, a vision-language model",
    example="synth generate --source hub:ORG/NAME --split train --limit 1000",
    open=_open_repository,
    options=frozenset({"source_split", "columns", "allow_urls", "allow_partial"}),
)
