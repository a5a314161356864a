"""Measure the gain of self-critical training on drawn scenes with varied captions, similar to human ones.

    synth generate --source scenes --limit 2000
    PYTHONPATH=. python benchmarks/self_critical.py data/scenes [--steps 1200] [--scst-steps 200]
        [--scst-lr 5e-5] [--seeds 0]

Each image gets five captions from its facts, with random objects, sizes, colors, order and wording. The first
captioner is trained by likelihood, and the second by likelihood and then by rewards, for the same number of
steps in total. The third is trained only for the likelihood steps of the second. All are scored on held-out
scenes against five such captions per image.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from examples.scenes.facts import scenes_of
from pipeline.dataset.builder import with_split
from pipeline.dataset.directory import open_dataset
from pipeline.dataset.version import Version
from pipeline.scenes.scene import Scene, Thing
from pipeline.tables import ROW, SPLITS
from tests.scene_data import publish_tables
from trainer.config import resolve
from trainer.training import train_captioner

CAPTIONS = 5  # per image, as in COCO and Flickr30k
OPENINGS = ("", "", "there is ", "a picture of ", "an image with ")
LINKS = (" and ", ", ", " next to ", " with ")


def word_caption(scene: Scene, draw: random.Random) -> str:
    """Return a random caption with some of the objects, in random order, and some of their attributes."""
    things = [thing for thing in scene.objects if draw.random() < 0.8] or [draw.choice(scene.objects)]
    if draw.random() < 0.5:
        draw.shuffle(things)
    text = draw.choice(OPENINGS) + draw.choice(LINKS).join(_named(thing, draw) for thing in things)
    text += f" on a {scene.background} background" if draw.random() < 0.4 else ""
    return f"{text.capitalize()}."


def _named(thing: Thing, draw: random.Random) -> str:
    words = [thing.size] * (draw.random() < 0.5) + [thing.color] * (draw.random() < 0.8) + [thing.shape]
    return f"a {' '.join(words)}"


def with_captions(row: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Return a row with varied captions, which also become the references."""
    brief = next(caption for caption in row["captions"] if caption["style"] == "brief")
    (scene,) = scenes_of(row["source"], row["source_row"])
    texts = [word_caption(scene, draw) for _ in range(CAPTIONS)]
    return row | {"captions": [brief | {"text": text} for text in texts], "references": texts}


def with_rows(version: Version, change: Callable[[dict[str, Any]], dict[str, Any]], folder: Path) -> Version:
    """Write a copy of a version, with `change` applied to each row."""

    def tables() -> Iterator[pa.Table]:
        for split in SPLITS:
            batch = [change(row) | {"split": split} for row in version.read(split).to_pylist()]
            table = pa.Table.from_pylist(batch, schema=with_split(ROW))
            yield table

    names = ("source", "model", "prompts", "schemas", "config", "funnel", "measured")
    provenance = {name: version.manifest[name] for name in names}
    return publish_tables(folder, tables(), funnel=provenance["funnel"], provenance=provenance)[0]


def main() -> None:
    """Train and score the captioners, and print one line for each."""
    parser = argparse.ArgumentParser(
        description="Likelihood and rewards, beside as many steps of likelihood."
    )
    parser.add_argument("data", type=Path, help="A dataset of scenes.")
    parser.add_argument("--encoder", default="tiny-clip")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--scst-steps", type=int, default=200)
    parser.add_argument("--scst-lr", type=float, default=5e-5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    steps, rewarded = arguments.steps, arguments.scst_steps
    kinds: dict[str, dict[str, Any]] = {
        f"{steps} of likelihood": {"steps": steps},
        f"{steps} and {rewarded} of likelihood": {"steps": steps + rewarded},
        f"{steps} of likelihood, {rewarded} of rewards": {
            "steps": steps,
            "scst_frac": rewarded / steps,
            "scst_lr": arguments.scst_lr,
        },
    }
    with tempfile.TemporaryDirectory() as name:
        version = with_rows(
            open_dataset(arguments.data), partial(with_captions, draw=random.Random(0)), Path(name) / "worded"
        )
        print(f"{version.manifest['rows']}, {arguments.encoder}, decoder from scratch")
        for seed in arguments.seeds:
            for number, (kind, options) in enumerate(kinds.items()):
                config = resolve(encoder=arguments.encoder, seed=seed, text_weights={"answer": 0}, **options)
                metrics = train_captioner(version, config, Path(name) / f"{number}-{seed}")
                scores, (low, high) = metrics["scores"], metrics["intervals"]["cider_d"]
                shown = (
                    f"CIDEr-D {scores['cider_d']:.3f} [{low:.2f}, {high:.2f}], BLEU-4 {scores['bleu_4']:.3f}"
                )
                shuffled = metrics["shuffled_scores"]["cider_d"]
                print(f"  seed {seed}, {kind}: {shown}, shuffled {shuffled:.3f}", flush=True)


if __name__ == "__main__":
    main()
