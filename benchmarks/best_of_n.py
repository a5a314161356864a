"""Is the best of several captions truer than one? `python benchmarks/best_of_n.py [--images 300] [--temperature 1.3]`.

The tiny teacher writes captions of drawn scenes, the first of each style greedily, the others at a temperature. Of each image
and style one is taken: the first that the stage filter kept, any other, the choice of the stage `select`, and the truest by
the facts, which nobody knows outside of drawn scenes. Printed are the shares of phrases that are true, and of objects that are
named.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from pipeline.config import SCENES
from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.run import generate_dataset
from pipeline.scenes.scene import Scene, scenes_of
from pipeline.scenes.text import CaptionScore
from pipeline.storage.files import read_table

MEASURES = {"consistency": {}, "clip": {"checks": ["alignment"], "lowest_alignment_frac": 0.0}}


def truth(text: str, scene: Scene, style: str) -> float:
    """Return the F1 of what a caption says and what is there."""
    score = CaptionScore()
    score.add(text, scene, style)
    return 2 * score.matched / max(1, score.num_phrases + score.num_objects)


def main() -> None:
    """Generate, select by each measure, and print how true each choice is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.3)
    options = parser.parse_args()
    scores: dict[tuple[str, str], CaptionScore] = defaultdict(CaptionScore)
    with tempfile.TemporaryDirectory() as folder:
        dataset = DatasetDir(Path(folder))
        for by, verify in MEASURES.items():
            generate = {"samples": options.samples, "sample_temperature": options.temperature}
            settings: dict[str, Any] = {"generate": generate, "verify": verify, "select": {"by": by}}
            generate_dataset(
                resolve(source="scenes", limit=options.images, seed=3, tasks=["caption"], **settings), Path(folder)
            )
            samples = read_table(dataset.stage("source"), columns=["sample_id", "source_row"]).to_pylist()
            scenes = {row["sample_id"]: scenes_of(SCENES, row["source_row"])[0] for row in samples}
            for row in read_table(dataset.stage("select")).to_pylist():
                scores[row["style"], by].add(row["clean_text"], scenes[row["sample_id"]], row["style"])
        candidates: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in read_table(dataset.stage("verify")).to_pylist():
            candidates[row["sample_id"], row["style"]].append(row["clean_text"])
    for (sample_id, style), (first, *others) in candidates.items():
        scene = scenes[sample_id]
        scores[style, "the first"].add(first, scene, style)
        for text in others:
            scores[style, "any other"].add(text, scene, style)
        truest = max((first, *others), key=lambda text: truth(text, scene, style))
        scores[style, "the truest"].add(truest, scene, style)
    for (style, chosen), score in sorted(scores.items()):
        print(f"{style:<9} {chosen:<12} true phrases {score.precision:.4f}, objects named {score.recall:.4f}")


if __name__ == "__main__":
    main()
