"""Write a report: one HTML file for a small version, a folder for a large one. Both open from the disk, without a server.

The page asks nothing of the network. Text of a model is data: the template escapes it, and the script never takes it as markup.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import nsmallest
from importlib.resources import files
from os import cpu_count
from pathlib import Path
from typing import Any

from pipeline.errors import ImageError
from pipeline.marks import REASONS
from pipeline.page import chart, data_uri, points, render_page, script_hash, thumbnail
from pipeline.report.figures import clusters_of, distributions_of, funnel_of, images_of
from pipeline.report.rows import read_rejected, read_rows
from pipeline.store import Folder, Version, read_json, write_text
from pipeline.tables import SPLITS

ONE_FILE_ROWS = 500
ONE_FILE_THUMBNAIL_BYTES, THUMBNAIL_BYTES = 16_384, 4_096
PART_ROWS = 1000  # of one file of the folder
AT_ONCE = 64  # images that are scaled down at once

Place = Callable[[str, int, bytes], str]  # (sample id, page, thumbnail) -> where the page finds it


def write_report(version: Version, folder: Path, checkpoint: Path | None = None, max_rows: int = 10_000) -> Path:
    """Write `report.html` into the dataset folder, or `report/` where a version is large; return the path of the page.

    Args:
        version: what is shown.
        folder: the dataset folder.
        checkpoint: the training to show, if any.
        max_rows: of a version with more images, those with the lowest ids are shown: as good as drawn by lot.
    """
    report = _Report(version, folder, checkpoint, min(version.images, max_rows))
    return report.write_file() if report.shown <= ONE_FILE_ROWS else report.write_folder()


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint under a dataset folder that was scored last, if any."""
    found = sorted((folder / "checkpoints").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None


@dataclass(frozen=True, slots=True)
class _Report:
    version: Version
    folder: Path
    checkpoint: Path | None
    shown: int  # images

    def write_file(self) -> Path:
        rows = [row for some in self._rows(ONE_FILE_THUMBNAIL_BYTES, _within) for row in some]
        data = [_call("images", rows), _call("rejected", list(read_rejected(self.folder)))]
        path = self.folder / "report.html"
        write_text(path, self._page(_within, {row["id"]: row["images"][0] for row in rows}, data, parts=[]))
        return path

    def write_folder(self) -> Path:
        home = self.folder / "report"
        thumbnails: set[Path] = set()
        parts: list[str] = []
        first: dict[str, str] = {}

        def beside(sample_id: str, page: int, small: bytes) -> str:
            path = home / "thumbnails" / sample_id[:2] / f"{sample_id}-{page}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(small)
            thumbnails.add(path)
            return path.relative_to(home).as_posix()

        def write_part(kind: str, rows: list[dict[str, Any]]) -> None:
            script = _call(kind, rows)
            # Named by what it holds: the page that is there now goes on working until the new one takes its place.
            parts.append(f"{kind}-{len(parts):03d}-{hashlib.sha256(script.encode()).hexdigest()[:12]}.js")
            write_text(home / parts[-1], script)

        held: list[dict[str, Any]] = []
        for rows in self._rows(THUMBNAIL_BYTES, beside):
            first |= {row["id"]: row["images"][0] for row in rows}
            held += rows
            if len(held) >= PART_ROWS:
                write_part("images", held)
                held = []
        for kind, rest in (("images", held), ("rejected", list(read_rejected(self.folder)))):
            if rest:
                write_part(kind, rest)
        write_text(home / "index.html", self._page(beside, first, [], parts))
        for path in {*home.glob("*.js"), *home.glob("thumbnails/*/*.webp")} - thumbnails - {home / name for name in parts}:
            path.unlink()
        return home / "index.html"

    def _rows(self, max_bytes: int, place: Place) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of the version as the page knows them, some at a time, with their thumbnails in place."""
        chosen = None
        if self.shown < self.version.images:
            every = (
                sample_id for _, batch in self.version.batches(["sample_id"]) for sample_id in batch["sample_id"].to_pylist()
            )
            chosen = set(nsmallest(self.shown, every))
        with ThreadPoolExecutor(cpu_count()) as pool:
            for rows in read_rows(self.version, tuple(reversed(SPLITS)), chosen, AT_ONCE):  # what is held out comes first
                yield list(pool.map(lambda row: _pictured(row, max_bytes, place), rows))

    def _page(self, place: Place, first: dict[str, str], data: list[str], parts: list[str]) -> str:
        """Render the page around its data: `data` are scripts within it, `parts` names of scripts beside it."""
        version, manifest = self.version, self.version.manifest
        clusters = clusters_of(self.folder)
        members = {member["id"] for found in clusters.values() for each in found["shown"] for member in each["members"]}
        rejected = images_of(self.folder, members - first.keys())
        first = first | {sample_id: _place(sample_id, 0, image, THUMBNAIL_BYTES, place) for sample_id, image in rejected}
        settings = {"digest": manifest["digest"], "version": version.name, "images": self.shown, "reasons": REASONS}
        script = (files("pipeline.report") / "report.js").read_text(encoding="utf-8")
        scripts = [f"const report = {_literal(settings)};\n{script}", *data]
        return render_page(
            "pipeline.report",
            "report.html.j2",
            manifest=manifest,
            images=version.images,
            shown=self.shown,
            funnel=funnel_of(manifest),
            distributions=distributions_of(self.folder),
            clusters=clusters,
            cost=read_json(cost) if (cost := Folder(self.folder).cost).exists() else None,
            training=_training(self.checkpoint) if self.checkpoint else None,
            first=first,
            scripts=scripts,
            script_hashes=[script_hash(script) for script in scripts],
            parts=parts,
        )


def _pictured(row: dict[str, Any], max_bytes: int, place: Place) -> dict[str, Any]:
    """Return a row whose images are where the page finds them, instead of bytes."""
    return row | {"images": [_place(row["id"], n, image, max_bytes, place) for n, image in enumerate(row["images"])] or [""]}


def _within(_sample_id: str, _page: int, small: bytes) -> str:
    return data_uri(small)


def _place(sample_id: str, page: int, image: bytes, max_bytes: int, place: Place) -> str:
    try:
        return place(sample_id, page, thumbnail(image, max_bytes))
    except ImageError:
        return ""  # a version from elsewhere may hold anything; the page says that there is no picture


def _call(kind: str, rows: list[dict[str, Any]]) -> str:
    return f'add("{kind}", {_literal(rows)});\n'


def _literal(value: Any) -> str:
    """Return a value as JavaScript, in ASCII and without anything that could end a script."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _training(checkpoint: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (checkpoint / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    return {
        "metrics": metrics,
        "curves": [
            chart("Loss", {"training": points(lines, "loss"), "validation": points(lines, "validation_loss")}),
            chart(
                "CIDEr-D on the validation split",
                {"own image": points(lines, "validation_cider_d"), "shuffled": points(lines, "validation_shuffled_cider_d")},
            ),
        ],
    }
