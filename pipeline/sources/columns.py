"""Sources: any table with images, on the Hub (`hub:ORG/NAME`) or on this disk (`parquet:PATH`).

`--columns` maps columns to roles; the other roles are guessed from column names and types.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import CONTEXT, Config
from pipeline.errors import ImageError, SourceError
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import LICENSE_UNLESS_SAID, SourceSpec, as_text, check_samples
from pipeline.sources.captions import FILE_NAMES
from pipeline.sources.image_urls import FETCHED_AT_ONCE, fetch_ahead
from pipeline.sources.parquet import (
    SPLIT_OF_WORD,
    Tables,
    describe_held_out,
    embedded_bytes,
    group_by_split,
    is_list,
    is_text,
    stored_split,
)
from pipeline.sources.remote import find_source_files
from pipeline.sources.texts import TEXT_KEYS, list_in_cell, read_question, read_texts
from pipeline.tables import ANSWERS, CAPTION_COLUMNS, QUESTION
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import ALL, UNKNOWN, RawSample, Rejected, Sample, Source, SourceSlice

ROLES = ("image", "pages", "references", "question", "answer", "split", CONTEXT)
PARTIAL_MESSAGE = "the Hub has converted only a first part of {name} to Parquet: the rest is not read"
Columns = dict[str, list[str]]  # of each role
NO_COLUMN = "none"  # for the split and the question: a column of that name says something else
_OF_CHOICES = frozenset(("choices", "options", "candidates"))  # of which an answer may be a number or a letter
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
_MAPPING_HINT = "say which with --columns, such as --columns image=COLUMN,references=COLUMN"


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


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    files = find_source_files(path, (".parquet",), follow_links=config.follow_links, is_whole=part == ALL)
    if not files.names:
        hint = "pass a file, or a folder on the disk or in a store: --source parquet:PATH"
        if files.is_local and any(Path(path).expanduser().rglob("*.arrow")):
            hint = f"datasets.load_from_disk({path!r}) reads it: write it with to_parquet first"
        raise SourceError(f"no Parquet file at {path}", hint=hint)
    by_split, license = group_by_split(files.names), config.license or UNKNOWN
    tables = Tables(files.name, files.revision, license, by_split, files.open, files.translate_errors, part=part)
    source = open_mapped(tables, read_mapping(tables.schema, config.columns), config, "parquet")
    return replace(source, messages=(*files.messages, *source.messages))


SPEC = SourceSpec(
    name="parquet:PATH",
    what="the images in a Parquet file, or in all under a folder; also s3://, gs://, hf:// and https://, read in place",
    license=LICENSE_UNLESS_SAID,
    needs="a vision-language model",
    example="synth generate --source parquet:rows.parquet --columns image=photo,references=alt_text",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls", "follow_links", "license"}),
)
