"""Rehearse a run with the default model: its full shape, random weights, and a real vLLM server.

usage: python -m tests.rehearse [--layers 4] [--vision-layers 8] [--folder rehearsal] [--minutes 60]

The report shows whether replies follow their schemas, and images take as many tokens as computed.
4 + 8 layers need 2 GB of disk. All layers (36 + 32) need 8 GB of disk and 15 GB of memory.
"""

import argparse
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from pipeline.config.files import resolve
from pipeline.dataset.directory import DatasetDir
from pipeline.digests import weights_revision
from pipeline.images.decode import PATCH_PX, image_id
from pipeline.inference.journal import Journal
from pipeline.inference.requests import RequestPlan, build_requests
from pipeline.sources import with_source_defaults
from pipeline.tasks import Tasks
from pipeline.tasks.boxes import Frame, seen_size
from tests.full_shape import LAYERS, VISION_LAYERS, WEIGHTS_BYTES, write_model

ROOT = Path(__file__).parents[1]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SIZES = ((640, 480), (1024, 768), (4000, 3000), (56, 56))
SETTINGS = """
captions: [human.csv]
human_texts: keep
generate: {max_tokens: 64, max_attempts: 2, caption_styles: [plain, ocr]}
filter: {language: any, min_caption_words: 1, min_question_words: 1, max_answer_words: 100,
  max_duplicate_trigram_frac: 1, min_distinct_word_frac: 0, max_non_latin_frac: 1}
verify: {checks: [round_trip, claims, covers], repair: true}
server: {max_failure_frac: 1, request_timeout_s: 3600, startup_timeout_s: 3600}
"""
TASKS = {
    "labels": "{name: labels, kind: labels, labels: [indoors, outdoors], prompt: 'Where is this?'}",
    "find": "{name: find, kind: boxes, prompt: 'Find all cups.'}",
}
FLAGS = ("--max-num-batched-tokens", "512", "--max-num-seqs", "4")  # fewer tokens per step than on a GPU


def write_photos(folder: Path) -> None:
    """Write pictures with human texts. Without human texts, few texts would remain for the checks."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    rows = ["image,caption,question,answer"]
    for number, (width, height) in enumerate(SIZES):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        name = f"{width}x{height}.jpg"
        image.save(folder / "photos" / name, quality=90)
        books = number + 2
        caption = f"A red cup and {books} green books on a white table."
        rows.append(f"{name},{caption},How many books are there?,{books}")
    (folder / "human.csv").write_text("\n".join(rows))


def generate(folder: Path, model: Path, minutes: float) -> int | None:
    """Run `synth generate`, and return its exit code, or None if it was killed after some minutes."""
    (folder / "settings.yaml").write_text(SETTINGS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text)
    command = [
        sys.executable, "-m", "pipeline", "generate", "--source", "folder:photos", "--engine", "vllm",
        "--model", str(model.absolute()), "--tasks", "caption,qa", "--config", "settings.yaml", "--out", "d",
        *(part for name in TASKS for part in ("--task", f"{name}.yaml")), "--", *FLAGS,
    ]  # fmt: skip
    environment = os.environ | {"SYNTH_VLLM_PYTHON": str(VLLM_PYTHON), "PYTHONPATH": str(ROOT)}
    try:
        return subprocess.run(command, cwd=folder, env=environment, timeout=minutes * 60).returncode
    except subprocess.TimeoutExpired:
        return None


def report_tokens(folder: Path, model: Path) -> None:
    """Print the prompt tokens of each image, as computed and as reported by the server."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    os.chdir(folder)
    own = {"tasks": ["caption", "qa"], "custom_tasks": [Path(f"{name}.yaml") for name in TASKS]}
    config = with_source_defaults(resolve(Path("settings.yaml"), source="folder:photos", **own))
    revisions = {config.default_model: weights_revision(model)}
    plan = RequestPlan.of(config, Tasks(config.tasks, config.custom_tasks), revisions)
    print("size        task          computed  server")
    with Journal(DatasetDir(Path("d")).journal) as journal:
        for width, height in SIZES:
            sample_id = image_id(Path(f"photos/{width}x{height}.jpg").read_bytes())
            for request in build_requests(sample_id, plan):
                last = journal.last(request.id)
                across, down = seen_size(Frame(width, height, request.max_pixels))
                chat = (
                    f"<|im_start|>system\n{request.system}<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>"
                    f"{request.text}<|im_end|>\n<|im_start|>assistant\n"
                )
                computed = across * down // PATCH_PX**2 + len(tokenizer.encode(chat).ids)
                shown = f"{last[0].prompt_tokens:,}" if last else "no reply"
                print(f"{width:>4} x {height:<5}{request.task} {request.style:<8} {computed:>6,} {shown:>9}")


def report_replies(path: Path) -> None:
    """Print the numbers of replies by task, finish reason and flaw."""
    with sqlite3.connect(path) as db:
        rows = db.execute("SELECT task, finish_reason, COALESCE(flaw, 'usable') FROM replies").fetchall()
    for (task, finish_reason, flaw), count in sorted(Counter(rows).items()):
        print(f"{count:>4} {task:<12} {finish_reason:<12} {flaw}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vision-layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("rehearsal"))
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    layers = arguments.layers, arguments.vision_layers
    model = folder / f"qwen2.5-vl-{layers[0]}-{layers[1]}"
    if not (model / "model.safetensors").exists():
        size = write_model(model, *layers)
        print(f"{size:,} bytes of random weights in {model}")
        assert layers != (LAYERS, VISION_LAYERS) or size == WEIGHTS_BYTES
    write_photos(folder)
    started = time.monotonic()
    code = generate(folder, model, arguments.minutes)
    print(f"\nexit code {code} after {time.monotonic() - started:.0f} s; vLLM log: {folder / 'd/vllm.log'}")
    report_replies(DatasetDir(folder / "d").journal)
    report_tokens(folder, model)


if __name__ == "__main__":
    main()
