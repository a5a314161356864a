"""Choose random texts for an audit, and write them as an HTML page or as tasks for a labeling tool."""

from pathlib import Path
from typing import Any

from pipeline.dataset.audit import COLUMNS, Frame
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.review_tools import audit_files
from pipeline.dataset.reviews import Verdict, read_stored
from pipeline.dataset.version import Version
from pipeline.report.html import page_script, render_page, script_hash, thumbnail_uri
from pipeline.report.rows import read_rows
from pipeline.storage.files import write_text
from pipeline.tables import SPLITS

# A page, or a file of tasks for another tool, has at most 60 MB: Base64 makes images larger by a third.
MAX_IMAGE_BYTES, MAX_IMAGES_BYTES = 80_000, 45_000_000
IMAGE_PIXELS = 900 * 900
BATCH_ROWS = 64
PAGE = "page"


def write_audit(version: Version, dataset: DatasetDir, number: int, seed: int, tool: str) -> tuple[Path, int]:
    """Write `number` random texts of a version. Return the page or folder, and the number of texts.

    `tool` is PAGE, or a tool of `audit_files`. The page also shows verdicts that were applied before.
    """
    manifest = version.manifest
    own = manifest.get("own_columns", {})
    columns = [name for name in (*COLUMNS, *own) if name in manifest["columns"]]
    frame = Frame.of((batch for _, batch in version.batches(columns)), own, seed)
    names = frame.first(number)
    by_id = _read_items(version, dict(names))
    items = [by_id[sample_id] for sample_id, _ in names]
    title = f"{manifest.get('title') or manifest['source']['name']} {version.name}"
    if tool != PAGE:
        folder = dataset.path / f"audit-{tool}"
        for path, text in audit_files(tool, items, seed, title).items():
            write_text(folder / path, text)
        return folder, len(names)
    verdicts = read_stored(dataset.reviews, Verdict)
    settings = {
        "digest": manifest["digest"],
        "version": version.name,
        "seed": seed,
        "items": items,
        "verdicts": [verdict.model_dump(mode="json") for verdict in verdicts if verdict.seed == seed],
    }
    script = page_script("audit.js", audit=settings)
    page = dataset.path / "audit.html"
    text = render_page(
        "audit.html.j2",
        title=title,
        drawn=len(names),
        texts=frame.texts.total(),
        seed=seed,
        script=script,
        script_hash=script_hash(script),
    )
    write_text(page, text)
    return page, len(names)


def _read_items(version: Version, contents: dict[str, str]) -> dict[str, Any]:
    """Return the texts to judge with their images, by sample id. `contents` has the content of each text."""
    items = {}
    for rows in read_rows(version, SPLITS, {*contents}, BATCH_ROWS):
        for row in rows:
            num_images = len(contents) * max(1, len(row["images"]))
            max_bytes = min(MAX_IMAGE_BYTES, MAX_IMAGES_BYTES // num_images)
            images = [thumbnail_uri(image, max_bytes, IMAGE_PIXELS) for image in row["images"]]
            for text in row["texts"]:
                if text["content"] == contents[row["id"]]:
                    items[row["id"]] = {"id": row["id"], "from": row["from"], "images": images, "text": text}
    return items
