"""Source: a local folder of images, in an order that does not depend on the file system.

Human captions become references. They come from `picture.txt` (one caption per line), or from
`metadata.jsonl`, `.csv` or `.parquet` with a `file_name` column, as in the imagefolder format of `datasets`.
Prompts may use `folder`, `file_name` and other columns of these files as context.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Config, expand_user
from pipeline.digests import digest
from pipeline.errors import ImageError, SourceError
from pipeline.images.decode import IMAGE_SUFFIXES
from pipeline.sources.base import (
    SourceSpec,
    as_text,
    check_samples,
    first_names,
    refuse_roles,
    require_columns,
)
from pipeline.sources.parquet import read_plain_rows
from pipeline.sources.source_files import describe_unread, digest_or_fault, list_files, read_image, row_name
from pipeline.sources.splits import SPLIT_OF_WORD, read_split, split_of_path, splits_of_names
from pipeline.sources.text_files import (
    MAX_FILE_BYTES,
    decode_text,
    parse_rows,
    read_text,
    translate_file_errors,
)
from pipeline.sources.texts import (
    MAX_TEXT_CHARACTERS,
    METADATA_FILES,
    PATH_COLUMNS,
    ImageTexts,
    match_images,
    normalize_path,
    read_captions,
)
from pipeline.storage.sidecars import OWN_LINES, is_own_line, read_own_lines
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import CAPTION_COLUMNS, QUESTION, SPLIT, SPLITS
from pipeline.types import UNKNOWN, Context, RawSample, Rejected, Source

MAX_SIDECAR_BYTES = 1_000_000


class FolderTexts:
    """The human texts about the images in a folder, and messages about texts that were not used.

    `images` maps names to paths. Links that lead out of the folder `bound` are refused. `columns` are the
    columns of metadata files that become the context. Raises SourceError if a file is unusable, or if a
    column is missing.
    """

    def __init__(
        self,
        root: Path,
        images: dict[str, Path],
        bound: Path | None,
        columns: Sequence[str],
        caption_files: Sequence[Path],
    ) -> None:
        self._root, self._images, self._bound, self._columns = root, images, bound, columns
        self._texts: defaultdict[str, ImageTexts] = defaultdict(ImageTexts)
        self._values: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._known_columns = {*PATH_COLUMNS}
        self._num_by_model = 0
        self._messages: list[str] = []
        self.files: set[Path] = set()
        names = {str(path): name for name, path in images.items()}
        self._name_of = {normalize_path(path): name for path, name in names.items()} | names
        parents = {path.parent for path in images.values()}
        folders = {one for path in parents for one in (path, *path.parents) if one.is_relative_to(root)}
        for file in (folder / name for folder in sorted(folders) for name in METADATA_FILES):
            if file.is_symlink() or file.is_file():
                self._add_metadata_file(file)
        self._add_sidecars()
        # A file name may state a split, such as captions_val2017.json.
        splits = splits_of_names({str(file): split_of_path(file.stem) or "" for file in caption_files})
        known_files = {*map(os.path.realpath, self.files)}  # Path.resolve() fails for a link to itself
        for file in (path for path in caption_files if os.path.realpath(path) not in known_files):
            self._add_caption_file(file, splits.get(str(file)))
        self._add_splits_of_folders()
        require_columns(columns, sorted(self._known_columns), f"columns of {' and '.join(METADATA_FILES)}")

    def texts_of(self, name: str) -> ImageTexts:
        """Return the texts about an image."""
        return self._texts.get(name) or ImageTexts()

    def context_of(self, name: str) -> Context:
        """Return the values of the context columns for an image."""
        values = {"folder": name.rpartition("/")[0], "file_name": name}
        values |= {column: value for column, value in self._values.get(name, {}).items() if value}
        return tuple((column, values.get(column, "")) for column in self._columns)

    def describe(self) -> Iterator[str]:
        """Yield messages about the texts."""
        captions = [one.captions for one in self._texts.values() if one.captions]
        questions = [one.questions for one in self._texts.values() if one.questions]
        splits, of_all = [one.split for one in self._texts.values()], f"of {len(self._images):,} images"
        if captions:
            yield f"human captions: {sum(map(len, captions)):,} for {len(captions):,} {of_all}"
        if any(splits):
            counts = [f"{splits.count(split):,} {split}" for split in SPLITS if split in splits]
            yield f"splits of the source: {', '.join(counts)}"
        if questions:
            yield f"human questions: {sum(map(len, questions)):,} about {len(questions):,} {of_all}"
        if self._num_by_model:
            yield f"skipped {self._num_by_model:,} model-written texts"
        yield from self._messages

    def _add_metadata_file(self, file: Path) -> None:
        rows = _read_metadata(file, self._bound)
        self.files.add(file)
        columns = {str(column) for row in rows for column in row}
        self._known_columns |= columns
        if not rows:
            self._messages.append(f"{file} was not used: no row has a file_name")
        elif not columns & {*self._columns, *CAPTION_COLUMNS, QUESTION}:
            names = ", ".join(map(str, rows[0]))
            known = f"captions are read from {', '.join(CAPTION_COLUMNS)}, but its columns are {names}"
            self._messages.append(f"{file} has no captions: {known}")
        try:
            splits = [read_split(row.get(SPLIT)) for row in rows]
        except ValueError as error:
            self._messages.append(f"{file}: the column {SPLIT} is not read: {error}")
            splits = [None] * len(rows)
        # Without a validation split, `train` is ignored, since some of these images will be held out.
        keeps_train, unknown = "validation" in splits, list[str]()
        for row, split in zip(rows, splits, strict=True):
            texts = ImageTexts.of_row({**row, SPLIT: None})
            texts.split = split if split != "train" or keeps_train else None
            self._num_by_model += texts.num_by_model
            path = str(file.parent / str(row["file_name"]))
            name = self._name_of.get(path) or self._name_of.get(normalize_path(path))
            if name is None:
                unknown.append(str(row["file_name"]))
                continue
            self._texts[name].merge(texts)
            for column in (column for column in self._columns if column in row):
                where = f"{file}, {row['file_name']}: the column {column}"
                self._values[name][column] = as_text(row[column], where)
        self._describe_unknown(file, unknown)

    def _add_sidecars(self) -> None:
        """Add the captions in `NAME.txt` files next to images, without lines that synth wrote."""
        own_lines, unread = dict[Path, frozenset[str]](), list[str]()
        for name, path in sorted(self._images.items()):
            file, folder = path.with_suffix(".txt"), path.parent
            if not os.path.isfile(file):  # noqa: PTH113  # Path.is_file() fails if a link is too long
                continue
            self.files |= {file, folder / OWN_LINES}
            try:
                text = decode_text(read_regular(file, self._bound, max_bytes=MAX_SIDECAR_BYTES))
                if folder not in own_lines:
                    own_lines[folder] = read_own_lines(folder, self._bound)
            except ValueError:
                unread.append(f"{file} is not UTF-8")
                continue
            except (OSError, UnsafeFileError) as error:
                unread.append(str(error))
                continue
            lines = [line.strip()[:MAX_TEXT_CHARACTERS] for line in text.splitlines() if line.strip()]
            human = [line for line in lines if not is_own_line(file, line, own_lines[folder])]
            self._texts[name].captions += human
            self._num_by_model += len(lines) - len(human)
        if unread:
            problem = f"text files that cannot be read: {len(unread):,} ({first_names(unread)})"
            self._messages.append(problem)

    def _add_caption_file(self, file: Path, split: str | None) -> None:
        matched, unknown = match_images(read_captions(file), list(self._images))
        if not matched:
            problem = f"{file} names no image in {self._root}; it names {first_names(unknown)}"
            hint = f"use the file names of the folder, such as {next(iter(self._images))}"
            raise SourceError(problem, hint=hint)
        self.files.add(file)
        self._describe_unknown(file, unknown)
        for name, texts in matched.items():
            texts.split = texts.split or split
            self._texts[name].merge(texts)
            self._num_by_model += texts.num_by_model

    def _add_splits_of_folders(self) -> None:
        """Set the split of images whose folder is named after a split, unless a file states their split."""
        shared = os.path.commonpath(self._images) if len(self._images) > 1 else ""
        paths = {name: name.removeprefix(f"{shared}/").rpartition("/")[0] for name in self._images}
        folders = {name: path.partition("/")[0] for name, path in paths.items()}
        splits = splits_of_names(folders)
        for name, split in splits.items():
            self._texts[name].split = self._texts[name].split or split
        unnamed = [name for name, folder in folders.items() if folder.casefold() not in SPLIT_OF_WORD]
        if splits and unnamed:
            message = "images are not in a folder named after a split: a hash assigns their split"
            self._messages.append(f"{len(unnamed):,} {message} ({first_names(unnamed)})")

    def _describe_unknown(self, file: Path, names: Sequence[str]) -> None:
        if names:
            message = f"{file} lists {len(names):,} images that do not exist: {first_names(names)}"
            self._messages.append(message)


def _read_metadata(file: Path, bound: Path | None) -> list[dict[str, Any]]:
    """Return the metadata rows that have a `file_name`. Raises SourceError if the file cannot be read."""
    hint = f"it needs file_name and one of {', '.join(CAPTION_COLUMNS)}, in UTF-8"
    with translate_file_errors(file, hint):
        if file.suffix != ".parquet":
            rows = parse_rows(read_text(file, bound), "CSV" if file.suffix == ".csv" else "JSON")
        else:
            data = read_regular(file, bound, max_bytes=MAX_FILE_BYTES)
            # A file without this column is another program's table, and is not about images.
            has_names = "file_name" in pq.read_schema(pa.BufferReader(data)).names
            rows = read_plain_rows(data, MAX_FILE_BYTES) if has_names else iter(())
        return [row for row in rows if row.get("file_name")]


def _open(config: Config, path: str) -> Source:
    """Open the image files below a folder, sorted by path. Without follow_links, reject links out of it."""
    refuse_roles(config, "a folder", "to use columns of metadata.csv in prompts, pass --columns context=A,B")
    root, license = expand_user(path), config.license or UNKNOWN
    if not root.is_dir():
        hint, known = "pass a folder of images: --source folder:PATH", map(str, root.parent.glob("*/"))
        raise SourceError(f"not a folder: {root}", unknown=str(root), known=known, hint=hint)
    content = list_files(root)
    if not content.images:
        hint = f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))} are read, also in subfolders"
        raise SourceError("; ".join([f"no images in {root}", *describe_unread(content, ())]), hint=hint)
    images = {row_name(file, root): file for file in content.images}
    all_rows: dict[str, Path | Rejected] = {**images, **{row.source_row: row for row in content.rejected}}
    rows = sorted(all_rows.items())
    bound = None if config.follow_links else root
    texts = FolderTexts(root, images, bound, config.context, config.captions)
    read_files = {*map(os.path.realpath, texts.files)}
    others = [file for file in content.others if os.path.realpath(file) not in read_files]

    def read(row: tuple[str, Path | Rejected]) -> RawSample | Rejected:
        name, file = row
        if isinstance(file, Rejected):
            return file
        try:
            data = read_image(file, bound)
        except ImageError as error:
            return Rejected(source_row=name, reason=error.reason, detail=str(error))
        fields = texts.texts_of(name).sample_fields() | {"context": texts.context_of(name)}
        return RawSample(source_row=name, images=(data,), license=license, fields=fields)

    contents = [
        [name, digest_or_fault(file, bound), texts.context_of(name), texts.texts_of(name).as_json()]
        for name, file in rows
        if isinstance(file, Path)
    ]
    return Source(
        name="folder",
        revision=digest(contents),
        read=lambda start: check_samples(map(read, rows[start:])),
        count=lambda: len(rows),
        messages=(*texts.describe(), *describe_unread(content, others)),
    )


SPEC = SourceSpec(
    name="folder:PATH",
    what="all images in a folder; captions from NAME.txt, metadata.jsonl, metadata.csv or --captions",
    example="synth generate --source folder:photos --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=_open,
    options=frozenset({"columns", "captions", "split.group_by", "license", "follow_links"}),
)
