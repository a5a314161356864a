"""Sources: any table with images in it, on the Hub (`hub:ORG/NAME`) or on this disk (`parquet:PATH`).

Which column is what is said by `--map`, or guessed where the columns make it plain.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import Config
from pipeline.digests import digest, file_digest
from pipeline.errors import ImageError, SourceError
from pipeline.images.decode import check_image, deck_id
from pipeline.sources.base import SourceSpec
from pipeline.sources.parquet import SPLITS, Tables, embedded_bytes, is_list, is_text, split_of_path
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import ALL, Rejected, Sample, Source, SourceSlice

ROLES = ("image", "pages", "references", "split")
_IMAGE_NAMES = ("image", "img", "jpg", "png", "picture")
_REFERENCE_NAMES = ("caption", "captions", "text", "sentences", "alt_text", "original_alt_text", "description")
_SAY = "say which with --map, such as --map image=COLUMN,references=COLUMN"


def open_mapped(tables: Tables, mapping: dict[str, str], split: str | None, name: str, *, allow_urls: bool = False) -> Source:
    """Return a source of that name of the rows of some tables; a row without a usable image is rejected with a reason.

    Raises:
        SourceError: a column that is named is not there, or none can be guessed; or there is no such split.
    """
    columns = read_mapping(tables.schema, mapping)
    if "split" not in columns:
        check_split(tables, split)
    rows = mapped_rows(tables, columns, split, allow_urls=allow_urls)
    return Source(
        name=name,
        revision=tables.revision,
        rows=rows,
        count=lambda: count_mapped(tables, columns, split),
        decks="pages" in columns,
    )


def count_mapped(tables: Tables, columns: dict[str, list[str]], split: str | None, names: dict[str, str] = SPLITS) -> int:
    """Return how many rows `mapped_rows` would yield."""
    if split is None or "split" not in columns:
        return tables.count(split)
    return sum(names.get(str(value)) == split for value in tables.values(columns["split"][0]))


def open_parquet(path: Path, part: SourceSlice = ALL) -> Tables:
    """Return the tables of a Parquet file, or of all under a folder, or a part of them, which then have no revision.

    Raises:
        SourceError: there is none.
    """
    paths = [path] if path.is_file() else sorted(each for each in path.rglob("*.parquet") if each.is_file())
    if not paths:
        raise SourceError(f"no Parquet file at {path}", hint="pass a file or a folder: --source parquet:PATH")
    root = path.parent if path.is_file() else path
    files: dict[str | None, list[str]] = {}
    for each in paths:
        files.setdefault(split_of_path(str(each.relative_to(root))), []).append(str(each.relative_to(root)))
    revision = digest([[str(each.relative_to(root)), file_digest(each)] for each in paths]) if part == ALL else ""
    return Tables(path.name, revision, "unknown", files, lambda name: (root / name).open("rb"), part=part)


def check_split(tables: Tables, split: str | None) -> None:
    """Raise SourceError where there is no such split."""
    if split is not None and split not in tables.files:
        raise SourceError(f"{tables.name} has no split {split}", hint=f"it has {', '.join(str(name) for name in tables.files)}")


def read_mapping(schema: pa.Schema, mapping: dict[str, str]) -> dict[str, list[str]]:
    """Return the columns of each role: as told, else as their names and types make plain."""
    columns = {role: _named(schema, role, name) for role, name in mapping.items()}
    if "image" not in columns and "pages" not in columns:
        columns |= _guess_images(schema)
    if "references" not in mapping:
        texts = [name for name in _REFERENCE_NAMES if name in schema.names and _is_text(schema.field(name).type)]
        columns["references"] = texts[:1]
    if "split" not in mapping and "split" in schema.names and is_text(schema.field("split").type):
        columns["split"] = ["split"]
    return columns


def _named(schema: pa.Schema, role: str, name: str) -> list[str]:
    """Return the columns that a name of the mapping stands for; `page_*` is all of them, by their number."""
    if role not in ROLES:
        raise SourceError(f"--map knows no {role}", hint=f"it maps {', '.join(ROLES)}")
    pattern = re.compile(re.escape(name).replace(r"\*", r"(\d+)"))
    found = [(int(match[1]) if match.groups() else 0, n) for n in schema.names if (match := pattern.fullmatch(n))]
    if not found:
        raise SourceError(f"there is no column {name}", hint=f"columns: {', '.join(schema.names)}")
    return [column for _, column in sorted(found)]


def _guess_images(schema: pa.Schema) -> dict[str, list[str]]:
    images = [field.name for field in schema if _is_image(field.type)]
    lists = [field.name for field in schema if is_list(field.type) and _is_image(field.type.value_type)]
    plain = [name for name in _IMAGE_NAMES if name in schema.names and _is_bytes(schema.field(name).type)]
    if len(images) > 1 and all(re.fullmatch(r"page_\d+", name) for name in images):
        return {"pages": _named(schema, "pages", "page_*")}
    if len(images) == 1 or "image" in images:
        return {"image": ["image" if "image" in images else images[0]]}
    if not images and len(lists) == 1:
        return {"pages": lists}
    if not images and plain:
        return {"image": plain[:1]}
    several = f"several columns hold images: {', '.join([*images, *lists])}" if images or lists else "no column holds images"
    raise SourceError(f"{several} (columns: {', '.join(schema.names)})", hint=_SAY)


def _is_image(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return is_text(kind) or (is_list(kind) and is_text(kind.value_type))


def mapped_rows(
    tables: Tables,
    columns: dict[str, list[str]],
    split: str | None,
    names: dict[str, str] = SPLITS,
    *,
    allow_urls: bool = False,
) -> Iterator[Sample | Rejected]:
    """Yield the rows of one split, or of all. `names` maps what a split column holds to train, validation or test."""
    wanted = [column for found in columns.values() for column in found]
    own = columns.get("split")
    for name, filed, row in tables.rows(wanted, None if own else split):
        stated = names.get(str(row[own[0]])) if own else filed
        if stated is None and own:
            yield Rejected(source_row=name, reason="unknown_split", detail=f"the row is in none of {', '.join(SPLITS)}")
            continue
        if split is not None and stated != split:
            continue
        references = _texts(row[columns["references"][0]]) if columns.get("references") else ()
        images = [image for column in columns.get("pages", columns.get("image", [])) for image in _images(row[column])]
        if "pages" not in columns and len(images) > 1:
            yield Rejected(source_row=name, reason="several_images", detail="map the column as pages, for a deck")
            continue
        kept = kept_split(stated, split)
        yield sample_of(name, images, tables.licence, kept, allow_urls=allow_urls, references=references)


def first_of_each(
    tables: Tables, key: str, columns: Sequence[str], split: str | None
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yield (name, split that it is filed under, values) of the first row of each value of `key`, in each split."""
    done: set[tuple[str | None, Any]] = set()
    for name, filed, row in tables.rows((key, *columns), split):
        if (filed, row[key]) not in done:
            done.add((filed, row[key]))
            yield name, filed, row


