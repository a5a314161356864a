"""Write a report: one HTML file for a small version, a folder for a large one. Both open without a server.

The page makes no network requests. Model text is untrusted: the template escapes it, and the script never
parses it as HTML.
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
PART_ROWS = 1000  # per script of a report folder
BATCH_ROWS = 64
MAX_REJECTED_PICTURES = 50  # per reason
PROVENANCE = '<meta name="generator" content="synth report">'  # only pages with this text are replaced
_PART = re.compile(r"(images|rejected)-\d{3}-[0-9a-f]{12}\.js")
_THUMBNAIL = re.compile(r"[0-9a-f]{32}\.webp")

Place = Callable[[str, int, bytes], str]  # (sample id, page, thumbnail) -> URL in the report


def write_report(
    version: Version, folder: Path, checkpoint: Path | None = None, max_rows: int = 10_000
) -> Path:
    """Write `report.html` into the dataset folder, or `report/` for a large version; return its page.

    Of more than `max_rows` images, those with the lowest ids are shown: ids are digests, so this is a random
    sample. Raise ConfigError if the checkpoint has no finished training, or another file is at the path of
    the report. Raise StoreError if the version or a step file is damaged.
    """
    training = _read_training(checkpoint) if checkpoint else None
    report = _Report(version, folder, training, min(version.num_rows, max_rows))
    one_file, report_dir = folder / "report.html", folder / "report"
    for page in (one_file, report_dir / "index.html"):
        if page.exists() and not _is_report(page):
            raise ConfigError(f"{page} is not a report of synth", hint="move it: the report would replace it")
    if report.num_shown <= ONE_FILE_ROWS:
        report.write_file(one_file)
        _remove(report_dir, _report_files(report_dir))
        return one_file
    report.write_folder(report_dir)
    one_file.unlink(missing_ok=True)
    return report_dir / "index.html"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of a dataset folder that was scored last, if any."""
    metrics_files = (folder / "checkpoints").glob("*/metrics.json")
    newest = max(metrics_files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.parent if newest else None


@dataclass(frozen=True)
class _Report:
    version: Version
    folder: Path
    training: dict[str, Any] | None
    num_shown: int  # images

    def write_file(self, path: Path) -> None:
        rows = [row for batch in self._read_rows(ONE_FILE_THUMBNAIL_BYTES, _inline) for row in batch]
        data = [_call("images", rows), _call("rejected", self._rejected)]
        write_text(path, self._render(_inline, {row["id"]: row["images"][0] for row in rows}, data, parts=[]))

    def write_folder(self, report_dir: Path) -> None:
        thumbnails: set[Path] = set()
        parts: list[str] = []
        first_images: dict[str, str] = {}

        def write_thumbnail(sample_id: str, page: int, small: bytes) -> str:
            # The sample id of an untrusted version may be a path.
            name = hashlib.sha256(f"{sample_id} {page}".encode(errors="surrogatepass")).hexdigest()[:32]
            path = report_dir / "thumbnails" / name[:2] / f"{name}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(small)
            thumbnails.add(path)
            return path.relative_to(report_dir).as_posix()

        def write_part(kind: str, rows: list[dict[str, Any]]) -> None:
            script = _call(kind, rows)
            # The digest in the name keeps the parts of the existing page until the new page replaces it.
            parts.append(f"{kind}-{len(parts):03d}-{hashlib.sha256(script.encode()).hexdigest()[:12]}.js")
            write_text(report_dir / parts[-1], script)

        pending: list[dict[str, Any]] = []
        for rows in self._read_rows(THUMBNAIL_BYTES, write_thumbnail):
            first_images |= {row["id"]: row["images"][0] for row in rows}
            pending += rows
            if len(pending) >= PART_ROWS:
                write_part("images", pending)
                pending = []
        for kind, rest in (("images", pending), ("rejected", self._rejected)):
            if rest:
                write_part(kind, rest)
        write_text(report_dir / "index.html", self._render(write_thumbnail, first_images, [], parts))
        current_files = thumbnails | {report_dir / name for name in [*parts, "index.html"]}
        _remove(report_dir, _report_files(report_dir) - current_files)

    @cached_property
    def has_steps(self) -> bool:
        """Whether the step files of the folder are those of this version."""
        return steps_match(self.folder, self.version.manifest)

    @cached_property
    def _rejected(self) -> list[dict[str, str]]:
        return list(read_rejected(self.folder)) if self.has_steps else []

    def _rejected_ids(self) -> set[str]:
        """Return the samples of the first rejected rows of each reason."""
        counts: Counter[tuple[str, str]] = Counter()
        ids = set()
        for row in self._rejected:
            counts[row["step"], row["reason"]] += 1
            if row["id"] and counts[row["step"], row["reason"]] <= MAX_REJECTED_PICTURES:
                ids.add(row["id"])
        return ids

    def _read_rows(self, max_bytes: int, place: Place) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of rows, held-out splits first, with URLs of thumbnails instead of image bytes."""
        chosen_ids = None
        if self.num_shown < self.version.num_rows:
            batches = (batch["sample_id"].to_pylist() for _, batch in self.version.batches(["sample_id"]))
            chosen_ids = set(nsmallest(self.num_shown, chain.from_iterable(batches)))

        def with_thumbnails(row: dict[str, Any]) -> dict[str, Any]:
            urls = [_place(row["id"], n, image, max_bytes, place) for n, image in enumerate(row["images"])]
            return row | {"images": urls or [""]}

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for rows in read_rows(self.version, tuple(reversed(SPLITS)), chosen_ids, BATCH_ROWS):
                yield list(pool.map(with_thumbnails, rows))

    def _render(self, place: Place, first_images: dict[str, str], data: list[str], parts: list[str]) -> str:
        """Render the page; `data` are scripts within it, `parts` names of scripts next to it."""
        manifest = self.version.manifest
        clusters = clusters_of(self.folder) if self.has_steps else {}
        shown_clusters = chain.from_iterable(kind["shown"] for kind in clusters.values())
        member_ids = {member["id"] for cluster in shown_clusters for member in cluster["members"]}
        rejected_ids = self._rejected_ids()
        others = images_of(self.folder, (member_ids | rejected_ids) - first_images.keys())
        more = {sample_id: _place(sample_id, 0, image, THUMBNAIL_BYTES, place) for sample_id, image in others}
        settings = {
            "digest": manifest["digest"],
            "version": self.version.name,
            "images": self.num_shown,
            "reasons": REASONS,
            "pictures": {sample_id: more[sample_id] for sample_id in sorted(rejected_ids & more.keys())},
        }
        script = (files("pipeline.report") / "report.js").read_text(encoding="utf-8")
        scripts = [f"const report = {_literal(settings)};\n{script}", *data]
        return render_page(
            "pipeline.report",
            "report.html.j2",
            manifest=manifest,
            images=self.version.num_rows,
            shown=self.num_shown,
            funnel=funnel_of(manifest),
            in_words=in_words,
            scores=[name for name in manifest.get("scores", []) if name in SCORES_IN_WORDS],
            scores_in_words=SCORES_IN_WORDS,
            wilson_interval=wilson_interval,
            has_steps=self.has_steps,
            distributions=distributions_of(self.folder) if self.has_steps else [],
            clusters=clusters,
            cost=DatasetDir(self.folder).read_cost() or None,
            training=self.training,
            provenance=PROVENANCE,
            first_images=first_images | more,
            scripts=scripts,
            script_hashes=[script_hash(script) for script in scripts],
            parts=parts,
        )


def _inline(_sample_id: str, _page: int, small: bytes) -> str:
    return data_uri(small)


def _place(sample_id: str, page: int, image: bytes, max_bytes: int, place: Place) -> str:
    try:
        return place(sample_id, page, thumbnail(image, max_bytes))
    except ImageError:
        return ""  # an untrusted version may contain broken images, which the page shows as "no picture"


def _call(kind: str, rows: list[dict[str, Any]]) -> str:
    return f'add("{kind}", {_literal(rows)});\n'


def _literal(value: Any) -> str:
    """Return a value as a JavaScript literal, in ASCII and without `<`, which could end the script."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _is_report(page: Path) -> bool:
    with page.open(encoding="utf-8", errors="replace") as file:
        return PROVENANCE in file.read(4096)


def _report_files(report_dir: Path) -> set[Path]:
    """Return the files of a report folder that synth wrote."""
    paths = {path for path in report_dir.glob("*.js") if _PART.fullmatch(path.name)}
    paths |= {path for path in report_dir.glob("thumbnails/??/*.webp") if _THUMBNAIL.fullmatch(path.name)}
    return paths | set(report_dir.glob("index.html"))


def _remove(report_dir: Path, paths: set[Path]) -> None:
    """Remove files, and the folders that become empty."""
    for path in paths:
        path.unlink()
    for folder in sorted({report_dir, *(report_dir.glob("thumbnails/**/") if paths else ())}, reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _read_training(checkpoint: Path) -> dict[str, Any]:
    try:
        log = read_regular(checkpoint / "log.jsonl", checkpoint, max_bytes=MAX_JSON_BYTES).decode("utf-8")
        curves = _curves([json.loads(line) for line in log.splitlines()])
        return {"metrics": read_json(checkpoint / "metrics.json"), "curves": curves}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UnsafeFileError) as error:
        message = f"{checkpoint} has no finished training: {error}"
        hint = "name a folder that `synth train` has finished: --checkpoint DIR"
        raise ConfigError(message, hint=hint) from None


def _curves(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The loss of self-critical training weighs drawn captions, and may be negative.
    supervised = [line for line in lines if line.get("stage") != "scst"]
    loss = {"training": points(supervised, "loss"), "validation": points(lines, "validation_loss")}
    own, shuffled = points(lines, "validation_cider_d"), points(lines, "validation_shuffled_cider_d")
    charts = [
        chart("Loss", loss),
        chart("CIDEr-D on the validation split", {"own image": own, "shuffled": shuffled}),
    ]
    rewards = points(lines, "reward")
    return [*charts, chart("Reward of drawn captions", {"training": rewards})] if rewards else charts
