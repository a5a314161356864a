"""Write a report: one HTML file for a small version, a folder for a large one. Both open from the disk, without a server.

The page makes no network requests. Model text is untrusted: the template escapes it, and the script never parses it as HTML.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.reviews import REASONS
from pipeline.dataset.statistics import wilson_interval
from pipeline.dataset.version import Version
from pipeline.errors import ConfigError, ImageError
from pipeline.report.figures import clusters_of, distributions_of, funnel_of, images_of, steps_match
from pipeline.report.html import chart, data_uri, points, render_page, script_hash, thumbnail
from pipeline.report.rows import read_rejected, read_rows
from pipeline.storage.files import MAX_JSON_BYTES, read_json, write_text
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.tables import SPLITS
from pipeline.text.reasons import SCORES_IN_WORDS, in_words

ONE_FILE_ROWS = 500
ONE_FILE_THUMBNAIL_BYTES, THUMBNAIL_BYTES = 16_384, 4_096
PART_ROWS = 1000  # in one script of a report folder
MAX_PICTURES = 50  # of rejected rows of one reason whose image is not in the report
AT_ONCE = 64  # images that are scaled down at once
PROVENANCE = '<meta name="generator" content="synth report">'  # only a page with this is ever replaced
_PART = re.compile(r"(images|rejected)-\d{3}-[0-9a-f]{12}\.js")
_THUMBNAIL = re.compile(r"[0-9a-f]{32}\.webp")

Place = Callable[[str, int, bytes], str]  # (sample id, page, thumbnail) -> its URL in the report


def write_report(version: Version, folder: Path, checkpoint: Path | None = None, max_rows: int = 10_000) -> Path:
    """Write `report.html` into the dataset folder, or `report/` if the version is large; return the path of the page.

    Of a version with more than `max_rows` images, those with the lowest ids are shown: digests, so a random sample. Raise
    ConfigError if the checkpoint holds no training, or another file lies at the path of the report; StoreError if the version
    or a step file is damaged.
    """
    training = _training(checkpoint) if checkpoint else None
    report = _Report(version, folder, training, min(version.num_rows, max_rows))
    one_file, home = folder / "report.html", folder / "report"
    for page in (one_file, home / "index.html"):
        if page.exists() and not _is_ours(page):
            raise ConfigError(f"{page} is not a report of synth", hint="move it away: a report is written there")
    if report.shown <= ONE_FILE_ROWS:
        report.write_file(one_file)
        _remove(home, _own_files(home))
        return one_file
    report.write_folder(home)
    one_file.unlink(missing_ok=True)
    return home / "index.html"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint under a dataset folder that was scored last, if any."""
    metrics_files = sorted((folder / "checkpoints").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    return metrics_files[-1].parent if metrics_files else None


@dataclass(frozen=True)
class _Report:
    version: Version
    folder: Path
    training: dict[str, Any] | None
    shown: int  # images

    def write_file(self, path: Path) -> None:
        rows = [row for batch in self._rows(ONE_FILE_THUMBNAIL_BYTES, _within) for row in batch]
        data = [_call("images", rows), _call("rejected", self._rejected)]
        write_text(path, self._page(_within, {row["id"]: row["images"][0] for row in rows}, data, parts=[]))

    def write_folder(self, home: Path) -> None:
        thumbnails: set[Path] = set()
        parts: list[str] = []
        first_images: dict[str, str] = {}

        def beside(sample_id: str, page: int, small: bytes) -> str:
            # A version made elsewhere may have any sample id, even a path.
            name = hashlib.sha256(f"{sample_id} {page}".encode(errors="surrogatepass")).hexdigest()[:32]
            path = home / "thumbnails" / name[:2] / f"{name}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(small)
            thumbnails.add(path)
            return path.relative_to(home).as_posix()

        def write_part(kind: str, rows: list[dict[str, Any]]) -> None:
            script = _call(kind, rows)
            # Named by a digest: the existing page works until the new one replaces it.
            parts.append(f"{kind}-{len(parts):03d}-{hashlib.sha256(script.encode()).hexdigest()[:12]}.js")
            write_text(home / parts[-1], script)

        pending: list[dict[str, Any]] = []
        for rows in self._rows(THUMBNAIL_BYTES, beside):
            first_images |= {row["id"]: row["images"][0] for row in rows}
            pending += rows
            if len(pending) >= PART_ROWS:
                write_part("images", pending)
                pending = []
        for kind, rest in (("images", pending), ("rejected", self._rejected)):
            if rest:
                write_part(kind, rest)
        write_text(home / "index.html", self._page(beside, first_images, [], parts))
        _remove(home, _own_files(home) - thumbnails - {home / name for name in [*parts, "index.html"]})

    @property
    def of_steps(self) -> bool:
        """Whether the folder's step files are those that this version was made from."""
        return steps_match(self.folder, self.version.manifest)

    @cached_property
    def _rejected(self) -> list[dict[str, str]]:
        return list(read_rejected(self.folder)) if self.of_steps else []

    def _pictured_rejects(self) -> set[str]:
        """Return the samples of the first rejected rows of each reason, whose pictures are shown."""
        counts: Counter[tuple[str, str]] = Counter()
        ids = set()
        for row in self._rejected:
            counts[row["step"], row["reason"]] += 1
            if row["id"] and counts[row["step"], row["reason"]] <= MAX_PICTURES:
                ids.add(row["id"])
        return ids

    def _rows(self, max_bytes: int, place: Place) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of rows for the page, with the URLs of thumbnails instead of image bytes."""
        chosen_ids = None
        if self.shown < self.version.num_rows:
            batches = (batch["sample_id"].to_pylist() for _, batch in self.version.batches(["sample_id"]))
            chosen_ids = set(nsmallest(self.shown, chain.from_iterable(batches)))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for rows in read_rows(self.version, tuple(reversed(SPLITS)), chosen_ids, AT_ONCE):  # held-out splits first
                yield list(pool.map(lambda row: _pictured(row, max_bytes, place), rows))

    def _page(self, place: Place, first: dict[str, str], data: list[str], parts: list[str]) -> str:
        """Render the page around its data: `data` are scripts within it, `parts` names of scripts beside it."""
        manifest, of_steps = self.version.manifest, self.of_steps
        clusters = clusters_of(self.folder) if of_steps else {}
        members = {member["id"] for kind in clusters.values() for cluster in kind["shown"] for member in cluster["members"]}
        of_texts = self._pictured_rejects()
        others = images_of(self.folder, (members | of_texts) - first.keys())
        more = {sample_id: _place(sample_id, 0, image, THUMBNAIL_BYTES, place) for sample_id, image in others}
        first = first | more
        settings = {
            "digest": manifest["digest"],
            "version": self.version.name,
            "images": self.shown,
            "reasons": REASONS,
            "pictures": {sample_id: more[sample_id] for sample_id in sorted(of_texts & more.keys())},
        }
        script = (files("pipeline.report") / "report.js").read_text(encoding="utf-8")
        scripts = [f"const report = {_literal(settings)};\n{script}", *data]
        return render_page(
            "pipeline.report",
            "report.html.j2",
            manifest=manifest,
            images=self.version.num_rows,
            shown=self.shown,
            funnel=funnel_of(manifest),
            in_words=in_words,
            scores=[name for name in manifest.get("scores", []) if name in SCORES_IN_WORDS],  # texts are listed there, too
            scores_in_words=SCORES_IN_WORDS,
            wilson_interval=wilson_interval,
            of_steps=of_steps,
            distributions=distributions_of(self.folder) if of_steps else [],
            clusters=clusters,
            cost=DatasetDir(self.folder).read_cost() or None,
            training=self.training,
            made_by=PROVENANCE,
            first=first,
            scripts=scripts,
            script_hashes=[script_hash(script) for script in scripts],
            parts=parts,
        )


def _pictured(row: dict[str, Any], max_bytes: int, place: Place) -> dict[str, Any]:
    """Return a row with the URLs of thumbnails instead of image bytes."""
    return row | {"images": [_place(row["id"], n, image, max_bytes, place) for n, image in enumerate(row["images"])] or [""]}


def _within(_sample_id: str, _page: int, small: bytes) -> str:
    return data_uri(small)


def _place(sample_id: str, page: int, image: bytes, max_bytes: int, place: Place) -> str:
    try:
        return place(sample_id, page, thumbnail(image, max_bytes))
    except ImageError:
        return ""  # a version made elsewhere may hold broken images; the page says that there is no picture


def _call(kind: str, rows: list[dict[str, Any]]) -> str:
    return f'add("{kind}", {_literal(rows)});\n'


def _literal(value: Any) -> str:
    """Return a value as a JavaScript literal, in ASCII and without `<`, which could end the script."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _is_ours(page: Path) -> bool:
    with page.open(encoding="utf-8", errors="replace") as file:
        return PROVENANCE in file.read(4096)


def _own_files(home: Path) -> set[Path]:
    """Return the files in a folder that earlier reports wrote."""
    paths = {path for path in home.glob("*.js") if _PART.fullmatch(path.name)}
    paths |= {path for path in home.glob("thumbnails/??/*.webp") if _THUMBNAIL.fullmatch(path.name)}
    return paths | {page for page in (home / "index.html",) if page.exists()}


def _remove(home: Path, paths: set[Path]) -> None:
    """Remove files, and the folders that this leaves empty."""
    for path in paths:
        path.unlink()
    for folder in sorted({home, *(home.glob("thumbnails/**/") if paths else ())}, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _training(checkpoint: Path) -> dict[str, Any]:
    try:
        log = read_regular(checkpoint / "log.jsonl", checkpoint, max_bytes=MAX_JSON_BYTES).decode("utf-8")
        lines = [json.loads(line) for line in log.splitlines()]
        metrics = read_json(checkpoint / "metrics.json")
        curves = _curves(lines)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UnsafeFileError) as error:
        message = f"{checkpoint} holds no training that was scored: {error}"
        raise ConfigError(message, hint="name a folder that `synth train` has finished: --checkpoint DIR") from None
    return {"metrics": metrics, "curves": curves}


def _curves(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of_texts = [line for line in lines if line.get("stage") != "scst"]  # whose loss weighs drawn texts, and may be negative
    rewards = points(lines, "reward")
    return [
        chart("Loss", {"training": points(of_texts, "loss"), "validation": points(lines, "validation_loss")}),
        chart(
            "CIDEr-D on the validation split",
            {"own image": points(lines, "validation_cider_d"), "shuffled": points(lines, "validation_shuffled_cider_d")},
        ),
        *([chart("Reward of drawn captions", {"training": rewards})] if rewards else []),
    ]
