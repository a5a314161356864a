"""Export a version in a format for another tool."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.dataset.publishing import write_self_contained
from pipeline.dataset.version import Version
from pipeline.digests import digest, file_digest
from pipeline.errors import ConfigError
from pipeline.formats.formats import FORMATS, PARQUET, TABLES
from pipeline.formats.items import ALL, choose_texts, read_items
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import remove, write_text
from pipeline.storage.lock import hold_lock
from pipeline.storage.sidecars import EXPORT_RECORD, OWN_LINES
from pipeline.tables import REJECTED, SPLITS

CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Exported:
    """The folder of an export, with counts of images. `is_new` is False if the folder already had the export.

    `without_text` counts images that were left out. `has_opening` is True if a caption had the opening to
    remove.
    """

    folder: Path
    images: int
    without_text: int
    has_opening: bool
    is_new: bool = True


def export_version(
    version: Version,
    kind: str,
    out: Path,
    *,
    style: str | None = None,
    splits: Iterable[str] = SPLITS,
    source_names: bool = False,
    absolute: bool = False,
    trigger: str = "",
    opening: str = "",
    progress: Progress | None = None,
) -> Exported:
    """Write a version to a folder, as PARQUET or in one of FORMATS. `style` selects captions.

    `source_names` names files as in the source (`read_items`). `absolute` writes absolute paths of images.
    `opening` is removed from the beginning of captions. Then `trigger` is prepended, to train a LoRA. If the
    folder already has this export, nothing is written. Raises ConfigError if the folder has other content or
    is in use, if the format is unknown, or if there is nothing to write.
    """
    report, splits, opening = progress or NullProgress(), tuple(splits), opening.strip()
    image_root = f"{out.absolute().as_posix()}/" if absolute else ""
    settings = digest([version.manifest, kind, style, splits, source_names, image_root, trigger, opening])
    if kind not in (known := [PARQUET, *FORMATS]):
        hint = f"formats: {', '.join(known)}"
        raise ConfigError(f"unknown format {kind}", unknown=kind, known=known, hint=hint)
    # This also refuses names such as `.`, for which no lock file can be created.
    if done := _find_export(out, settings):
        return done
    if (source_names or absolute) and kind in TABLES:
        hint = "leave out --names and --absolute"
        raise ConfigError(f"the format {kind} has no image files", hint=hint)
    busy = ConfigError(f"another process is exporting to {out}", hint="wait for it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(out.with_name(f".{out.name}.lock"), busy):
        if done := _find_export(out, settings):
            return done
        num_rows = _check_export(version, kind, style, trigger or opening, splits)
        draft = out.with_name(f".{out.name}.unfinished")
        remove(draft)
        draft.mkdir(parents=True)
        written, has_opening = num_rows, False
        if kind == PARQUET:
            write_self_contained(version, draft, splits)
        else:
            choices: dict[str, Any] = {"style": style, "trigger": trigger, "only_one": kind == "sidecar"}
            writer, written = FORMATS[kind](draft, image_root), 0
            items = read_items(version, splits, source_names=source_names)
            for number, original in enumerate(items, start=1):
                item = choose_texts(original, **choices, opening=opening)
                written += writer.add(item)
                has_opening |= item.captions != choose_texts(original, **choices, opening="").captions
                report("export", number, num_rows)
            writer.close()
        if not written:
            remove(draft)
            hint = "leave out --style" if style not in (None, ALL) else "imagefolder exports all columns"
            if kind == "dpo" and REJECTED.name not in version.manifest.get("scores", ()):
                hint = "generate pairs with `synth generate --samples 4 --pairs`"
            chosen = "" if style in (None, ALL) else f" in the style {style}"
            raise ConfigError(f"no image of {version.name} has a text for {kind}{chosen}", hint=hint)
        files = sorted(path for path in draft.rglob("*") if path.is_file() and path.name != OWN_LINES)
        sums = "".join(f"{file_digest(path)}  {path.relative_to(draft).as_posix()}\n" for path in files)
        write_text(draft / CHECKSUMS, sums)
        counts = (written, num_rows - written, has_opening)
        write_text(draft / EXPORT_RECORD, f"{settings}\n{json.dumps(counts)}\n")
        draft.rename(out)
    return Exported(out, *counts)


def _find_export(out: Path, settings: str) -> Exported | None:
    """Return the export with these settings in a folder, or None if the folder does not exist.

    Raises ConfigError if the folder has other content.
    """
    if not out.exists():
        return None
    record = out / EXPORT_RECORD
    made_with, _, counts = (record.read_text(errors="replace") if record.is_file() else "").partition("\n")
    if made_with == settings and counts:
        return replace(Exported(out, *json.loads(counts)), is_new=False)
    problem = f"{out} already exists, and is not an export of this version with these settings"
    raise ConfigError(problem, hint="choose another folder: --out DIR")


def _check_export(version: Version, kind: str, style: str | None, edit: str, splits: tuple[str, ...]) -> int:
    """Return the number of rows to export. Raises ConfigError if there is nothing to export."""
    captions = version.manifest["measured"].get("captions", {})
    if style not in (None, ALL, *captions):
        hint = f"styles of its captions: {', '.join(captions) or 'none'}"
        raise ConfigError(f"no caption of {version.name} has the style {style}", hint=hint)
    if kind == PARQUET and (style or edit):
        hint = "leave out --style, --trigger and --remove-opening"
        raise ConfigError(f"the format {PARQUET} always contains all captions unchanged", hint=hint)
    if version.lacks_pixels:
        raise ConfigError(f"{version.name} has no images", hint="pass --images FOLDER")
    num_rows: int = sum(version.manifest["rows"].get(split, 0) for split in splits)
    if not num_rows:
        raise ConfigError(f"{version.name} has no rows in {' and '.join(splits)}", hint="leave out --split")
    return num_rows
