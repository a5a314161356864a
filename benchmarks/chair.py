"""Count things that captions name and references do not: `python benchmarks/chair.py FOLDER`.

FOLDER holds `captions_human.jsonl.gz` (`image`, `text`; several lines an image) and `captions_vlm.jsonl.gz` (`model`, `image`,
`text`). Prints CHAIR of people, each first caption judged by the others of its image, and of each model, judged by all of them.
"""

import argparse
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.text.objects import named_things
from trainer.chair import chair, chair_of_people


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a compressed file of JSON lines."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def main() -> None:
    """Print a table, and the time that a caption takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    references: dict[str, list[str]] = defaultdict(list)
    for line in read_lines(folder / "captions_human.jsonl.gz"):
        references[line["image"]].append(line["text"])
    by_model: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for line in read_lines(folder / "captions_vlm.jsonl.gz"):
        if line["image"] in references:
            by_model[line["model"]].append((line["text"], references[line["image"]]))
    rows = {"people": chair_of_people([texts for texts in references.values() if len(texts) > 4])}
    rows |= {model: chair([text for text, _ in pairs], [texts for _, texts in pairs]) for model, pairs in by_model.items()}
    print(f"{'captions of':<28} {'captions':>9} {'of things':>10} {'things':>7}")
    for name, row in rows.items():
        if row:
            print(f"{name:<28} {row['captions']:9.1%} {row['of_things']:10.1%} {row['things']:7.1f}")
    texts = [text for several in references.values() for text in several]
    started = time.process_time()
    for text in texts:
        list(named_things(text))
    print(f"{1e6 * (time.process_time() - started) / len(texts):.0f} microseconds a caption")


if __name__ == "__main__":
    main()
