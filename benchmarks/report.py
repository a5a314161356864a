"""Measure a report of many images: time to write, size, and time and memory to open it in Chromium.

The baseline is one HTML page with the same rows and thumbnails, as a gallery is usually written. The images are noise in the
colors and sizes of photographs: as hard to compress, and without private content.

    PYTHONPATH=. python benchmarks/report.py                    # 10,000 images of 500 x 375 px
    PYTHONPATH=. python benchmarks/report.py --images 1000
"""

import argparse
import html
import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from pipeline.dataset.version import Version
from pipeline.report.build import THUMBNAIL_BYTES, write_report
from pipeline.tables import SAMPLE, SPLITS
from tests.browser import FLAGS
from tests.scene_data import publish_rows, scene_samples, true_captions

BATCH = 250


def photo(seed: int) -> bytes:
    """Return a JPEG of noise at several scales, of about the bytes of a photograph of that size."""
    rng = np.random.default_rng(seed)
    image = np.zeros((375, 500, 3), np.float32)
    for side, weight in ((4, 90), (16, 50), (64, 25), (250, 12)):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        image += weight / 177 * np.asarray(noise, np.float32)
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def make_version(folder: Path, count: int) -> Version:
    """Write a version of `count` photographs, with the texts of drawn scenes."""
    samples = scene_samples(count)

    def batches() -> Iterator[pa.RecordBatch]:
        for first in range(0, count, BATCH):
            rows = [
                {"sample_id": s.id, "images": [photo(first + n)], "pdq_hashes": [b""], "width_px": 500, "height_px": 375}
                | {"source_row": s.source_row, "license": s.license, "references": list(s.references), "split": None}
                for n, s in enumerate(samples[first : first + BATCH])
            ]
            yield from pa.Table.from_pylist(rows, schema=SAMPLE).to_batches()

    version, _ = publish_rows(folder, [true_captions(samples)], batches(), source="photos")
    return version


def write_gallery(version: Version, path: Path) -> None:
    """Write all rows as HTML, each with its thumbnail, to a page in the folder of the report."""
    cards = [
        f'<article><img loading="lazy" src="thumbnails/{row["sample_id"][:2]}/{row["sample_id"]}-0.webp" alt="">'
        + "".join(f"<p>{html.escape(caption['text'])}</p>" for caption in row["captions"])
        + "</article>"
        for split in reversed(SPLITS)
        for row in version.read(split, ["sample_id", "captions"]).to_pylist()
    ]
    style = "body{display:grid;grid-template-columns:repeat(4,1fr)}img{width:100%;aspect-ratio:1}"
    path.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{''.join(cards)}", encoding="utf-8")


def measure_page(browser: Browser, page_file: Path) -> dict[str, float]:
    """Open a page; return the time to its first image and to full load, and the memory of its process."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.add_init_script(
        "window.first = new Promise(done => document.addEventListener('load', event => {"
        " if (event.target.tagName === 'IMG') done(performance.now()); }, true));"
    )
    page.goto(page_file.as_uri(), wait_until="load")
    loaded = page.evaluate("performance.now()")
    first = page.evaluate("(document.querySelector('#images') || document.body).scrollIntoView(), window.first")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    heap = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    stats = {"first_picture_ms": first, "loaded_ms": loaded, "heap_mb": heap["JSHeapUsedSize"] / 1e6, "nodes": heap["Nodes"]}
    if page.locator("#images input[type=search]").count():
        stats["search_ms"] = page.evaluate(
            "() => { const box = document.querySelector('#images input'); box.value = 'purple ring';"
            " const start = performance.now(); box.dispatchEvent(new Event('input')); return performance.now() - start; }"
        )
    stats["process_mb"] = _renderer_bytes() / 1e6
    page.close()
    return {name: round(value, 1) for name, value in stats.items()}


def _renderer_bytes() -> int:
    """Return the resident memory of the largest process of Chromium that draws pages."""
    sizes = [0]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (process / "cmdline").read_bytes():
                status = (process / "status").read_text()
                sizes.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
        except (OSError, IndexError):
            continue
    return max(sizes)


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = make_version(folder, args.images)
        start, cpu = time.perf_counter(), time.process_time()
        page = write_report(version, folder)
        written = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        thumbnails = [path.stat().st_size for path in page.parent.glob("thumbnails/*/*.webp")]
        assert max(thumbnails) <= THUMBNAIL_BYTES
        scripts = sum(path.stat().st_size for path in page.parent.glob("*.js"))
        sizes = {"index_kb": page.stat().st_size / 1e3, "rows_mb": scripts / 1e6, "thumbnails_mb": sum(thumbnails) / 1e6}
        gallery = page.with_name("gallery.html")
        write_gallery(version, gallery)
        rounds = []
        with sync_playwright() as playwright:
            for _ in range(args.rounds):  # a new browser each time: nothing is in a cache
                for name, file in (("report", page), ("gallery", gallery)):
                    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
                    rounds.append({"page": name, **measure_page(browser, file)})
                    browser.close()
        print(
            json.dumps(
                {"images": args.images, "write": written, "size": {n: round(v, 1) for n, v in sizes.items()}, "open": rounds},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
