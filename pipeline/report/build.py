"""Write a report: one HTML file that opens without a server.

The page makes no network requests. Model text is untrusted: the template escapes it, and the script never
parses it as HTML.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.dataset.audit import audit_in_words
from pipeline.dataset.calibration import checks_in_words
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import REASONS
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, ImageError
from pipeline.report.figures import funnel_of, images_of, steps_match
from pipeline.report.html import (
    THUMBNAIL_PIXELS,
    chart,
    data_uri,
    points,
    render_page,
    script_hash,
    thumbnail,
)
from pipeline.report.rows import read_rejected, read_rows
from pipeline.storage.files import MAX_JSON_BYTES, read_json, write_text
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import SPLITS
from pipeline.text.reasons import SCORES_IN_WORDS, in_words

SMALL_REPORT_IMAGES = 500
SMALL_REPORT_THUMBNAIL_BYTES, THUMBNAIL_BYTES = 16_384, 4_096
SCRIPT_ROWS = 1000
BATCH_ROWS = 64
MAX_REJECTED_PICTURES = 50  # per reason
PROVENANCE = '<meta name="generator" content="synth report">'  # only pages with this tag are overwritten


def write_report(
    version: Version, folder: Path, checkpoint: Path | None = None, max_rows: int = 10_000
) -> Path:
    """Write `report.html` into the dataset folder, and return its path.

    At most `max_rows` images are shown: the ones with the lowest ids. Ids are digests, so this is a random
    sample. Raises ConfigError if the checkpoint has no finished training run, or if `report.html` is not a
    report. Raises StoreError if the version or a step file is damaged.
    """
    training = _read_training(checkpoint) if checkpoint else None
    page = folder / "report.html"
    if page.exists() and not _is_report(page):
        raise ConfigError(
            f"{page} is not a report written by synth", hint="move it away: the report would overwrite it"
        )
    write_text(page, _Report(version, folder, training, min(version.num_rows, max_rows)).render())
    return page


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint in a dataset folder that was scored last, or None."""
    metrics_files = (folder / "checkpoints").glob("*/metrics.json")
    newest = max(metrics_files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.parent if newest else None


@dataclass(frozen=True)
class _Report:
    version: Version
    folder: Path
    training: dict[str, Any] | None
    num_shown: int  # images

    @cached_property
    def has_steps(self) -> bool:
        """Whether the step files in the folder belong to this version."""
        return steps_match(self.folder, self.version.manifest)

    @cached_property
    def _rejected(self) -> list[dict[str, str]]:
        return list(read_rejected(self.folder)) if self.has_steps else []

    def _rejected_ids(self) -> set[str]:
        """Return the ids of the first MAX_REJECTED_PICTURES samples per reason, and of those they repeat."""
        counts: Counter[tuple[str, str]] = Counter()
        ids = set[str]()
        for row in self._rejected:
            counts[row["step"], row["reason"]] += 1
            if counts[row["step"], row["reason"]] <= MAX_REJECTED_PICTURES:
                ids |= {row["id"], row["repeats"]}
        return ids - {""}

    def _read_rows(self) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of rows with thumbnails instead of images. Held-out splits come first."""
        chosen_ids = None
        if self.num_shown < self.version.num_rows:
            batches = (batch["sample_id"].to_pylist() for _, batch in self.version.batches(["sample_id"]))
            chosen_ids = set(nsmallest(self.num_shown, chain.from_iterable(batches)))
        is_small = self.num_shown <= SMALL_REPORT_IMAGES
        max_bytes = SMALL_REPORT_THUMBNAIL_BYTES if is_small else THUMBNAIL_BYTES

        def with_thumbnails(row: dict[str, Any]) -> dict[str, Any]:
            return row | {"images": [thumbnail_uri(image, max_bytes) for image in row["images"]] or [""]}

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for rows in read_rows(self.version, tuple(reversed(SPLITS)), chosen_ids, BATCH_ROWS):
                yield list(pool.map(with_thumbnails, rows))

    def render(self) -> str:
        """Return the page."""
        manifest = self.version.manifest
        rows = [row for batch in self._read_rows() for row in batch]
        first_images = {row["id"]: row["images"][0] for row in rows}
        others = images_of(self.folder, self._rejected_ids() - first_images.keys())
        more = {sample_id: thumbnail_uri(image, THUMBNAIL_BYTES) for sample_id, image in others}
        settings = {
            "digest": manifest["digest"],
            "version": self.version.name,
            "images": self.num_shown,
            "reasons": REASONS,
            "pictures": more,
        }
        script = (files("pipeline.report") / "report.js").read_text(encoding="utf-8")
        parts = [rows[start : start + SCRIPT_ROWS] for start in range(0, len(rows), SCRIPT_ROWS)]
        scripts = [
            f"const report = {script_literal(settings)};\n{script}",
            *(_call("images", part) for part in parts),
            _call("rejected", self._rejected),
        ]
        return render_page(
            "report.html.j2",
            manifest=manifest,
            images=self.version.num_rows,
            shown=self.num_shown,
            funnel=funnel_of(manifest),
            in_words=in_words,
            audit_in_words=audit_in_words(manifest.get("audit")),
            checks_in_words=checks_in_words(manifest),
            scores=[name for name in manifest.get("scores", []) if name in SCORES_IN_WORDS],
            scores_in_words=SCORES_IN_WORDS,
            has_steps=self.has_steps,
            cost=DatasetDir(self.folder).read_cost() or None,
            training=self.training,
            provenance=PROVENANCE,
            first_images=first_images,
            scripts=scripts,
            script_hashes=[script_hash(script) for script in scripts],
        )


def thumbnail_uri(image: bytes, max_bytes: int, max_pixels: int = THUMBNAIL_PIXELS) -> str:
    """Return a thumbnail as a data URI, or "" if the image is broken."""
    try:
        return data_uri(thumbnail(image, max_bytes, max_pixels))
    except ImageError:
        return ""  # an untrusted version may contain broken images, which the page shows as "no picture"


def _call(kind: str, rows: list[dict[str, Any]]) -> str:
    return f'add("{kind}", {script_literal(rows)});\n'


def script_literal(value: Any) -> str:
    """Return a value as a JavaScript literal, in ASCII and without `<`, which could end the script."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _is_report(page: Path) -> bool:
    with page.open(encoding="utf-8", errors="replace") as file:
        return PROVENANCE in file.read(4096)


def _read_training(checkpoint: Path) -> dict[str, Any]:
    try:
        log = read_regular(checkpoint / "log.jsonl", checkpoint, max_bytes=MAX_JSON_BYTES).decode("utf-8")
        curves = _curves([json.loads(line) for line in log.splitlines()])
        return {"metrics": read_json(checkpoint / "metrics.json"), "curves": curves}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UnsafeFileError) as error:
        message = f"{checkpoint} has no finished training run: {error}"
        hint = "pass a folder of a finished training run: --checkpoint DIR"
        raise ConfigError(message, hint=hint) from None


def _curves(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # Self-critical training has another loss, which weights captions by rewards and may be negative.
    supervised = [line for line in lines if line.get("stage") != "scst"]
    loss = {"training": points(supervised, "loss"), "validation": points(lines, "validation_loss")}
    own, shuffled = points(lines, "validation_cider_d"), points(lines, "validation_shuffled_cider_d")
    charts = [
        chart("Loss", loss),
        chart("CIDEr-D on the validation split", {"own image": own, "shuffled": shuffled}),
    ]
    rewards = points(lines, "reward")
    return [*charts, chart("Reward of sampled captions", {"training": rewards})] if rewards else charts
