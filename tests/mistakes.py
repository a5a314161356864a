"""Mistakes of new users: command, error and hint of each.

`python -m tests.mistakes FOLDER` makes all mistakes, and prints the outcomes as JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tests.commands import run_synth


@dataclass(frozen=True, slots=True)
class Mistake:
    """A wrong command in a folder with photos."""

    name: str
    command: str
    error: str
    hint: str = ""
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    code: int = 1


def add_photos(folder: Path) -> None:
    (folder / "photos").mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (64, 48), color)
        image.paste("white", (number * 9, 5, number * 9 + 20, 30))
        image.save(folder / "photos" / f"{number}.png")


def add(*files: str) -> Callable[[Path], None]:
    """Return a function that writes files. Each argument is a file name, a space and the text."""

    def write(folder: Path) -> None:
        for name, text in (file.split(" ", 1) for file in files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return write


EMBEDDED = "--engine embedded --model tiny"
PHOTOS = "generate --source folder:photos"
CAPTIONER = add(
    'cap/config.json {"prompts": [["human", "brief"]]}', "cap/tokenizer.json {}", "cap/model.safetensors "
)
MISTAKES = (
    Mistake(
        "two sources", "generate --source folder:photos --source scenes",
        "one source, but 2 are given: folder:photos, scenes", "--out",
    ),
    Mistake(
        "folder misspelled", "generate --source folder:photo", "not a folder: photo", "did you mean photos?",
    ),
    Mistake(
        "folder without folder:", "generate --source photos", "unknown source: photos",
        "did you mean folder:photos?",
    ),
    Mistake(
        "file without a kind", "generate --source slides.pdf", "unknown source: slides.pdf",
        "the path: KIND:slides.pdf", add("slides.pdf x"),
    ),
    Mistake(
        "no vLLM and no network", f"{PHOTOS} --engine vllm --model Qwen/Nope", "vLLM is not installed here",
        "pip install vllm",
    ),
    Mistake("server without vLLM and network", "serve", "vLLM is not installed here", "pip install vllm"),
    Mistake(
        "no address", f"{PHOTOS} --base-url 127.0.0.1:9", "is not an address with http:// or https://",
        "base_url",
    ),
    Mistake(
        "prompt folder not there", f"{PHOTOS} --config p.yaml", "the prompt folder nope does not exist",
        "generate.prompt_dir",
        add("p.yaml generate: {prompt_dir: nope}"),
    ),
    Mistake(
        "prompt misnamed", f"{PHOTOS} --config p.yaml", "prompts/caption.j2 is not the name of a prompt",
        "caption/v1.j2",
        add("p.yaml generate: {prompt_dir: prompts}", "prompts/caption.j2 Describe it."),
    ),
    Mistake(
        "preview into a store", "preview --source scenes --out memory://d",
        "memory://d is a URL, not a local path", "s3://",
    ),
    Mistake(
        "task misspelled", f"{PHOTOS} --tasks captions", "unknown task: captions", "did you mean caption?",
    ),
    Mistake("option misspelled", f"{PHOTOS} --limt 3", "No such option: --limt", "--limit", code=2),
    Mistake(
        "dataset misspelled", "report data/foto", "no dataset at data/foto", "did you mean data/photos?",
        add("data/photos/run.json {}"),
    ),
    Mistake(
        "dataset in place of a command", "review data/photos", "No such command 'data/photos'",
        "synth review sample", code=2,
    ),
    Mistake(
        "folder without a dataset", "review sample photos", "no dataset at photos", "`synth generate` makes",
    ),
    Mistake(
        "check misspelled", f"{PHOTOS} --verify claim", "('claim'; did you mean claims?)", "verify.checks",
    ),
    Mistake(
        "file in place of a folder", f"{PHOTOS} {EMBEDDED} --out photos/0.png",
        "a file exists where a folder should be", "--out",
    ),
    Mistake("split misspelled", "export --split valid", "'valid' is not one of", "--split", code=2),
    Mistake(
        "two options for one key", "generate --source scenes --tasks qa --no-model",
        "--no-model and --tasks cannot be combined", "pass one",
    ),
    Mistake("no such engine", "generate --source scenes --engine warp", "bad value for engine"),
    Mistake("encoder misspelled", "train --encoder tiny-vitt", "no encoder tiny-vitt", "tiny-vit or"),
    Mistake("decoder misspelled", "train --decoder qwen", "no decoder qwen", "did you mean qwen3?"),
    Mistake(
        "style not learned", "caption cap photos/0.png --style breif", "was not trained on the style breif",
        "did you mean brief?", CAPTIONER,
    ),
    Mistake(
        "question to a captioner without answers", "caption cap photos/0.png --question Where?",
        "was not trained to answer questions", "leave out --question, to get captions (brief)", CAPTIONER,
    ),
    Mistake(
        "CLIP misspelled", "evaluate cap --clip-score metaclp", "no CLIP metaclp", "did you mean metaclip?",
        CAPTIONER,
    ),
    Mistake(
        "address of another machine", "serve-captioner cap --host 192.0.2.1",
        "cannot listen on 192.0.2.1:8200",
        "--host 127.0.0.1", CAPTIONER,
    ),
    Mistake("source without folder:", "generate photos", "(--source folder:photos?)", code=2),
    Mistake("source before --", "generate photos -- --seed 1", "(--source folder:photos?)", code=2),
    Mistake("caption style misspelled", f"{PHOTOS} --styles atl", "no caption style atl", "mean alt?"),
    Mistake(
        "name of a language", f"{PHOTOS} --language german", "'german' is not a language code", "language",
    ),
    Mistake(
        "column misspelled", f"{PHOTOS} --columns context=tilte {EMBEDDED}", "no column is named tilte",
        "did you mean title?", add("photos/metadata.csv file_name,title\n0.png,Red\n"),
    ),
    Mistake(
        "column of a prompt misspelled", f"{PHOTOS} --columns context=title --task t.yaml",
        "uses row.titel", "did you mean row.title?",
        add("t.yaml {name: t, kind: caption, prompt: 'Describe {{ row.titel }}.'}"),
    ),
    Mistake(
        "column of a prompt mapped by a misspelled name", f"{PHOTOS} --columns context=tilte --task t.yaml",
        "uses row.title", "to use the column title, pass --columns context=title",
        add("t.yaml {name: t, kind: caption, prompt: 'Describe {{ row.title }}.'}"),
    ),
    Mistake(
        "unquoted yes and no", f"{PHOTOS} --task t.yaml",
        "YAML reads yes, no, on and off as true and false", "",
        add(
            "t.yaml {name: t, kind: record, prompt: Look., "
            "output: {type: object, properties: {a: {enum: [yes, no]}}}}"
        ),
    ),
)  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    """Return an environment without keys, with an unreachable Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SYNTH_", "HF_"))}
    return kept | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home / "hf")}


def make_all(folder: Path) -> dict[str, tuple[int, str, list[str]]]:
    """Make each mistake. Return its exit code, its messages and the versions that it wrote."""
    outcomes = {}
    for number, mistake in enumerate(MISTAKES):
        home = folder / str(number)
        home.mkdir()
        add_photos(home)
        mistake.prepare(home)
        done = run_synth(*mistake.command.split(), cwd=home, env=environment(home))
        versions = [str(path) for path in home.glob("**/versions/v*")]
        outcomes[mistake.name] = (done.returncode, done.stderr, versions)
    return outcomes


if __name__ == "__main__":
    print(json.dumps(make_all(Path(sys.argv[1]))))
