"""Source: a local folder of images, read in an order that does not depend on the disk.

Captions beside the images become references: `picture.txt` with one caption a line, or `metadata.jsonl`, `.csv` or
`.parquet` with a column `file_name`, as in the imagefolder format of `datasets`. Other columns of these files may be named as
the context of prompts, and so may `folder` and `file_name`, which every image has.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import SourceError
from pipeline.images.decode import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from pipeline.images.metadata import is_exif_name
from pipeline.sources.base import LICENSE_UNLESS_SAID, SourceSpec, check_samples, refuse_roles
from pipeline.sources.source_files import (
    REFUSALS,
    FolderContent,
    count_by_suffix,
    describe_unread,
    digest_or_fault,
    list_files,
    row_name,
)
from pipeline.sources.texts import (
    METADATA_FILES,
    OF_EVERY_IMAGE,
    References,
    add_caption_files,
    add_splits_of_folders,
    describe_by_model,
    read_references,
    texts_of_revision,
)
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import SPLITS
from pipeline.types import ALL, UNKNOWN, Context, RawSample, Rejected, Source, SourceSlice


def open_folder(
    root: Path,
    part: SourceSlice = ALL,
    license: str = UNKNOWN,
    columns: Sequence[str] = (),
    caption_files: Sequence[Path] = (),
    *,
    follow_links: bool = False,
) -> Source:
    """Return image files sorted by path, or a slice without a revision. Raise SourceError if `root` holds none.

    `columns` of metadata files, or fields of EXIF, become the context; SourceError is raised for one that is neither. The
    `caption_files` say what people wrote about the images (sources/texts.py).
    Links to files outside of `root` are rejected, unless `follow_links` is set: their content would be published.
    """
    if not root.is_dir():
        raise SourceError(f"not a folder: {root}", hint="pass a folder of images: --source folder:PATH")
    content = list_files(root)
    if not content.images:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        hint = f"files that end in {suffixes} are read, in subfolders too"
        if any(path.suffix == ".arrow" for path in content.others):
            hint = f"datasets.load_from_disk({str(root)!r}) reads it: write it with to_parquet, and read that with parquet:PATH"
        raise SourceError("; ".join([f"no image in {root}", *describe_unread(content)]), hint=hint)
    images = {row_name(path, root): path for path in content.images}
    rows: dict[str, Path | Rejected] = {**images}
    rows |= {row.source_row: row for row in content.rejected}
    own = [(name, rows[name]) for name in sorted(rows)[part.number :: part.of]]
    paths = [row for _, row in own if isinstance(row, Path)]
    bound = None if follow_links else root
    references = read_references(root, paths, columns, content.images, follow_links=follow_links)
    add_caption_files(references, caption_files, root, images)
    add_splits_of_folders(references, images)  # of all, also for a slice
    has_questions = bool(references.questions)
    contexts = {path: _context_of(path, root, references.values.get(path, {}), columns) for path in paths} if columns else {}
    unknown = [name for name in columns if name not in references.columns | {*OF_EVERY_IMAGE} and not is_exif_name(name)]
    if unknown and part == ALL:  # a slice may have no image beside the file that has the column
        known = ", ".join(sorted(references.columns | {*OF_EVERY_IMAGE}))
        raise SourceError(f"there is no column {unknown[0]}", hint=f"columns of {' and '.join(METADATA_FILES)}: {known}")

    def contents() -> Iterator[list[Any]]:
        for name, row in own:
            if not isinstance(row, Rejected):
                yield [name, digest_or_fault(row, bound), contexts.get(row, ()), texts_of_revision(references, row)]

    def read(number: int) -> RawSample | Rejected:
        name, row = own[number]
        if isinstance(row, Rejected):
            return row
        try:
            data = read_regular(row, bound, max_bytes=MAX_IMAGE_BYTES)
        except UnsafeFileError as error:
            return Rejected(source_row=name, reason=error.reason, detail=REFUSALS[error.reason])
        except OSError as error:
            return Rejected(source_row=name, reason="unreadable_file", detail=error.strerror or "unknown")
        texts: dict[str, Any] = {"references": references.captions.get(row, ()), "context": contexts.get(row, ())}
        if has_questions:
            texts["reference_qa"] = references.questions.get(row, ())
        texts["split"] = references.splits.get(row)
        return RawSample(source_row=name, images=(data,), license=license, fields=texts)

    return Source(
        name="folder",
        revision=digest(list(contents())) if part == ALL else "",
        read=lambda start: check_samples(map(read, range(start, len(own))), columns),
        count=lambda: len(own),
        messages=tuple(_describe_content(content, references)) if part == ALL else (),
    )


def _describe_content(content: FolderContent, references: References) -> Iterator[str]:
    """Yield what a user should know of a folder: what cannot be read, captions beside images, files that are for nothing."""
    if references.captions:
        captioned = [references.captions[path] for path in content.images if path in references.captions]
        count, total = sum(map(len, captioned)), len(content.images)
        yield f"captions of people: {count:,} for {len(captioned):,} of {total:,} images"
    if references.splits:
        counts = Counter(references.splits[path] for path in content.images if path in references.splits)
        yield f"splits of the source: {', '.join(f'{counts[split]:,} {split}' for split in SPLITS if counts[split])}"
    if references.questions:
        asked = [references.questions[path] for path in content.images if references.questions.get(path)]
        yield f"questions of people: {sum(map(len, asked)):,} about {len(asked):,} of {len(content.images):,} images"
    yield from describe_by_model(references.num_by_model)
    yield from references.messages
    yield from describe_unread(content)
    files = {path.resolve() for path in references.files}
    if unread := [path for path in content.others if path.resolve() not in files]:
        yield f"not read: {count_by_suffix(unread)}"


def _context_of(path: Path, root: Path, values: dict[str, str], columns: Sequence[str]) -> Context:
    own = {"folder": "" if path.parent == root else row_name(path.parent, root), "file_name": row_name(path, root)}
    return tuple((name, values.get(name) or own.get(name, "")) for name in columns)


def _open(config: Config, path: str, part: SourceSlice) -> Source:
    refuse_roles(config, "a folder", "a folder has files: --columns context=A,B names columns of metadata.csv for prompts")
    folder, license = Path(path).expanduser(), config.license or UNKNOWN
    return open_folder(folder, part, license, config.context, config.captions, follow_links=config.follow_links)


SPEC = SourceSpec(
    name="folder:PATH",
    what="every image under a folder, sorted; captions from NAME.txt, metadata.jsonl or metadata.csv there, or --captions",
    license=LICENSE_UNLESS_SAID,
    needs="a vision-language model",
    example="synth generate --source folder:photos --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=_open,
    options=frozenset({"columns", "captions", "split.group_by", "license", "follow_links"}),
)
