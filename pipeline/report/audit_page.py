"""Write the page of an audit: random texts of a version, one at a time next to their image.

The page makes no network requests. Model text is untrusted: the script never parses it as HTML.
"""

from importlib.resources import files
from pathlib import Path

from pipeline.dataset.audit import COLUMNS, Frame
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import read_verdicts
from pipeline.dataset.version import Version
from pipeline.report.html import render_page, script_hash, script_literal, thumbnail_uri
from pipeline.report.rows import read_rows
from pipeline.storage.files import write_text
from pipeline.tables import SPLITS

MAX_IMAGE_BYTES, MAX_PAGE_BYTES = 80_000, 60_000_000
IMAGE_PIXELS = 900 * 900
BATCH_ROWS = 64


def write_audit_page(version: Version, dataset: DatasetDir, number: int, seed: int) -> tuple[Path, int]:
    """Draw `number` texts of a version, and write `audit.html`. Return its path and the number of texts.

    Verdicts that were applied before are shown to their reviewers.
    """
    manifest = version.manifest
    own = manifest.get("own_columns", {})
    columns = [name for name in (*COLUMNS, *own) if name in manifest["columns"]]
    frame = Frame.of((batch for _, batch in version.batches(columns)), own, seed)
    names = frame.first(number)
    max_bytes = min(MAX_IMAGE_BYTES, MAX_PAGE_BYTES // max(1, len(names)))
    contents = dict(names)
    items = {}
    for rows in read_rows(version, SPLITS, {*contents}, BATCH_ROWS):
        for row in rows:
            images = [thumbnail_uri(image, max_bytes, IMAGE_PIXELS) for image in row["images"]]
            for text in row["texts"]:
                if text["content"] == contents[row["id"]]:
                    items[row["id"]] = {"id": row["id"], "from": row["from"], "images": images, "text": text}
    verdicts = read_verdicts(dataset.reviews)
    settings = {
        "digest": manifest["digest"],
        "version": version.name,
        "seed": seed,
        "items": [items[sample_id] for sample_id, _ in names],
        "verdicts": [verdict.model_dump(mode="json") for verdict in verdicts if verdict.seed == seed],
    }
    code = (files("pipeline.report") / "audit.js").read_text(encoding="utf-8")
    script = f"const audit = {script_literal(settings)};\n{code}"
    page = dataset.path / "audit.html"
    text = render_page(
        "audit.html.j2",
        title=f"{manifest.get('title') or manifest['source']['name']} {version.name}",
        drawn=len(names),
        texts=frame.texts.total(),
        seed=seed,
        script=script,
        script_hash=script_hash(script),
    )
    write_text(page, text)
    return page, len(names)
