"""Small datasets of scenes with true captions."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from examples.scenes.facts import AnswerScore, CaptionScore, DeckScore, scenes_of
from pipeline.config import SCENES, Config
from pipeline.config.sections import SplitConfig
from pipeline.dataset.builder import DIGESTS, build_rows
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.images import ImageStore
from pipeline.dataset.publishing import RowWriter, publish_version
from pipeline.dataset.version import Version, read_version
from pipeline.hub.package import build_package
from pipeline.inference.requests import build_requests, with_images
from pipeline.scenes.scene import Scene, sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.sources.scenes import draw_sample
from pipeline.steps.split import split_of
from pipeline.storage.files import scratch_folder, write_table
from pipeline.tables import LISTED_SAMPLE, NO_EXTRAS, NUM_PAGES, REJECTIONS, SAMPLE, SAMPLE_IMAGES, Extras
from pipeline.types import Request, Sample, SampleBatch
from tests.plans import request_plan

PROVENANCE: dict[str, Any] = {
    "source": {"name": "scenes", "revision": "test"},
    "model": {"name": "facts", "revision": "test"},
    "prompts": {"caption/v1@test": "Task: caption"},
    "schemas": {},
    "config": {"tasks": ["caption"]},
    "funnel": [],
    "measured": {},
}


def scene_samples(count: int, seed: int = 0) -> list[Sample]:
    return [draw_sample(seed, index) for index in range(count)]


def batch_of(samples: Iterable[Sample]) -> SampleBatch:
    return SampleBatch.of((sample.id, sample.images) for sample in samples)


def requests_to_send(batch: SampleBatch, config: Config, revision: str) -> list[Request]:
    """Return all requests about some samples, with their images."""
    plan = request_plan(config, revision)
    return with_images([request for name in batch.ids for request in build_requests(name, plan)], batch)


def sample_table(samples: list[Sample]) -> pa.Table:
    rows = [{"sample_id": s.id, **asdict(s)} for s in samples]
    return pa.Table.from_pylist(rows, schema=SAMPLE)


def listed(samples: pa.RecordBatch) -> pa.RecordBatch:
    """Return samples (tables.SAMPLE) as the read step lists them."""
    table = pa.Table.from_batches([samples])
    counted = table.append_column(NUM_PAGES, pc.list_value_length(table["images"]))
    return counted.select(LISTED_SAMPLE.names).cast(LISTED_SAMPLE).combine_chunks().to_batches()[0]


def write_samples(dataset: DatasetDir, samples: list[Sample]) -> None:
    """Write samples as the read step does: images to the store, and a list of samples."""
    table = sample_table(samples)
    ImageStore(dataset.path).add([table.select(SAMPLE_IMAGES.names)])
    rows = [pa.Table.from_batches([listed(batch)]) for batch in table.to_batches()]
    write_table(dataset.step_file("read"), rows, LISTED_SAMPLE)


def pulled(version: Version, folder: Path, **options: Any) -> Version:
    """Write a version to a folder as `pull` caches it, with images in its files."""
    folder.mkdir(parents=True)
    with build_package(version, "me/x", **options) as package:
        for name, content in package.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        return read_version(folder)


def published(version: Version, **options: Any) -> dict[str, Any]:
    """Return the manifest of a version after its push."""
    with build_package(version, "me/x", **options) as package:
        return package.manifest


def true_captions(samples: list[Sample]) -> pa.Table:
    """Return annotations with the columns of the split step."""
    rows = []
    for sample in samples:
        (scene, *_) = scenes_of(SCENES, sample.source_row) or [sample_scene(Random(sample.id))]
        fields = {"sample_id": sample.id, "task": "caption", "prompt_id": "caption/v1@test"}
        fields["split"] = split_of(sample.id, SplitConfig(), 0)
        rows += [fields | {"style": style, "text": caption(scene, style)} for style in STYLES]
    return pa.Table.from_pylist(rows)


def scored_captions(samples: list[Sample], coverage: float = 0.5) -> pa.Table:
    """Return `true_captions` with scores: agreement, coverage and, for every second caption, a rating."""
    captions = true_captions(samples)
    ratings = [n % 5 + 1 if n % 2 else None for n in range(captions.num_rows)]
    captions = captions.append_column("agreement", pa.array([1.0] * captions.num_rows))
    captions = captions.append_column("coverage", pa.array([coverage] * captions.num_rows))
    return captions.append_column("form", pa.array(ratings, pa.int32()))


SCORED = ("precision", "coverage", "form")


def make_version(
    folder: Path, samples: list[Sample], annotations: pa.Table | None = None, **options: Any
) -> tuple[Version, bool]:
    """Write samples as the next version of a dataset."""
    annotations = true_captions(samples) if annotations is None else annotations
    order = {sample.id: position for position, sample in enumerate(samples)}
    positions = pa.array([order[name] for name in annotations["sample_id"].to_pylist()], pa.int64())
    annotations = annotations.take(pc.array_sort_indices(positions)) if len(positions) else annotations
    return publish_rows(folder, [annotations], sample_table(samples).to_batches(), **options)


def publish_rows(
    folder: Path,
    annotations: Iterable[pa.Table],
    batches: Iterable[pa.RecordBatch],
    source: str = "scenes",
    extras: Extras = NO_EXTRAS,
    *,
    decks: bool = False,
    **options: Any,
) -> tuple[Version, bool]:
    """Store the images of samples (tables.SAMPLE), and write the next version of a dataset."""
    store, batches = ImageStore(folder), list(batches)
    store.add(pa.Table.from_batches([batch]).select(SAMPLE_IMAGES.names) for batch in batches)
    tables = build_rows(annotations, map(listed, batches), source, extras, decks=decks)
    return publish_tables(folder, tables, extras, **options)


def publish_tables(
    folder: Path,
    tables: Iterable[pa.Table],
    extras: Extras = NO_EXTRAS,
    funnel: Sequence[dict[str, Any]] = (),
    provenance: dict[str, Any] = PROVENANCE,
) -> tuple[Version, bool]:
    """Write tables as the next version, and store their images."""
    store = ImageStore(folder)
    with scratch_folder(folder / "versions") as draft:
        writer = RowWriter(draft / "rows", extras)
        writer.path.mkdir()
        for table in tables:
            is_stored = pa.types.is_boolean(table.schema.field("image").type)
            writer.add(table if is_stored else _store(store, table))
        writer.close()
        digests = pa.concat_tables([DIGESTS.empty_table(), *writer.digests]).sort_by("sample_id")
        rejections = [REJECTIONS.empty_table()]
        provenance = provenance | {"funnel": list(funnel)}
        return publish_version(DatasetDir(folder), draft, [writer], digests, provenance, rejections)


def _store(store: ImageStore, rows: pa.Table) -> pa.Table:
    """Store the images of rows (tables.ROW), and return the rows as `build_rows` yields them."""
    pixels = rows.select(["sample_id", "image", "pages"]).to_pylist()
    images = [[page["bytes"] for page in row["pages"] or [row["image"]]] for row in pixels]
    store.add([pa.table([rows["sample_id"], images], schema=SAMPLE_IMAGES)])
    for name in ("image", "pages"):
        held = pa.array([row[name] is not None or None for row in pixels], pa.bool_())
        rows = rows.set_column(rows.column_names.index(name), name, held)
    return rows


def scenes_by_id(samples: Iterable[Sample], source: str = SCENES) -> dict[str, tuple[Scene, ...]]:
    return {sample.id: scenes_of(source, sample.source_row) for sample in samples}


def score_annotations(
    annotations: Iterable[dict[str, Any]], scenes: dict[str, tuple[Scene, ...]]
) -> tuple[dict[str, CaptionScore], dict[str, AnswerScore]]:
    """Score rows of tables.ANNOTATION: captions by style and answers by type."""
    captions: dict[str, CaptionScore] = {}
    answers: dict[str, AnswerScore] = {}
    for row in annotations:
        (scene,) = scenes[row["sample_id"]]
        if row["text"] is not None:
            captions.setdefault(row["style"], CaptionScore()).add(row["text"] or "", scene, row["style"])
        else:
            score = answers.setdefault(row["answer_type"] or "", AnswerScore())
            score.add(row["question"] or "", row["answer"] or "", scene)
    return captions, answers


def score_decks(
    annotations: Iterable[dict[str, Any]], decks: dict[str, tuple[Scene, ...]]
) -> dict[str, DeckScore]:
    """Score rows of tables.ANNOTATION of the task `deck_qa` by type."""
    scores: dict[str, DeckScore] = {}
    for row in annotations:
        scores.setdefault(row["answer_type"] or "", DeckScore()).add(row, decks[row["sample_id"]])
    return scores
