"""Compare captioners that read different hidden states, or read them in different ways.

    python benchmarks/hidden_states.py OUT [--steps 250] [--seeds 0 1]

Trains on captions from the facts of 1,100 drawn scenes, with the bundled CLIP frozen. The variants use fewer
states, or a decoder of the same size that reads states as a prefix instead of by cross-attention. Prints
CIDEr-D on held-out scenes, with own and shuffled images. Finished cells are skipped.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipeline.config.files import resolve as resolve_dataset
from pipeline.dataset.directory import open_dataset
from pipeline.dataset.version import Version
from pipeline.run import generate_dataset
from trainer.config import resolve
from trainer.training import train_captioner

TIMES = 3  # at this width, a step with a prefix takes about as long as three others
CELLS: dict[str, dict[str, Any]] = {
    "last layer, all 37": {},
    "patches 2 x 2: 10": {"encoder_states": "2x2"},
    "all 37 as a prefix": {"decoder": "prefix"},
    "patches 2 x 2 as a prefix": {"decoder": "prefix", "encoder_states": "2x2"},
    "all 37, in the time of a prefix": {"steps": TIMES},
    "2 x 2, in the time of a prefix": {"steps": TIMES, "encoder_states": "2x2"},
}


def scenes(folder: Path) -> Version:
    """Generate a version of drawn scenes with captions from their facts."""
    if not (folder / "versions").exists():
        generate_dataset(resolve_dataset(source="scenes", limit=1100, tasks=[], human_texts="keep"), folder)
    return open_dataset(folder)


def main() -> None:
    """Train missing cells, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    version = scenes(arguments.out / "scenes")
    shared: dict[str, Any] = {
        "encoder": "tiny-clip",
        "text_source": "human",
        "text_weights": {"answer": 0},
        "steps": arguments.steps,
    }
    shared |= {"connector_lr": 1e-3, "decoder_lr": 1e-3}
    print(f"{arguments.steps} steps, seeds {arguments.seeds}")
    print(f"{'states':<28} {'CIDEr-D':>8} {'shuffled':>9}   of seeds")
    for name, settings in CELLS.items():
        results = []
        for seed in arguments.seeds:
            folder = arguments.out / f"{name.replace(' ', '-').replace(',', '').replace(':', '')}-{seed}"
            if not (folder / "metrics.json").exists():
                chosen = settings | ({"steps": TIMES * arguments.steps} if "steps" in settings else {})
                train_captioner(version, resolve(**shared | chosen, seed=seed), folder)
            results.append(json.loads((folder / "metrics.json").read_text()))
        own, shuffled = (
            [result[kind]["cider_d"] for result in results] for kind in ("scores", "shuffled_scores")
        )
        of_seeds = ", ".join(f"{score:.2f}" for score in own)
        print(
            f"{name:<28} {statistics.fmean(own):8.2f} {statistics.fmean(shuffled):9.2f}   {of_seeds}",
            flush=True,
        )


if __name__ == "__main__":
    main()
