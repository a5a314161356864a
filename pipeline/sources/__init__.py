"""Find and open sources of images by name. A source yields samples and rejected rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.config.sections import ImageFilterConfig
from pipeline.errors import ConfigError, SourceError
from pipeline.sources import archive, benchmarks, documents, folder, scenes, tables
from pipeline.sources.base import SourceSpec
from pipeline.storage.files import DISK_ONLY_ERRORS
from pipeline.tasks import asks_about_decks
from pipeline.types import ImageKind, Rejected, Sample, Source

PHOTO_STYLES = ("plain", "detailed")
SOURCES: tuple[SourceSpec, ...] = (
    scenes.SPEC,
    scenes.DECK_SPEC,
    folder.SPEC,
    archive.SPEC,
    documents.PDF,
    documents.PDF_PAGES,
    documents.VIDEO,
    tables.PARQUET,
    tables.HUB,
    benchmarks.FLICKR30K,
    benchmarks.VQAV2,
    benchmarks.SLIDEVQA,
)


def find_source(name: str) -> SourceSpec:
    """Return the spec for a source such as `folder` or `folder:PATH`. Raises ConfigError if it is unknown."""
    for spec in SOURCES:
        if spec.kind == name.partition(":")[0]:
            return spec
    kinds, hint = [spec.kind for spec in SOURCES], "`synth doctor --sources` lists all sources"
    if Path(name).is_dir():
        hint = f"did you mean folder:{name}?"
    elif Path(name).is_file():
        hint = f"write the kind of the source before the path: KIND:{name}"
    raise ConfigError(f"unknown source: {name}", unknown=name, known=kinds, hint=hint)


def with_source_defaults(config: Config) -> Config:
    """Return the config with the source's defaults for tasks, caption styles, pixels and grouping.

    Raises ConfigError if a caption length is set for drawn scenes.
    """
    spec, changes, generate = find_source(config.source), dict[str, Any](), dict[str, Any]()
    if "tasks" not in config.model_fields_set:
        changes["tasks"] = spec.default_tasks(config)
    if config.generate.caption_words and config.has_scene_prompts:
        problem = "the prompts of the tiny model do not support --words"
        raise ConfigError(problem, hint="leave out --words")
    if spec.default_grouping and "group_by" not in config.split.model_fields_set:
        changes["split"] = config.split.model_copy(update={"group_by": spec.default_grouping})
    if "caption_styles" not in config.generate.model_fields_set and not config.has_scene_prompts:
        generate["caption_styles"] = PHOTO_STYLES
    if spec.is_endless and "max_pixels" not in config.generate.model_fields_set:
        # Drawn images are small, so they need no limit.
        generate["max_pixels"] = None
    changes["generate"] = config.generate.model_copy(update=generate)
    return config.model_copy(update=changes)


def choose_image_kind(config: Config) -> ImageKind | None:
    """Return the kind of images to search for near-duplicates, or None if no search is needed."""
    if config.dedupe.images == "none":
        return None
    if config.dedupe.images != "auto":
        return config.dedupe.images
    spec = find_source(config.source)
    return "graphics" if spec.image_kind and holds_decks(config) else spec.image_kind


def holds_decks(config: Config) -> bool:
    """Return whether the samples are decks, judged by the settings alone."""
    tasks = config.tasks or find_source(config.source).default_tasks(config)
    return asks_about_decks(tasks)


def open_source(config: Config) -> Source:
    """Open a source.

    Raises ConfigError if the settings do not fit the source, SourceError if it cannot be read, and OSError if
    the disk is full.
    """
    spec, argument = find_source(config.source), config.source.partition(":")[2]
    spec.check_options(config)
    if ":" in spec.name and not argument:
        problem = f"--source {spec.kind} needs an argument: {spec.name}"
        raise ConfigError(problem, hint=f"for example: {spec.example}")
    try:
        source = spec.open(config, argument)
    except OSError as error:
        if error.errno in DISK_ONLY_ERRORS:
            raise
        problem = f"cannot read {error.filename or argument}: {error.strerror or error}"
        hint = "check the path and its permissions" if error.errno else "check the source and the network"
        raise SourceError(problem, hint=hint) from None
    tasks = with_source_defaults(config).tasks
    if tasks and (source.decks != asks_about_decks(tasks) or (source.decks and len(tasks) > 1)):
        content = "decks of pages" if source.decks else "single images"
        hint = f"pass --tasks {'deck_qa' if source.decks else 'caption,qa'}"
        if source.decks and "columns" in spec.options:
            hint += "; if each row has a list of one image, pass --columns image=COLUMN"
        problem = f"{config.source} consists of {content}, which do not support {', '.join(tasks)}"
        raise ConfigError(problem, hint=hint)
    read, settings = source.read, config.image_filter
    return replace(source, read=lambda start: (filter_image(row, settings) for row in read(start)))


def filter_image(row: Sample | Rejected, settings: ImageFilterConfig) -> Sample | Rejected:
    """Return the row, or a rejection if its image is too small, too narrow or of one color."""
    if isinstance(row, Rejected) or not settings.enabled:
        return row
    short_px, long_px = sorted((row.width_px, row.height_px))
    size, ratio = f"{row.width_px} x {row.height_px} px", settings.max_aspect_ratio
    if short_px < settings.min_side_px:
        reason = "image_too_small"
        detail = f"{size}: the shorter side has less than {settings.min_side_px} px"
    elif long_px > ratio * short_px:
        reason, detail = "extreme_aspect_ratio", f"{size}: the ratio is over {ratio:g}"
    elif row.contrast < settings.min_contrast:
        reason, detail = "one_color_image", f"its contrast is {row.contrast:.2f}"
    else:
        return row
    return Rejected(source_row=row.source_row, reason=reason, detail=detail)


def read_images(name: str) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Yield (sample id, images) for each sample in a source."""
    for row in open_source(resolve(source=name, image_filter={"enabled": False})).rows:
        if isinstance(row, Sample):
            yield row.id, row.images
