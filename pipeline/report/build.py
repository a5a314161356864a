"""Write a report: one HTML file that opens without a server."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from heapq import nsmallest
from pathlib import Path
from typing import Any

from pipeline.dataset.audit import audit_in_words
from pipeline.dataset.calibration import checks_in_words
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.limits import SCORED, score_curves
from pipeline.dataset.price import price_in_words
from pipeline.dataset.reviews import REASONS, Verdict, read_stored
from pipeline.dataset.version import TRIAL, Version
from pipeline.report.html import page_script, render_page, script_hash, script_literal, thumbnail_uri
from pipeline.report.rows import images_of, read_rejected, read_rows, steps_match
from pipeline.storage.files import read_batches, write_text
from pipeline.tables import SPLITS
from pipeline.text.reasons import SCORES_IN_WORDS, in_words

MAX_IMAGES, SMALL_REPORT_IMAGES = 10_000, 500
SMALL_REPORT_THUMBNAIL_BYTES, THUMBNAIL_BYTES = 16_384, 4_096
SCRIPT_ROWS = 1000
BATCH_ROWS = 64
MAX_REJECTED_PICTURES = 50  # per reason


def write_report(version: Version, folder: Path) -> Path:
    """Write `report.html` into the dataset folder, and return its path.

    The page shows the MAX_IMAGES images with the lowest ids, which are a random sample, because ids are
    digests. An existing page is replaced. Raises StoreError if the version or a step file is damaged.
    """
    manifest, num_shown = version.manifest, min(version.num_rows, MAX_IMAGES)
    dataset = DatasetDir(folder)
    cost, verdicts = dataset.read_cost(), read_stored(dataset.reviews, Verdict)
    reviewed = dataset.step_files("review") if verdicts else ()
    tables = (table for path in reviewed for table in read_batches(path, SCORED))
    rows = list(_read_rows(version, num_shown))
    has_steps = steps_match(folder, manifest)
    rejected = list(read_rejected(folder)) if has_steps else []
    others = images_of(folder, _pictured_ids(rejected) - {row["id"] for row in rows})
    settings = {
        "digest": manifest["digest"],
        "version": version.name,
        "images": num_shown,
        "reasons": REASONS,
        "pictures": {sample_id: thumbnail_uri(images[0], THUMBNAIL_BYTES) for sample_id, images in others},
    }
    parts = [rows[start : start + SCRIPT_ROWS] for start in range(0, len(rows), SCRIPT_ROWS)]
    scripts = [
        page_script("report.js", report=settings),
        *(f'add("images", {script_literal(part)});\n' for part in parts),
        f'add("rejected", {script_literal(rejected)});\n',
    ]
    text = render_page(
        "report.html.j2",
        manifest=manifest,
        version="preview" if folder.name == TRIAL else version.name,
        images=version.num_rows,
        shown=num_shown,
        funnel=manifest.get("funnel", []),
        in_words=in_words,
        audit_in_words=audit_in_words,
        checks_in_words=checks_in_words,
        scores=[name for name in manifest.get("scores", []) if name in SCORES_IN_WORDS],
        scores_in_words=SCORES_IN_WORDS,
        score_curves=score_curves(tables, verdicts) if has_steps else {},
        has_steps=has_steps,
        cost=cost or None,
        price_in_words=price_in_words,
        asking_s=cost.get("asking_s", 0.0),
        scripts=scripts,
        script_hashes=[script_hash(script) for script in scripts],
    )
    page = folder / "report.html"
    write_text(page, text)
    return page


def _read_rows(version: Version, num_shown: int) -> Iterator[dict[str, Any]]:
    """Yield rows with thumbnails instead of images. Held-out splits come first."""
    is_sample = num_shown < version.num_rows
    chosen_ids = set(nsmallest(num_shown, version.sample_ids())) if is_sample else None
    max_bytes = SMALL_REPORT_THUMBNAIL_BYTES if num_shown <= SMALL_REPORT_IMAGES else THUMBNAIL_BYTES

    def with_thumbnails(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"images": [thumbnail_uri(image, max_bytes) for image in row["images"]] or [""]}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for rows in read_rows(version, tuple(reversed(SPLITS)), chosen_ids, BATCH_ROWS):
            yield from pool.map(with_thumbnails, rows)


def _pictured_ids(rejected: Iterable[dict[str, str]]) -> set[str]:
    """Return the ids of the samples to show with the rejections, and of the samples that they repeat."""
    counts: Counter[tuple[str, str]] = Counter()
    ids = set[str]()
    for row in rejected:
        counts[row["step"], row["reason"]] += 1
        if counts[row["step"], row["reason"]] <= MAX_REJECTED_PICTURES:
            ids |= {row["id"], row["repeats"]}
    return ids - {""}
