"""Measure how much a captioner loses by learning from a model's captions instead of true ones, on drawn scenes.

    synth generate --source scenes --limit 2000
    python benchmarks/synthetic_or_facts.py data/scenes [--encoder tiny-clip] [--steps 600] [--seeds 0]

Trains twice with the same images, splits, styles, steps and seeds: on the captions of the version, and on captions made from
the facts. Both captioners are scored against the facts of the held-out scenes.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dataset.builder import Rows, with_split
from pipeline.dataset.directory import open_dataset
from pipeline.dataset.version import Version
from pipeline.scenes.scene import scenes_of
from pipeline.scenes.text import caption
from pipeline.tables import ROW, SPLITS
from tests.scene_data import publish_tables
from trainer.config import resolve
from trainer.train import train

SCORES = ("bleu_4", "rouge_l", "cider_d")


def from_facts(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose captions are made from the facts."""
    (scene,) = scenes_of(row["source"], row["source_row"])
    return row | {"captions": [one | {"text": caption(scene, one["style"])} for one in row["captions"]]}


def with_rows(version: Version, change: Callable[[dict[str, Any]], dict[str, Any]], folder: Path) -> Version:
    """Write the same version with other rows, each made of one that it has."""
    rows = Rows()

    def tables() -> Iterator[pa.Table]:
        for split in SPLITS:
            batch = [change(row) | {"split": split} for row in version.read(split).to_pylist()]
            table = pa.Table.from_pylist(batch, schema=with_split(ROW))
            rows.add(table)
            yield table

    names = ("source", "model", "prompts", "schemas", "config", "funnel", "measured")
    provenance = {name: version.manifest[name] for name in names}
    return publish_tables(folder, tables(), rows, funnel=provenance["funnel"], provenance=provenance)[0]


def main() -> None:
    """Train and score both captioners, and print a table."""
    parser = argparse.ArgumentParser(description="A captioner from a model's captions, beside one from the facts.")
    parser.add_argument("data", type=Path, help="A dataset of scenes.")
    parser.add_argument("--encoder", default="tiny-clip")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    version = open_dataset(arguments.data)
    with tempfile.TemporaryDirectory() as name:
        versions = {"synthetic": version, "facts": with_rows(version, from_facts, Path(name) / "facts")}
        print(f"{version.manifest['rows']}, {arguments.encoder}, decoder from scratch, {arguments.steps} steps")
        for seed in arguments.seeds:
            cider_d = {}
            for kind, training_data in versions.items():
                config = resolve(encoder=arguments.encoder, steps=arguments.steps, seed=seed, questions=False)
                metrics = train(training_data, config, Path(name) / f"{kind}-{seed}")
                cider_d[kind] = metrics["scores"]["cider_d"]
                shown = "   ".join(
                    f"{score} {metrics['scores'][score]:.3f} (shuffled {metrics['shuffled_scores'][score]:.3f})"
                    for score in SCORES
                )
                print(f"  seed {seed}, {kind:<10} {shown}", flush=True)
            print(f"  seed {seed}: synthetic / facts, CIDEr-D: {cider_d['synthetic'] / cider_d['facts']:.3f}")


if __name__ == "__main__":
    main()
