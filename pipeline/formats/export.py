"""Export a version in a format for another tool.

An export is written to a hidden folder next to its destination, and renamed when it is complete.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset.content import frequent_phrases
from pipeline.dataset.publishing import write_self_contained
from pipeline.dataset.version import Version
from pipeline.digests import file_digest
from pipeline.errors import ConfigError
from pipeline.formats.formats import FORMATS, PARQUET, TABLES
from pipeline.formats.items import ALL, choose_texts, read_items, remove_opening
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import remove, write_text
from pipeline.storage.lock import hold_lock
from pipeline.storage.sidecars import OWN_LINES
from pipeline.tables import REJECTED, SPLITS

CHECKSUMS = "SHA256SUMS"
MAX_COUNTED = 1000  # captions in which phrases are counted


@dataclass(frozen=True, slots=True)
class Exported:
    """The folder of an export with facts about it."""

    folder: Path
    images: int  # number of exported images
    without_text: int  # number of images that were left out, since they have no text
    phrases: Mapping[str, float]  # phrases in most captions for a LoRA, with their shares
    has_opening: bool  # whether a caption had the opening to remove


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
    """Write a version to a new folder, as PARQUET or in one of FORMATS. `style` selects captions.

    `source_names` names files as in the source (`read_items`). `absolute` writes absolute paths of images.
    `trigger` begins each caption, for a LoRA. `opening` is removed from the beginning of each caption.
    Raises ConfigError if the folder exists or is in use, the format is unknown, or there is nothing to write.
    """
    report, splits, opening = progress or NullProgress(), tuple(splits), opening.strip()
    # This also refuses names such as `.`, for which no lock file can be created.
    _require_new(out)
    if kind not in (known := [PARQUET, *FORMATS]):
        raise ConfigError(f"no format {kind}", unknown=kind, known=known, hint=f"formats: {', '.join(known)}")
    if (source_names or absolute) and kind in TABLES:
        hint = "leave out --names and --absolute"
        raise ConfigError(f"the format {kind} has no files of images", hint=hint)
    busy = ConfigError(f"another process is exporting to {out}", hint="wait for it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(out.with_name(f".{out.name}.lock"), busy):
        _require_new(out)
        num_rows = _check_export(version, kind, style, trigger or opening, splits)
        draft = out.with_name(f".{out.name}.unfinished")
        remove(draft)
        draft.mkdir(parents=True)
        written, captions, has_opening = num_rows, list[str](), False
        if kind == PARQUET:
            write_self_contained(version, draft, splits)
        else:
            choices: dict[str, Any] = {"style": style, "trigger": trigger, "opening": opening}
            image_root = f"{out.absolute().as_posix()}/" if absolute else ""
            writer, written = FORMATS[kind](draft, image_root), 0
            items = read_items(version, splits, source_names=source_names)
            for number, original in enumerate(items, start=1):
                item = choose_texts(original, **choices, only_one=kind == "sidecar")
                written += writer.add(item)
                has_opening = has_opening or any(
                    remove_opening(text, opening) != text
                    for name, text in original.captions
                    if style in (None, ALL, name)
                )
                if trigger and len(captions) < MAX_COUNTED:
                    captions += [text.removeprefix(f"{trigger}, ") for _, text in item.captions]
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
        draft.rename(out)
    return Exported(out, written, num_rows - written, frequent_phrases(captions), has_opening)


def _require_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} already exists", hint="choose another folder: --out DIR")


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
