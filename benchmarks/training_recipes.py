"""Compare ways to train a captioner on drawn scenes: in two stages or in one, and with two kinds of decoders.

    PYTHONPATH=.:benchmarks python benchmarks/training_recipes.py OUT stages --seeds 0 1 2 3 4
    PYTHONPATH=.:benchmarks python benchmarks/training_recipes.py OUT decoders --seeds 0 1 2

`stages` compares four recipes ("arms") of 450 steps. A simulated teacher captions 1,200 scenes with 20 %
false phrases: purple objects are called "blue", and some shapes are random. 100 of the scenes also have a
true caption with another wording. The arms train on the teacher's captions, on the true captions, on both
together, or on the teacher's captions for 300 steps and then on the true captions.

`decoders` compares a decoder with an image prefix and one with cross-attention. Both have dropout, and learn
true captions for an equal time.

Prints scores on 250 other scenes: CIDEr-D against true captions, and the share of true phrases (size, color,
shape), with the intervals of compare_captioners.py. Finished training runs are skipped.
"""

import argparse
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from compare_captioners import Scores, print_comparison, read_scores

from examples.scenes.facts import CaptionScore, scenes_of
from pipeline.dataset.builder import with_split
from pipeline.dataset.version import Version, read_version
from pipeline.scenes.scene import COLORS, SHAPES, Scene, Thing
from pipeline.scenes.text import caption
from pipeline.tables import ROW, SPLITS
from tests.scene_data import make_version, publish_tables, scene_samples
from trainer.config import resolve
from trainer.training import train_captioner

TEST, VALIDATION, TAUGHT, TRUE, DECODER_SCENES = 250, 50, 1200, 100, (200, 600, 1800)
# This share of phrases is false, including purple objects called "blue".
FALSE = 0.2
FALSE_SHAPES = (FALSE - 1 / len(COLORS)) / (1 - 1 / len(COLORS))
SHARED: dict[str, Any] = {
    "encoder": "tiny-clip", "encoder_states": "2x2", "text_weights": {"answer": 0},
    "evaluate_images": VALIDATION, "decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4,
    "batch_size": 16, "connector_lr": 2e-3, "decoder_lr": 2e-3,
}  # fmt: skip
# Each training run of a recipe continues the previous one.
ARMS: dict[str, list[dict[str, Any]]] = {
    "two-stages": [{"text_source": "synthetic", "steps": 300}, {"text_source": "human", "steps": 150}],
    "teacher": [{"text_source": "synthetic", "steps": 450}],
    "true": [{"text_source": "human", "steps": 450}],
    "mixed": [{"text_source": "mixed", "steps": 450}],
}
# At this size, a step with a prefix takes about as long as two with cross-attention.
DECODERS: dict[str, list[dict[str, Any]]] = {
    "prefix": [{"steps": 300, "decoder": "prefix"}],
    "scratch": [{"steps": 600}],
}


def caption_as_teacher(scene: Scene, draw: random.Random) -> str:
    """Return a caption with the errors of the teacher."""
    things = []
    for thing in scene.objects:
        color, shape = "blue" if thing.color == "purple" else thing.color, thing.shape
        if thing.color != "purple" and draw.random() < FALSE_SHAPES:
            shape = draw.choice([other for other in SHAPES if other != shape])
        things.append(Thing(thing.size, color, shape, thing.place))
    return caption(Scene(scene.background, tuple(things)), "brief")


def caption_truly(scene: Scene) -> str:
    """Return a true caption whose wording differs from the captions of the teacher."""
    names = (f"a {thing.size} {thing.color} {thing.shape}" for thing in scene.objects)
    return f"On {scene.background} there is {', '.join(names)}."


def build_version(folder: Path, scenes: int, *, taught: bool) -> Version:
    """Return a version with `scenes` training scenes. All versions have the same held-out scenes."""
    path = folder / f"{'taught' if taught else 'true'}-{scenes}.txt"
    if not path.exists():
        count = TEST + VALIDATION + max(TAUGHT, *DECODER_SCENES)
        base, _ = make_version(folder / "base", scene_samples(count))
        rows = [row for split in SPLITS for row in base.read(split).to_pylist()]
        rows = sorted(rows, key=lambda row: row["sample_id"])[: TEST + VALIDATION + scenes]
        for number, row in enumerate(rows, -TEST - VALIDATION):
            (scene,) = scenes_of(row["source"], row["source_row"])
            (brief,) = (entry for entry in row["captions"] if entry["style"] == "brief")
            row["captions"], row["references"] = [brief], [brief["text"]]
            if taught:
                text = caption_as_teacher(scene, random.Random(row["sample_id"]))
                row["captions"] = [brief | {"text": text}]
                row["references"] = [caption_truly(scene)] if number < TRUE else []
            row["split"] = "train" if number >= 0 else "validation" if number >= -VALIDATION else "test"
        table = pa.Table.from_pylist(rows, schema=with_split(ROW))
        tables = [table.filter(pc.equal(table["split"], split)) for split in SPLITS]
        path.write_text(str(publish_tables(folder / "scenes", tables)[0].path))
    return read_version(Path(path.read_text()))


def train(version: Version, folder: Path, seed: int, trainings: list[dict[str, Any]]) -> Path:
    """Run the unfinished training runs of a recipe. Return the folder of the last captioner."""
    settings, out = dict(SHARED), folder
    for number, changes in enumerate(trainings):
        out = folder / f"{number}-{seed}"
        if not (out / "metrics.json").exists():
            config = resolve(**settings | changes, seed=seed, evaluations=2)
            train_captioner(version, config, out, resume=(out / "resume.pt").exists())
        settings["init"] = str(out)
    return out


def read_truth(version: Version, folders: list[Path]) -> Scores:
    """Return the share of true phrases of each seed and test image: (S, I)."""
    columns = version.read("test", ["sample_id", "source", "source_row"]).to_pydict().values()
    scenes = {name: scenes_of(*row)[0] for name, *row in zip(*columns, strict=True)}

    def share(line: dict[str, str]) -> float:
        score = CaptionScore()
        score.add(line["caption"], scenes[line["sample_id"]], "brief")
        return score.precision

    seeds = [map(json.loads, (folder / "captions.jsonl").open(encoding="utf-8")) for folder in folders]
    return np.array([[share(line) for line in seed] for seed in seeds])


def main() -> None:
    """Train the missing captioners of an experiment, and print the scores of each recipe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("experiment", choices=("stages", "decoders"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    is_taught = arguments.experiment == "stages"
    arms, sizes = (ARMS, (TAUGHT,)) if is_taught else (DECODERS, DECODER_SCENES)
    versions = {size: build_version(arguments.out, size, taught=is_taught) for size in sizes}
    folders: dict[tuple[int, str], list[Path]] = {}
    for seed, size, (name, arm) in product(arguments.seeds, sizes, arms.items()):
        folder = train(versions[size], arguments.out / f"{name}-{size}", seed, arm)
        folders.setdefault((size, name), []).append(folder)
    for size in sizes:
        print(f"{size} scenes")
        captioners = {name: folders[size, name] for name in arms}
        print_comparison("CIDEr-D", {name: read_scores(part) for name, part in captioners.items()})
        print_comparison(
            "true", {name: read_truth(versions[size], part) for name, part in captioners.items()}
        )


if __name__ == "__main__":
    main()
