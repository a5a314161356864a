"""`synth export`: write a version as files for another tool, or its captions beside the user's own images.

An export appears under its name when it is complete. Until then it is in a hidden folder next to it.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset.pixels import lacks_pixels
from pipeline.dataset.publishing import write_self_contained
from pipeline.dataset.version import Version
from pipeline.digests import file_digest
from pipeline.errors import ConfigError
from pipeline.formats.base import Format
from pipeline.formats.formats import FORMATS, PARQUET
from pipeline.formats.items import no_pixels_error, read_items
from pipeline.images.decode import MAX_IMAGE_BYTES, image_id
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import remove, write_text
from pipeline.storage.lock import hold_lock
from pipeline.storage.sidecars import OWN_LINES, Existing, images_to_write, write_sidecar
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import REJECTED, SPLITS

CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: the folder, images with texts, and images that had none for this format."""

    folder: Path
    images: int
    without_text: int


def export_version(
    version: Version,
    kind: str,
    out: Path,
    *,
    style: str | None = None,
    splits: Iterable[str] = SPLITS,
    progress: Progress | None = None,
) -> Exported:
    """Write a version to a new folder in a format of FORMATS or as PARQUET; `style` names the captions that are wanted.

    Raises ConfigError if the folder is there, the version has no pixels, no image has such a caption, or another process writes
    to the folder.
    """
    if out.exists():  # also a name such as `.`, beside which nothing is written
        raise _is_there(out)
    busy = ConfigError(f"another process exports to {out}", hint="wait for it, or name another folder: --out DIR")
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(out.with_name(f".{out.name}.lock"), busy):
        return _export(version, kind, out, style, tuple(splits), progress or NullProgress())


def _export(version: Version, kind: str, out: Path, style: str | None, splits: tuple[str, ...], report: Progress) -> Exported:
    if out.exists():
        raise _is_there(out)
    _require_style(version, style)
    if kind == PARQUET and style:
        raise ConfigError(f"the format {PARQUET} holds all captions", hint="leave --style out")
    if kind == PARQUET and lacks_pixels(version):
        raise no_pixels_error(version)
    total = sum(version.manifest["rows"].get(split, 0) for split in splits)
    if not total:
        raise ConfigError(f"{version.name} has no rows in {' and '.join(splits)}", hint="leave --split out")
    draft = out.with_name(f".{out.name}.unfinished")
    remove(draft)  # of an interrupted export
    draft.mkdir(parents=True)
    if kind == PARQUET:
        write_self_contained(version, draft, splits)
        written, without = total, 0
    else:
        written, without = _write_items(version, FORMATS[kind](draft, style), splits, total, report)
    if not written:
        remove(draft)
        raise _nothing_to_write(version, style, kind)
    files = sorted(path for path in draft.rglob("*") if path.is_file() and path.name != OWN_LINES)
    sums = "".join(f"{file_digest(path)}  {path.relative_to(draft).as_posix()}\n" for path in files)
    write_text(draft / CHECKSUMS, sums)
    draft.rename(out)
    return Exported(out, written, without)


def _write_items(version: Version, format_: Format, splits: tuple[str, ...], total: int, report: Progress) -> tuple[int, int]:
    """Write the images of splits in a format; return how many had texts for it, and how many had none."""
    written = without = 0
    try:
        for item in read_items(version, splits):
            has_text = format_.add(item)
            written, without = written + has_text, without + (not has_text)
            report("export", written + without, total)
        format_.close()
    finally:
        format_.abandon()
    return written, without


def write_beside(
    version: Version, folder: Path, *, style: str | None = None, existing: Existing = "refuse", progress: Progress | None = None
) -> Exported:
    """Write each caption as a text file beside the user's own image, which is found by its name and known by its bytes.

    Files that are there are kept, unless `existing` says to overwrite them or to append to them. Raises ConfigError if there
    are some and it says nothing, before anything is written; or if an image is not the one that the version knows.
    """
    report = progress or NullProgress()
    captions = list(_own_images(version, folder, style))
    if not captions:
        raise _nothing_to_write(version, style, "sidecar")
    to_write = set(images_to_write([image for image, _, _ in captions], existing))
    for number, (image, caption, by_model) in enumerate(captions, start=1):
        if image in to_write:
            lines = caption.splitlines()
            write_sidecar(image, lines, existing, own=lines if by_model else ())
        report("export", number, len(captions))
    return Exported(folder, len(to_write), version.num_rows - len(captions))


def _own_images(version: Version, folder: Path, style: str | None) -> Iterator[tuple[Path, str, bool]]:
    """Yield each image of the user's folder with its caption, and whether a model wrote that."""
    for item in read_items(version):
        text = item.caption(style)
        if text is None:
            continue
        path = _path_of(folder, item.source_row)
        try:
            is_same = image_id(read_regular(path, folder, max_bytes=MAX_IMAGE_BYTES)) == item.sample_id
        except (OSError, ValueError, UnsafeFileError) as error:
            hint = "name the folder that the images came from: --in-place DIR"
            raise ConfigError(f"{path} is not there: {error}", hint=hint) from None
        if not is_same:
            raise ConfigError(f"{path} is another image than the version has", hint="generate again, or put the image back")
        yield path, text, text not in item.of_people


def _path_of(folder: Path, name: str) -> Path:
    """Return the file of a row of a folder; bytes of its name that are no UTF-8 stand in it as escapes."""
    path = folder / name
    if os.path.lexists(path):
        return path
    return folder / os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda escape: bytes([int(escape[1], 16)]), name.encode()))


def _is_there(out: Path) -> ConfigError:
    return ConfigError(f"{out} is there already", hint="name another folder: --out DIR")


def _require_style(version: Version, style: str | None) -> None:
    """Raise ConfigError for a style that no caption of the version has: a format without it would say nothing."""
    captions = version.manifest["measured"].get("captions", {})
    if style is not None and style not in captions:
        hint = f"styles of its captions: {', '.join(captions)}" if captions else "it has no captions: leave --style out"
        raise ConfigError(f"no caption of {version.name} has the style {style}", hint=hint)


def _nothing_to_write(version: Version, style: str | None, kind: str) -> ConfigError:
    if kind == "dpo" and REJECTED.name not in version.manifest.get("scores", ()):
        hint = "generate some: synth generate --samples 4 --pairs"
        return ConfigError(f"{version.name} has no pairs of a better and a worse caption", hint=hint)
    own, captions = version.manifest.get("own_columns"), version.manifest["measured"].get("captions", {})
    if own and not captions and not style:
        hint = f"its columns {', '.join(own)} go along in --format imagefolder, webdataset and lance"
        return ConfigError(f"{version.name} has no captions for this format", hint=hint)
    known = ", ".join(captions) or "none"
    wanted = f"a caption of the style {style}" if style else "a text"
    return ConfigError(f"no image of {version.name} has {wanted} for this format", hint=f"styles of its captions: {known}")
