"""Measure deduplication of captions: `python benchmarks/dedupe.py [--captions 200000] [--peers PYTHON]`.

Templates with WordNet's nouns, with planted duplicates and hard negatives (one decisive word changed), each about an image of
its own; every caption may occur once. Ours beside rensa and datasketch (PYTHON is an interpreter that has both), each in a
process of its own that reads the same file: CPU seconds, peak memory, recall and precision of the removed duplicates against
the planted truth, and the fraction of hard negatives removed. Without --peers, only ours runs.
"""

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from pipeline.text.wordnet import names

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
TEMPLATES = (
    "A {color} {noun} stands beside a {other} near the {place}.",
    "Two {noun}s lie on a {color} {other} in front of a {place}.",
    "A man holds a {color} {noun} while a {other} waits by the {place}.",
    "A close view of a {noun} and a {color} {other} under the {place}.",
    "A woman in {color} looks at a {noun} next to the {other} of a {place}.",
    "Several people carry a {noun} past a {color} {other} toward the {place}.",
)
OPENINGS = ("The image shows ", "In this picture, there is ", "This is a photo of ", "We can see ")


def base(rng: random.Random, nouns: list[str]) -> str:
    """Return a caption; some nouns are frequent, most are rare."""
    words = {name: nouns[min(int(rng.paretovariate(0.5)) - 1, len(nouns) - 1)] for name in ("noun", "other", "place")}
    return rng.choice(TEMPLATES).format(color=rng.choice(COLORS), **words)


def paraphrase(text: str, kind: str, rng: random.Random) -> str:
    """Return a paraphrase of the caption."""
    if kind == "case":
        return text.upper().rstrip(".")
    if kind == "opening":
        return rng.choice(OPENINGS) + text[0].lower() + text[1:]
    if kind == "articles":
        return text.replace("A ", "The ", 1).replace(" a ", " the ").replace("Several", "There are several")
    return text.replace(" is ", " is clearly ").replace("A ", "There is a very ", 1)


def change_decisive_word(text: str, kind: str, rng: random.Random) -> str:
    """Return the caption with one decisive word changed."""
    words = text.split(" ")
    color = next(n for n, word in enumerate(words) if word.strip(".,") in COLORS)
    if kind == "color":
        words[color] = rng.choice([candidate for candidate in COLORS if candidate != words[color]])
    elif kind == "number":
        words[0] = "Three" if words[0] in ("Two", "Several") else "Four"
    else:
        words[color] = f"not {words[color]}"
    return " ".join(words)


def plant(count: int, seed: int) -> tuple[list[str], list[int], list[str]]:
    """Return captions in random order, with the duplicate group and the kind of each."""
    rng = random.Random(seed)
    nouns = [name for name in names() if name.isalpha() and len(name) > 3]
    rng.shuffle(nouns)
    bases: dict[str, int] = {}
    while len(bases) < count * 7 // 10:
        bases.setdefault(base(rng, nouns), len(bases))
    rows = [(text, group, "base") for text, group in bases.items()]
    originals = rng.sample(list(bases), count * 2 // 10)
    for text in originals:
        kind = rng.choice(("case", "opening", "articles", "adverbs"))
        rows.append((paraphrase(text, kind, rng), bases[text], f"duplicate, {kind}"))
    negatives: dict[str, str] = {}
    while len(negatives) < count - len(rows):
        kind = rng.choice(("color", "number", "negation"))
        text = change_decisive_word(rng.choice(originals), kind, rng)
        if text not in bases:
            negatives.setdefault(text, f"negative, {kind}")
    rows += [(text, len(bases) + n, kind) for n, (text, kind) in enumerate(negatives.items())]
    rng.shuffle(rows)
    return [text for text, _, _ in rows], [group for _, group, _ in rows], [kind for _, _, kind in rows]


def score(kept: list[bool], groups: list[int], kinds: list[str]) -> str:
    """Return recall and precision of the removed duplicates, and the fraction of hard negatives removed."""
    sizes, left = Counter(groups), Counter(group for group, flag in zip(groups, kept, strict=True) if flag)
    planted = sum(size - 1 for size in sizes.values())
    right = sum(min(size - left[group], size - 1) for group, size in sizes.items())
    gone = kept.count(False)
    negatives = [flag for flag, kind in zip(kept, kinds, strict=True) if kind.startswith("negative")]
    return (
        f"recall {right / planted:.3f}  precision {right / max(1, gone):.4f}  "
        f"hard negatives removed {negatives.count(False) / len(negatives):.4f}"
    )


def run_own_dedupe(source: Path, out: Path) -> None:
    """Read the texts, and write a keep flag for each, as the peers do."""
    from pipeline.stages.dedupe import STAGE
    from tests.stage_runs import run_stage

    lines = csv.ReadOptions(column_names=["text"], block_size=1 << 24), csv.ParseOptions(delimiter="\x01", quote_char=False)
    texts = csv.read_csv(source, *lines)["text"]
    ids = pc.utf8_lpad(pc.cast(pa.array(np.arange(len(texts))), pa.string()), 9, "0")
    columns = {"annotation_id": ids, "sample_id": ids, "task": pa.repeat("caption", len(texts))}
    columns |= {"clean_text": texts, "clean_question": pa.nulls(len(texts), pa.string())}
    del texts
    marked = run_stage(STAGE, pa.table(columns), dedupe={"max_images_per_caption": 1})
    out.write_text("\n".join("1" if reason is None else "0" for reason in marked["reason"].to_pylist()), encoding="utf-8")


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command and return its CPU seconds and peak MB."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def main() -> None:
    """Print one line for each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--peers", help="an interpreter with rensa and datasketch")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--ours", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        run_own_dedupe(*arguments.ours)
        return
    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {arguments.captions:,} captions of seed {arguments.seed}"
    )
    texts, groups, kinds = plant(arguments.captions, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "texts.txt", Path(folder) / "flags.txt"
        source.write_text("\n".join(texts), encoding="utf-8")
        texts.clear()
        engines = {"ours": [sys.executable, __file__, "--ours"]}
        if arguments.peers:
            peer = [arguments.peers, str(Path(__file__).parent / "peers" / "text_dedup_peer.py")]
            engines |= {name: [*peer, name] for name in ("rensa", "rensa-tuned", "datasketch")}
        for name, command in engines.items():
            seconds, megabytes = measure([*command, str(source), str(out)])
            kept = [flag == "1" for flag in out.read_text(encoding="utf-8").split("\n")]
            print(f"  {name:<11} {seconds:>7.2f} CPU s  {megabytes:>6,.0f} MB  {score(kept, groups, kinds)}", flush=True)


if __name__ == "__main__":
    main()
