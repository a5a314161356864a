"""Source: a local folder of images, in an order that does not depend on the file system.

Human captions become references. They come from `picture.txt` (one caption per line), or from
`metadata.jsonl`, `.csv` or `.parquet` with a `file_name` column, as in the imagefolder format of `datasets`.
Prompts may use `folder`, `file_name` and other columns of these files as context.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.digests import digest
from pipeline.errors import ImageError, SourceError, did_you_mean
from pipeline.images.decode import IMAGE_SUFFIXES
from pipeline.sources.base import SourceSpec, check_samples, refuse_roles
from pipeline.sources.source_files import (
    FolderContent,
    count_by_suffix,
    describe_unread,
    digest_or_fault,
    list_files,
    read_image,
    row_name,
)
from pipeline.sources.texts import (
    METADATA_FILES,
    PATH_COLUMNS,
    FolderTexts,
    ImageTexts,
    add_caption_files,
    add_splits_of_folders,
    describe_model_texts,
    read_folder_texts,
)
from pipeline.tables import SPLITS
from pipeline.types import UNKNOWN, Context, RawSample, Rejected, Source


def open_folder(
    root: Path,
    license: str = UNKNOWN,
    columns: Sequence[str] = (),
    caption_files: Sequence[Path] = (),
    *,
    follow_links: bool = False,
) -> Source:
    """Open the image files below `root`, sorted by path.

    `columns` of metadata files become the context. Links to files outside `root` are
    rejected unless `follow_links` is set, because the files would be published. Raises SourceError if `root`
    has no image, or if no metadata file has one of the columns.
    """
    if not root.is_dir():
        raise SourceError(f"not a folder: {root}", hint="pass a folder of images: --source folder:PATH")
    content = list_files(root)
    if not content.images:
        raise _no_images_error(root, content)
    images = {row_name(path, root): path for path in content.images}
    rows: dict[str, Path | Rejected] = {**images, **{row.source_row: row for row in content.rejected}}
    sorted_rows = sorted(rows.items())
    paths = [row for _, row in sorted_rows if isinstance(row, Path)]
    bound = None if follow_links else root
    texts = read_folder_texts(root, paths, content.images, columns, follow_links=follow_links)
    add_caption_files(texts, caption_files, root, images)
    add_splits_of_folders(texts, images)
    known = texts.columns | {*PATH_COLUMNS}
    unknown = [name for name in columns if name not in known]
    if unknown:
        columns_hint = f"columns of {' and '.join(METADATA_FILES)}: {', '.join(sorted(known))}"
        hint = did_you_mean(unknown[0], known, columns_hint)
        raise SourceError(f"no column is named {unknown[0]}", hint=hint)

    def texts_of(path: Path) -> ImageTexts:
        return texts.texts.get(path) or ImageTexts()

    def context_of(path: Path) -> Context:
        folder = "" if path.parent == root else row_name(path.parent, root)
        values = {"folder": folder, "file_name": row_name(path, root)}
        values |= {name: value for name, value in texts.values.get(path, {}).items() if value}
        return tuple((name, values.get(name, "")) for name in columns)

    def read(row: tuple[str, Path | Rejected]) -> RawSample | Rejected:
        name, path = row
        if isinstance(path, Rejected):
            return path
        try:
            data = read_image(path, bound)
        except ImageError as error:
            return Rejected(source_row=name, reason=error.reason, detail=str(error))
        fields = texts_of(path).sample_fields() | {"context": context_of(path)}
        return RawSample(source_row=name, images=(data,), license=license, fields=fields)

    contents = [
        [name, digest_or_fault(path, bound), context_of(path), texts_of(path).as_json()]
        for name, path in sorted_rows
        if isinstance(path, Path)
    ]
    return Source(
        name="folder",
        revision=digest(contents),
        read=lambda start: check_samples(map(read, sorted_rows[start:])),
        count=lambda: len(sorted_rows),
        messages=tuple(_describe_content(content, texts)),
    )


def _no_images_error(root: Path, content: FolderContent) -> SourceError:
    hint = f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))} are read, also in subfolders"
    if any(path.suffix == ".arrow" for path in content.others):
        hint = f"load it with datasets.load_from_disk({str(root)!r}), and write it with to_parquet"
    return SourceError("; ".join([f"no images in {root}", *describe_unread(content)]), hint=hint)


def _describe_content(content: FolderContent, texts: FolderTexts) -> Iterator[str]:
    """Yield messages about the human texts in a folder, and about files that are not read."""
    image_texts = [texts.texts[path] for path in content.images if path in texts.texts]
    captions = [one.captions for one in image_texts if one.captions]
    questions = [one.questions for one in image_texts if one.questions]
    splits = [one.split for one in image_texts]
    total = len(content.images)
    if captions:
        yield f"human captions: {sum(map(len, captions)):,} for {len(captions):,} of {total:,} images"
    if any(splits):
        counts = [f"{splits.count(split):,} {split}" for split in SPLITS if split in splits]
        yield f"splits of the source: {', '.join(counts)}"
    if questions:
        yield f"human questions: {sum(map(len, questions)):,} about {len(questions):,} of {total:,} images"
    yield from describe_model_texts(texts.num_by_model)
    yield from texts.messages
    yield from describe_unread(content)
    read_files = {path.resolve() for path in texts.files}
    if unread := [path for path in content.others if path.resolve() not in read_files]:
        yield f"not read: {count_by_suffix(unread)}"


def _open(config: Config, path: str) -> Source:
    refuse_roles(config, "a folder", "to use columns of metadata.csv in prompts: --columns context=A,B")
    folder, license = Path(path).expanduser(), config.license or UNKNOWN
    links = config.follow_links
    return open_folder(folder, license, config.context, config.captions, follow_links=links)


SPEC = SourceSpec(
    name="folder:PATH",
    what="all images in a folder; captions from NAME.txt, metadata.jsonl, metadata.csv or --captions",
    example="synth generate --source folder:photos --model Qwen/Qwen2.5-VL-3B-Instruct",
    open=_open,
    options=frozenset({"columns", "captions", "split.group_by", "license", "follow_links"}),
)
