"""Measure the claims check on real captions with planted errors.

    python benchmarks/claims.py FOLDER [--images 300]

FOLDER contains several human captions per image (`captions_human.jsonl.gz`: `image`, `text`). One caption per
image is checked by `--verify claims`, unchanged and with each kind of error that fits: another object, color,
number or relation, or a negation. A script replaces the model, so that only the check is measured. It
splits a caption into clauses, and answers questions from all captions of the image. A second script answers
yes to all questions and must refute nothing. A third gives a wrong answer to one question in ten.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.files import resolve
from pipeline.errors import TableError
from pipeline.run import generate_dataset
from pipeline.text.content_keys import content_words
from tests.chat.server import Act, ChatServer, running_chat, uuid_of

KINDS = ("thing", "color", "number", "relation", "negation")
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray", "orange", "purple", "pink")
NUMBERS = ("two", "three", "four", "five", "six")
RELATIONS = {
    "on": "under",
    "in": "beside",
    "behind": "before",
    "near": "inside",
    "next": "opposite",
    "left": "right",
    "right": "left",
}
JOINTS = re.compile(r"\s*(?:,|\.|;|\band\b|\bwhile\b|\bwith\b(?!out))\s*")
ASKED = re.compile(
    r"(Is it true that|Is it false that|Does the image show that|Is it wrong to say that) (.*)\?"
)


def plant(caption: str, kind: str, said: set[str], others: list[str], draw: random.Random) -> str | None:
    """Plant an error of this kind, or return None if none fits. `said` holds all words about the image."""
    words = caption.rstrip(". ").split()
    lower = [word.lower().strip(",") for word in words]
    if kind == "negation":
        return (
            re.sub(r"\bwith\b", "without", caption)
            if "with" in lower
            else f"There is no {' '.join(words[1:])}"
        )
    places = {
        "color": [n for n, word in enumerate(lower) if word in COLORS],
        "number": [n for n, word in enumerate(lower) if word in NUMBERS],
        "relation": [n for n, word in enumerate(lower) if word in RELATIONS],
        "thing": [
            n
            for n, word in enumerate(lower)
            if word in said and word not in COLORS + NUMBERS and len(word) > 3
        ],
    }[kind]
    if not places:
        return None
    place = places[-1]
    new = {"color": COLORS, "number": NUMBERS, "thing": others}.get(kind, [RELATIONS.get(lower[place], "")])
    fitting = [word for word in new if word not in said and word != lower[place]]
    return " ".join([*words[:place], draw.choice(fitting), *words[place + 1 :]]) if fitting else None


def split_claims(caption: str) -> list[str]:
    """Return up to eight clauses of a caption."""
    parts = [part.strip() for part in JOINTS.split(caption) if part.strip()]
    return (parts or [caption])[:8]


def holds(claim: str, said: set[str]) -> bool:
    """Return whether the captions contain all content words of a claim. A negation inverts the result."""
    words = {word.lower() for word in re.findall(r"[A-Za-z0-9]+", claim)}
    if negations := words & {"no", "not", "without"}:
        rest = " ".join(word for word in re.findall(r"[A-Za-z0-9]+", claim) if word.lower() not in negations)
        return not {*content_words(rest)} <= said
    return {*content_words(claim)} <= said


def picture(number: int) -> bytes:
    """Return a distinct image for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64)).save(out, "PNG")
    return out.getvalue()


def write_folder(folder: Path, rows: list[tuple[str, str, set[str]]]) -> dict[str, set[str]]:
    """Write an image and its caption for each (kind, caption, words). Returns the words by image hash."""
    said_of = {}
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for number, (kind, caption, said) in enumerate(rows):
            data = picture(number)
            (folder / f"{kind}-{number:05d}.png").write_bytes(data)
            table.writerow([f"{kind}-{number:05d}.png", caption])
            said_of[hashlib.sha256(data).hexdigest()] = said
    return said_of


def script_of(said_of: dict[str, set[str]], model: str, draw: random.Random) -> Any:
    """Return a server script that replies with the claims in a caption, or whether a claim holds."""

    def script(_: int, body: dict[str, Any]) -> Act:
        text = body["messages"][-1]["content"][-1]["text"]
        if body["response_format"]["json_schema"]["name"] == "claims":
            caption = next(line for line in text.splitlines() if line.startswith("Caption: ")).removeprefix(
                "Caption: "
            )
            parts = split_claims(json.loads(caption) if caption.startswith('"') else caption)
            return Act(json.dumps({"claims": parts}))
        asked = ASKED.search(text)
        assert asked, text
        is_right = holds(asked[2], said_of[uuid_of(body)]) == (
            "false" not in asked[1] and "wrong" not in asked[1]
        )
        if model == "wrong one time in ten" and draw.random() < 0.1:
            is_right = not is_right
        return Act(json.dumps({"answer": "yes" if is_right or model == "says yes" else "no"}))

    return script


def main() -> None:
    """Plant errors, run the check with each script, and print errors found and good captions rejected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=300)
    options = parser.parse_args()
    draw = random.Random(0)
    captions: dict[str, list[str]] = defaultdict(list)
    with gzip.open(options.folder / "captions_human.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            captions[row["image"]].append(" ".join(row["text"].split()))
    images = [
        texts for _, texts in sorted(captions.items()) if len(texts) >= 4 and len(texts[0].split()) >= 7
    ][: options.images]
    words = [{word for text in texts for word in content_words(text)} for texts in images]
    others = sorted(
        {word for said in words for word in said if len(word) > 3 and word.isalpha()} - {*COLORS, *NUMBERS}
    )
    rows = []
    for texts, said in zip(images, words, strict=True):
        rows.append(("true", texts[0], said))
        planted = {kind: plant(texts[0], kind, said, others, draw) for kind in KINDS}
        rows += [(kind, caption, said) for kind, caption in planted.items() if caption]
    for model in ("right", "wrong one time in ten", "says yes"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "photos").mkdir()
            said_of = write_folder(folder / "photos", rows)
            with running_chat(ChatServer(script_of(said_of, model, draw))) as chat:
                config = resolve(
                    source=f"folder:{folder / 'photos'}", tasks="none", base_url=[chat.url], model="model",
                    verify={"checks": ["claims"]}, dedupe={"images": "none"}, server={"max_failure_frac": 1},
                )  # fmt: skip
                try:
                    version = generate_dataset(config, folder / "data").version
                    batches = [batch for _, batch in version.batches(["source_row"])]
                except TableError:  # no caption is left
                    batches = []
            kept = Counter(
                name.partition("-")[0] for batch in batches for name in batch["source_row"].to_pylist()
            )
            counts = {
                kind: sum(row[0] == kind for row in rows) for kind in dict.fromkeys(row[0] for row in rows)
            }
            shown = ", ".join(
                f"{kind} {counts[kind] - kept[kind]} of {counts[kind]}" for kind in counts if kind != "true"
            )
            print(
                f"{model}: errors found: {shown}; true captions lost: {counts['true'] - kept['true']} of "
                f"{counts['true']}"
            )


if __name__ == "__main__":
    main()
