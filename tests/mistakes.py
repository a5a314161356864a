"""The mistakes of a new user, each with the command that makes it, and what must be said about it.

tests/whole/test_mistakes.py checks the messages.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NOBODY = "http://127.0.0.1:9/v1"  # nothing listens there


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong command in a folder with some photos; `{server}` in it is a server that wants a key."""

    name: str
    command: str
    error: str
    hint: str
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    code: int = 1


def add_photos(folder: Path) -> None:
    (folder / "photos").mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (64, 48), color)
        image.paste("white", (number * 9, 5, number * 9 + 20, 30))
        image.save(folder / "photos" / f"{number}.png")


def add_table(folder: Path) -> None:
    rows = [
        {"photo": {"bytes": path.read_bytes(), "path": None}, "words": "x"} for path in sorted((folder / "photos").iterdir())
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def add_urls(folder: Path) -> None:
    pq.write_table(pa.table({"image": ["https://example.org/a.jpg", "https://example.org/b.jpg"]}), folder / "urls.parquet")


def add_file(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return write


def add_misnamed_prompt(folder: Path) -> None:
    add_file("p.yaml", "generate: {prompt_dir: prompts}")(folder)
    add_file("prompts/caption.j2", "Describe it.")(folder)


def add_empty_folder(folder: Path) -> None:
    (folder / "empty").mkdir()


EMBEDDED = "--engine embedded --model tiny"
PHOTOS = "generate --source folder:photos"
MISTAKES = (
    Mistake("no source", "generate", "no source given", "--source scenes"),
    Mistake(
        "two sources", "generate --source folder:photos --source scenes",
        "one source, and 2 are given: folder:photos, scenes", "--out",
    ),
    Mistake("folder without folder:", "generate --source photos", "unknown source: photos", "did you mean folder:photos?"),
    Mistake("source misspelled", "generate --source flickr30", "unknown source: flickr30", "did you mean flickr30k?"),
    Mistake("folder not there", "generate --source folder:nope", "not a folder: nope", "--source folder:PATH"),
    Mistake("folder without images", "generate --source folder:empty", "no image in empty", ".heic", add_empty_folder),
    Mistake("wrong column", "generate --source parquet:rows.parquet --columns image=pic", "no column pic", "photo", add_table),
    Mistake(
        "zip without archive:", "generate --source photos.zip", "unknown source: photos.zip", "archive:photos.zip",
        add_file("photos.zip", "x"),
    ),
    Mistake(
        "list of no images", "generate --source list:prices.csv", "no column of prices.csv names an image", "file_name",
        add_file("prices.csv", "id,price\n1,2\n"),
    ),
    Mistake(
        "images by URL", f"generate --source parquet:urls.parquet --columns image=image {EMBEDDED}",
        "2 image not embedded", "--allow-urls", add_urls,
    ),
    Mistake("no network", f"{PHOTOS} --engine embedded --model Qwen/Nope", "127.0.0.1:9 does not answer", "--base-url"),
    Mistake("server not started", f"{PHOTOS} --base-url {NOBODY}", f"no server answers at {NOBODY}", "synth serve"),
    Mistake("no address", f"{PHOTOS} --base-url 127.0.0.1:9", "is not an address with http:// or https://", "base_url"),
    Mistake("no key", f"{PHOTOS} --base-url {{server}}", "wants a key, and none is set", "SYNTH_API_KEY="),
    Mistake(
        "prompt folder not there", f"{PHOTOS} --config p.yaml", "no folder of prompts at nope", "generate.prompt_dir",
        add_file("p.yaml", "generate: {prompt_dir: nope}"),
    ),
    Mistake(
        "prompt misnamed", f"{PHOTOS} --config p.yaml", "prompts/caption.j2 is no prompt that is used", "caption/v1.j2",
        add_misnamed_prompt,
    ),
    Mistake(
        "setting misspelled", f"{PHOTOS} --config c.yaml", "unknown config key: generate.max_token", "generate.max_tokens",
        add_file("c.yaml", "generate: {max_token: 9}"),
    ),
    Mistake(
        "setting of another type", f"{PHOTOS} --config c.yaml", "'many' is not a whole number", "synth config",
        add_file("c.yaml", "limit: many"),
    ),
    Mistake("no such file of settings", f"{PHOTOS} --config none.yaml", "cannot read config file none.yaml", "YAML"),
    Mistake(
        "import into a store", "import --source folder:photos --out memory://d", "memory://d is not a path on this machine", "s3://",
    ),
    Mistake(
        "preview into a store", "preview --source folder:photos --out memory://d", "memory://d is not a path on this machine", "s3://",
    ),
    Mistake("stage misspelled", f"{PHOTOS} --from-stage fliter", "unknown stage: fliter", "did you mean filter?"),
    Mistake("task misspelled", f"{PHOTOS} --tasks captions", "unknown task: captions", "did you mean caption?"),
    Mistake("option misspelled", f"{PHOTOS} --limt 3", "No such option: --limt", "--limit", code=2),
    Mistake("no such dataset", "push nope --repo me/x", "no dataset at nope", "synth generate"),
    Mistake("no such version to train on", "train --data nope", "no dataset at nope", "synth generate"),
    Mistake("no such captioner", "caption nope photos/0.png", "no captioner in nope", "synth train"),
    Mistake("no such captioner to score", "evaluate nope", "no captioner in nope", "synth train"),
    Mistake("no such experiment", "experiment nope.yaml", "cannot read config file nope.yaml", "docs/experiment.yaml"),
)  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    """Return an environment without a key, in which no Hub answers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SYNTH_", "HF_"))}
    return kept | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home / "hf")}
