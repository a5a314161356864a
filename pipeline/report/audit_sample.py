"""Choose texts for an audit, and write them as an HTML page or as tasks for a labeling tool."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataset.audit import REJECTED, TEXTS, Frame, audit_in_words
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.review_tools import ERROR_KINDS, audit_files
from pipeline.dataset.reviews import TextName, Verdict, read_stored, text_name
from pipeline.dataset.version import Version
from pipeline.errors import StoreError
from pipeline.report.html import page_script, render_page, script_hash, thumbnail_uri
from pipeline.report.rows import annotation_text, images_of, source_rows, steps_match, to_pylist
from pipeline.storage.files import open_table, write_text
from pipeline.tables import FINAL

# A page, or a file of tasks for another tool, has at most 60 MB: Base64 makes images larger by a third.
MAX_IMAGE_BYTES, MAX_IMAGES_BYTES = 80_000, 45_000_000
IMAGE_PIXELS = 900 * 900
PAGE = "page"
# A fifth of the texts, and at least MIN_REPEATS, are shown twice. REPEAT_AFTER other texts come in between.
REPEATED_FRAC, MIN_REPEATS, REPEAT_AFTER = 5, 10, 8


def write_audit(version: Version, dataset: DatasetDir, number: int, seed: int, tool: str) -> tuple[Path, int]:
    """Write `number` texts of a version. Return the page or folder, and the number of texts.

    `tool` is PAGE, or a tool of `audit_files`. The page also shows verdicts that were applied before. Raises
    StoreError if the step files are not those of the version.
    """
    manifest = version.manifest
    if not steps_match(dataset.path, manifest):
        hint = "audit the newest version, in the folder of its run"
        raise StoreError(f"the steps of {version.name} are not in {dataset.path}", hint=hint)
    frame = Frame.of([dataset], seed)
    names = frame.first(number)
    by_name = _read_items(dataset, names)
    items = [by_name[name] | {"repeat": repeat} for name, repeat in with_repeats(names)]
    title = f"{manifest.get('title') or manifest['source']['name']} {version.name}"
    if tool != PAGE:
        folder = dataset.path / f"audit-{tool}"
        for path, text in audit_files(tool, items, seed, title).items():
            write_text(folder / path, text)
        return folder, len(names)
    # Images are stored once in the page, since a text may be shown twice.
    pictures = {item["id"]: item["images"] for item in items}
    verdicts = read_stored(dataset.reviews, Verdict)
    settings = {
        "digest": manifest["digest"],
        "version": version.name,
        "seed": seed,
        "items": [item | {"images": []} for item in items],
        "pictures": pictures,
        "errors": ERROR_KINDS,
        "verdicts": [verdict.model_dump(mode="json") for verdict in verdicts if verdict.seed == seed],
    }
    script = page_script("audit.js", audit=settings)
    page = dataset.path / "audit.html"
    text = render_page(
        "audit.html.j2",
        title=title,
        drawn=len(names),
        repeats=len(items) - len(names),
        kept=frame.texts.total() - frame.size(REJECTED),
        rejected=frame.size(REJECTED),
        measured=audit_in_words(audit)[0] if (audit := manifest.get("audit")) else "",
        errors=ERROR_KINDS,
        seed=seed,
        script=script,
        script_hash=script_hash(script),
    )
    write_text(page, text)
    return page, len(names)


def with_repeats(names: Sequence[TextName]) -> Iterator[tuple[TextName, bool]]:
    """Yield the texts in the order to judge them, and whether a text was shown before."""
    repeats = list(names[: max(MIN_REPEATS, len(names) // REPEATED_FRAC)])
    for n, name in enumerate(names):
        yield name, False
        if n + 1 >= REPEAT_AFTER and n % (REPEATED_FRAC - 1) == 0 and repeats:
            yield repeats.pop(0), True
    yield from ((name, True) for name in repeats)


def _read_items(dataset: DatasetDir, names: Sequence[TextName]) -> dict[TextName, dict[str, Any]]:
    """Return the texts to judge with their images. The checks may have rejected them."""
    wanted, ids = {*names}, {sample_id for sample_id, _ in names}
    rows: dict[TextName, dict[str, Any]] = {}
    id_array = pa.array(sorted(ids), pa.string())
    more = ("evidence_pages", "expression", "answer_type")
    for step, which, columns in (("verify", "rejected", ()), ("review", "kept", FINAL.names)):
        for path in dataset.step_files(step, which):
            for batch in open_table(path).iter_batches(columns=[*TEXTS, *more, *columns]):
                for row in to_pylist(batch.filter(pc.is_in(batch["sample_id"], id_array))):
                    rows |= {name: row} if (name := text_name(row)) in wanted else {}
    where = source_rows(dataset.step_files("read"), ids)
    max_bytes = min(MAX_IMAGE_BYTES, MAX_IMAGES_BYTES // max(1, len(ids)))
    images = {
        sample_id: [thumbnail_uri(page, max_bytes // len(pages), IMAGE_PIXELS) for page in pages]
        for sample_id, pages in images_of(dataset.path, ids)
    }
    return {
        name: {
            "id": name[0],
            "from": where.get(name[0], ""),
            "images": images.get(name[0], [""]),
            "text": annotation_text(row),
        }
        for name, row in rows.items()
    }