def kept_split(stated: str | None, asked: str | None) -> str | None:
    """Return the split that a row stays in; none where training rows alone are asked for: some of them are to be held out."""
    return None if asked == "train" else stated


def sample_of(
    name: str, images: list[Any], licence: str, split: str | None, *, allow_urls: bool = False, **more: Any
) -> Sample | Rejected:
    """Return a sample of what a row holds, or why it is none; empty pages at the end of a deck are no pages."""
    while len(images) > 1 and images[-1] is None:
        images = images[:-1]
    if len(images) > MAX_PAGES:
        return Rejected(source_row=name, reason="too_many_pages", detail=f"{len(images)} pages are more than {MAX_PAGES}")
    try:
        pages = [embedded_bytes(image, allow_urls=allow_urls) for image in images or [None]]
        checked = [check_image(page) for page in pages]
    except ImageError as error:
        return Rejected(source_row=name, reason=error.reason, detail=str(error))
    return Sample(
        id=deck_id([page.id for page in checked]),
        source_row=name,
        images=tuple(pages),
        pdq_hashes=tuple(page.pdq_hash for page in checked),
        width_px=checked[0].width_px,
        height_px=checked[0].height_px,
        licence=licence,
        split=split,
        **more,
    )


def _images(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip())


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    from pipeline.sources.remote import is_remote, open_remote  # fsspec waits until it is needed

    tables = replace(open_remote(path), part=part) if is_remote(path) else open_parquet(Path(path).expanduser(), part)
    return open_mapped(tables, config.columns, config.source_split, "parquet", allow_urls=config.allow_urls)


SPEC = SourceSpec(
    name="parquet:PATH",
    what="the images in a Parquet file, or in all under a folder; also s3://, gs://, hf:// and https://, read in place",
    splits="as the file names say, else by hash",
    size="yours",
    license="unknown: say it in the card",
    needs="a vision-language model",
    example="synth generate --source parquet:rows.parquet --map image=photo,references=alt_text",
    open=_open,
    options=frozenset({"source_split", "columns", "allow_urls"}),
)
