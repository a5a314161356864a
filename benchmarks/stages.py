"""What each stage costs an annotation, and how that grows.

    PYTHONPATH=. python benchmarks/stages.py [--images 10000 20000 40000]

Scenes with captions in two styles and three questions each, true by construction: CPU microseconds an annotation of every stage
from validate to review, and of writing the version, in one process. Nothing is asked of a model.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Config
from pipeline.fingerprint import digest
from pipeline.scenes.score import scene_of
from pipeline.scenes.text import STYLES, ask_number, ask_other, ask_yes_no, caption
from pipeline.stages import STAGES
from pipeline.store import Folder
from pipeline.tables import ANNOTATION, CHECK, LEDGER, MARK
from pipeline.version import Rows, build_rows, draft_version
from tests.scene_data import MADE_BY, sample_table, scene_samples


def annotations(samples: list[Any]) -> pa.Table:
    """Return rows of tables.ANNOTATION as generate would leave them."""
    rows = []
    for sample in samples:
        scene = scene_of(sample.facts)
        texts: list[dict[str, Any]] = [{"task": "caption", "style": style, "text": caption(scene, style)} for style in STYLES]
        pairs = [ask(scene, random.Random(sample.id)) for ask in (ask_yes_no, ask_number, ask_other)]
        texts += [{"task": "qa", "style": ""} | pair.model_dump() for pair in pairs]
        for position, said in enumerate(texts):
            ids = {"annotation_id": digest([sample.id, position]), "sample_id": sample.id, "request_id": digest([sample.id])}
            rows.append(
                {**ids, "position": position, "prompt_id": "p", "pages": 1, "evidence_pages": [], "expression": "", **said}
            )
    return pa.Table.from_pylist(rows, schema=ANNOTATION)


def joined(name: str, table: pa.Table) -> pa.Table:
    """Join what `run` joins before a stage, where nothing was found."""
    nothing: dict[str, list[tuple[str, pa.DataType]]] = {
        "filter": [("repeats", pa.string())],
        "verify": [("checks", pa.list_(CHECK)), ("alignment", pa.float64())],
        "dedupe": [("image_reason", pa.string()), ("looks_like", pa.string())],
        "review": [("mark", MARK)],
    }
    for column, kind in nothing.get(name, []):
        empty = pa.array([[]] * len(table), kind) if column == "checks" else pa.nulls(len(table), kind)
        table = table.append_column(column, empty)
    return table.append_column("image_group", table["sample_id"]) if name == "dedupe" else table


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what some work gives, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


def measure(images: int) -> dict[str, float]:
    """Return CPU microseconds an annotation by stage."""
    samples = scene_samples(images)
    table, config, found = annotations(samples), Config(source="scenes"), {}
    count = len(table)
    for name, stage in STAGES.items():
        before = joined(name, table)
        marked, seconds = timed(lambda stage=stage, before=before: stage(before, config))  # type: ignore[misc]
        found[name] = 1e6 * seconds / count
        table = marked.filter(pc.is_null(marked["reason"])).drop_columns(["reason"])
    batches = sample_table(samples).to_batches(max_chunksize=64)

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder, draft_version(Folder(Path(folder))) as draft:
            rows = Rows()
            for each in build_rows(table, batches, "scenes", rows):
                draft.add(each)
            draft.publish(rows, MADE_BY, LEDGER.empty_table(), [])

    found["version"] = 1e6 * timed(write)[1] / count
    return found


def main() -> None:
    """Print a table: stages down, sizes across."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 20_000, 40_000])
    sizes = {images: measure(images) for images in parser.parse_args().images}
    print("stage      " + "".join(f"{images:>12,}" for images in sizes) + "  images; CPU us an annotation, five an image")
    for name in next(iter(sizes.values())):
        print(f"{name:<11}" + "".join(f"{found[name]:>12.1f}" for found in sizes.values()))
    print("all        " + "".join(f"{sum(found.values()):>12.1f}" for found in sizes.values()))


if __name__ == "__main__":
    main()
