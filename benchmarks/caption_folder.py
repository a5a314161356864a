"""Compare `synth caption` of a folder with a bare loop over the model: images a second, and peak memory.

    python benchmarks/caption_folder.py [--images 1000]

Both run in processes of their own, one after the other, `--pairs` times; the ratio is that of each pair. The captioner has
random weights: CLIP's ViT-B/32 and a decoder of 192 x 3. Images are JPEGs of 640 x 480 px.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

BATCH = 32
BARE, FOLDER = "bare", "folder"


def peak_mb() -> float:
    """Return the peak memory of this process since it began; that of `getrusage` holds its parent's as well."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def save_captioner(folder: Path) -> None:
    """Save a captioner with random weights: CLIP ViT-B/32 and a decoder of 192 x 3."""
    from trainer.checkpoint import Checkpoint
    from trainer.model.captioner import build_captioner
    from trainer.model.decoder import DecoderConfig
    from trainer.model.encoder import load_encoder
    from trainer.tokenizer import TargetText, train_tokenizer

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=32)).save_pretrained(folder / "encoder")
    CLIPImageProcessor().save_pretrained(folder / "encoder")
    tokenizer = train_tokenizer([TargetText("human", f"A dog, number {n}.", style="brief") for n in range(2000)], 4096)
    decoder = DecoderConfig(vocab_size=tokenizer.backend.get_vocab_size(), width=192, depth=3, heads=6)
    encoder = load_encoder(str(folder / "encoder"))
    prompts = [("human", "brief")]
    captioner = build_captioner(encoder, decoder, prompts=prompts, eos_id=tokenizer.eos_id, max_caption_tokens=12, data={})
    (folder / "captioner").mkdir()
    Checkpoint(captioner, tokenizer).save(folder / "captioner")


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of noise over gradients, about as large as photos."""
    folder.mkdir()
    for number in range(count):
        noise = Image.effect_noise((640, 480), 20 + number % 40)
        Image.merge("RGB", (noise, noise.rotate(180), Image.linear_gradient("L").resize((640, 480)))).save(
            folder / f"{number:05}.jpg"
        )


def caption_bare(model: Path, photos: Path) -> float:
    """Caption images one batch after the other, with nothing around the model; return images a second."""
    from pipeline.images.decode import prepare_image
    from trainer.checkpoint import load_checkpoint
    from trainer.model.decoding import GREEDY
    from trainer.tokenizer import TargetText

    loaded = load_checkpoint(model, torch.device("cpu"))
    prompt_T = torch.tensor(loaded.tokenizer.prompt(TargetText("human", "", style="brief")))
    paths = sorted(photos.iterdir())
    start = time.monotonic()
    for first in range(0, len(paths), BATCH):
        images = [prepare_image(path.read_bytes()) for path in paths[first : first + BATCH]]
        with torch.inference_mode():
            states = loaded.captioner.encoder(loaded.captioner.encoder.pixels(images))
        for ids in loaded.captioner.generate(states, prompt_T.expand(len(images), -1), GREEDY):
            loaded.tokenizer.decode(ids)
    return len(paths) / (time.monotonic() - start)


def caption_folder(model: Path, photos: Path) -> float:
    """Caption a folder to a file, as `synth caption` does; return images a second."""
    from pipeline.progress import NullProgress
    from trainer import Captioner
    from trainer.caption_files import find_images
    from trainer.caption_images import CaptionTask, caption_images

    captioner = Captioner.from_pretrained(model, device="cpu")
    start = time.monotonic()
    images = find_images([str(photos)])
    job = CaptionTask(captioner, images, ("brief",), batch_size=BATCH)
    out = photos.parent / "captions.jsonl"
    caption_images(job, out, "overwrite", model, NullProgress(), lambda row: None)
    return len(images) / (time.monotonic() - start)


def main() -> None:
    """Measure pairs in processes of their own, or one of a pair in this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        which, model, photos = arguments.measure
        speed = (caption_bare if which == BARE else caption_folder)(Path(model), Path(photos))
        print(json.dumps({"speed": speed, "peak_mb": peak_mb()}))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_captioner(root)
        write_images(root / "photos", arguments.images)
        found: dict[str, list[dict[str, float]]] = {BARE: [], FOLDER: []}
        for _ in range(arguments.pairs):
            for which, results in found.items():
                command = [sys.executable, __file__, "--measure", which, str(root / "captioner"), str(root / "photos")]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        ratios = [ours["speed"] / bare["speed"] for bare, ours in zip(found[BARE], found[FOLDER], strict=True)]
        for which, results in found.items():
            speeds = ", ".join(f"{one['speed']:.1f}" for one in results)
            print(f"{which}: {speeds} images/s, at most {max(one['peak_mb'] for one in results):,.0f} MB")
        print(f"ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
