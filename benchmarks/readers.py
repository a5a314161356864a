"""Check that data loaders from other projects can read what `synth export` writes.

    python benchmarks/readers.py [--nanovlm CHECKOUT] ...

Scenes with texts from the tiny teacher are exported, and each loader must return every image and text.
open_clip (`pip install open_clip_torch`) reads tables and tar shards. The other loaders come from checkouts:
huggingface/nanoVLM (The Cauldron's columns), haotian-liu/LLaVA and kohya-ss/sd-scripts. The last two need
older packages, so each checkout needs its own `.venv` with its requirements. Prints counts, and the number
of code lines that each loader needs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config.files import resolve
from pipeline.dataset.version import Version
from pipeline.formats.export import export_version
from pipeline.inference.engines import TINY_WEIGHTS
from pipeline.run import generate_dataset

SIDE_PX = 32
PEERS = Path(__file__).parent / "peers"


def read_with_open_clip(version: Version, folder: Path) -> None:
    """Read the CSV and WebDataset exports with the loaders from open_clip's training script."""
    from open_clip_train.data import get_csv_dataset, get_wds_dataset
    from torchvision.transforms import Compose, Resize, ToTensor

    export_version(version, "csv", folder / "csv", splits=("train",))
    export_version(version, "webdataset", folder / "wds", splits=("train",))
    shape = Compose([lambda image: image.convert("RGB"), Resize((SIDE_PX, SIDE_PX)), ToTensor()])
    usual: dict[str, Any] = {"batch_size": 8, "workers": 0, "distributed": False, "world_size": 1, "seed": 0}
    keys = {"csv_img_key": "filepath", "csv_caption_key": "title", "csv_separator": ","}
    table = Namespace(
        train_data=str(folder / "csv/train.csv"), val_data=str(folder / "csv/train.csv"), **keys, **usual
    )
    with_folder = folder / "csv"
    texts = read_batches(
        get_csv_dataset(table, shape, is_train=False, tokenizer=list).dataloader, with_folder
    )
    captions = sum(
        len(row["captions"])
        for _, batch in version.batches(["captions"], splits=("train",))
        for row in batch.to_pylist()
    )
    print(f"open_clip, csv: {texts} of {captions} captions; 0 lines, --csv-separator ,")
    shards = str(folder / "wds/train-000000.tar")
    tar = Namespace(train_data=shards, val_data=shards, val_num_samples=None, **usual)
    images = read_batches(
        get_wds_dataset(tar, shape, is_train=False, tokenizer=lambda text: [text]).dataloader, with_folder
    )
    print(
        f"open_clip, webdataset: {images} of {version.manifest['rows']['train']} images; 0 lines, "
        "--dataset-type webdataset"
    )


def read_batches(loader: Any, folder: Path) -> int:
    """Return the number of pairs that a loader yields. Paths in tables are relative to `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return sum(len(images) for images, _ in loader)
    finally:
        os.chdir(before)


def read_with_nanovlm(version: Version, folder: Path, checkout: Path) -> None:
    """Read the export in The Cauldron's format with nanoVLM's dataset and collator."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    sys.path.insert(0, str(checkout))
    collators, datasets, processors = (
        import_module(f"data.{name}") for name in ("collators", "datasets", "processors")
    )
    export_version(version, "cauldron", folder / "cauldron", splits=("train",))
    loaded = load_dataset(str(folder / "cauldron"), split="train", cache_dir=str(folder / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(TINY_WEIGHTS)
    # nanoVLM expects a list of tokens, as transformers 4 returned.
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, return_dict=False)  # type: ignore[method-assign]
    tokenizer.image_token = "<|image_pad|>"
    for row in range(1, 5):
        for column in range(1, 5):
            setattr(tokenizer, f"r{row}c{column}", f"<r{row}c{column}>")
    dataset = datasets.VQADataset(loaded, tokenizer, processors.get_image_processor(64, SIDE_PX), 4)
    batch = collators.VQACollator(tokenizer, 4096)([dataset[number] for number in range(len(dataset))])
    learned = int((batch["labels"] >= 0).sum())
    print(
        f"nanoVLM: {len(batch['images'])} of {version.manifest['rows']['train']} images, {learned:,} "
        "tokens to learn; 0 lines"
    )


def read_with_llava(version: Version, folder: Path, checkout: Path) -> None:
    """Read the conversation export with LLaVA's dataset and collator."""
    export_version(version, "llava", folder / "llava", splits=("train",))
    arguments = [str(folder / "llava/train.json"), str(folder / "llava"), str(folder)]
    read = run_peer("llava_peer.py", arguments, checkout)
    images = f"{read['images']} of {version.manifest['rows']['train']} images"
    print(
        f"LLaVA: {images}, {read['learned']} of {read['answers']} answers learned; 0 lines, --data_path "
        "and --image_folder"
    )


def read_with_kohya(version: Version, folder: Path, checkout: Path) -> None:
    """Read the text files next to the images with the dataset classes from sd-scripts."""
    export_version(version, "sidecar", folder / "sidecar", splits=("train",))
    read = run_peer("kohya_peer.py", [str(folder / "sidecar/train")], checkout)
    images = f"{read['images']} of {version.manifest['rows']['train']} images"
    print(
        f"sd-scripts: {images}, {read['read']} of {read['captions']} captions; 0 lines, "
        "--caption_extension .txt"
    )


def run_peer(script: str, arguments: list[str], checkout: Path) -> dict[str, int]:
    """Run a script from `peers/` in the environment of a checkout. Returns its counts."""
    command = [str(checkout / ".venv/bin/python"), str(PEERS / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Generate a version, and read it with each available loader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanovlm", type=Path, help="a checkout of huggingface/nanoVLM")
    parser.add_argument("--llava", type=Path, help="a checkout of haotian-liu/LLaVA with its .venv")
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts with its .venv")
    parser.add_argument("--images", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = generate_dataset(resolve(source="scenes", limit=options.images), folder / "data").version
        if find_spec("open_clip_train"):
            read_with_open_clip(version, folder)
        if options.nanovlm:
            read_with_nanovlm(version, folder, options.nanovlm)
        if options.llava:
            read_with_llava(version, folder, options.llava)
        if options.kohya:
            read_with_kohya(version, folder, options.kohya)


if __name__ == "__main__":
    main()
