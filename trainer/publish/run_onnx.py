"""Caption images with onnxruntime, tokenizers, NumPy and Pillow: `python caption.py IMAGE...`

Keep this file in the folder of the exported captioner, next to `onnx/`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from pipeline.images.upright import upright_rgb
from trainer.prompts import choose_prompt, prompt_ids, prompt_parts

Array = np.ndarray[Any, Any]
PARTS = ("encoder_model", "decoder_model", "decoder_with_past_model")


class OnnxCaptioner:
    """An exported captioner."""

    def __init__(self, folder: Path) -> None:
        files = [folder / "onnx" / f"{part}.onnx" for part in PARTS]
        self.encoder, self.first, self.following = (
            onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]) for file in files
        )
        self.config, self.pixels, processor = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "preprocessor_config.json", "processor_config.json")
        )
        self.prompts, self.kind = [tuple(prompt) for prompt in processor["prompts"]], processor["kind"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # In a question, treat the names of special tokens as plain text.
        self.tokenizer.encode_special_tokens = True

    def caption(self, images: list[Any], text: str = "") -> list[str]:
        """Return texts for images (PIL or paths). For `text`, see `choose_prompt`."""
        token_ids = self.tokens(self.prepare(images), self.prompt(text))
        return [self.tokenizer.decode(ids).strip() for ids in token_ids]

    def tokens(self, pixels: Array, prompt: list[int]) -> list[list[int]]:
        """Generate texts greedily for a prompt and prepared images (B, 3, H, W). Returns their token ids."""
        eos, texts = self.config["eos_id"], np.zeros((len(pixels), 0), np.int64)
        ended = np.zeros(len(pixels), bool)
        (states,) = self.encoder.run(None, {"pixel_values": pixels})
        ids = np.tile(np.array(prompt, np.int64), (len(pixels), 1))
        logits, past = _run_step(self.first, {"input_ids": ids, "encoder_hidden_states": states})
        for _ in range(self.config["max_caption_tokens"]):
            ids = np.where(ended, eos, logits[:, -1].argmax(-1)).astype(np.int64)[:, None]
            ended |= ids[:, 0] == eos
            texts = np.concatenate([texts, ids], 1)
            if ended.all():
                break
            logits, grown = _run_step(self.following, {"input_ids": ids, **past})
            past |= grown
        return [[token for token in row if token != eos] for row in texts.tolist()]

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt. Raises ValueError for a style that was not learned."""
        parts = prompt_parts(self.kind, *choose_prompt(self.prompts, text))
        return prompt_ids(parts, self._special, self._ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return int(token_id)

    def prepare(self, images: list[Any]) -> Array:
        """Return the pixels of images (PIL or paths) for the encoder: (B, 3, H, W)."""
        return np.stack([prepare(image, self.pixels) for image in images])


def _run_step(session: Any, inputs: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Run a decoder part. Returns its logits, and its keys and values under their names as next inputs."""
    logits, *present = session.run(None, inputs)
    names = [output.name.replace("present", "past_key_values") for output in session.get_outputs()]
    return logits, dict(zip(names[1:], present, strict=True))


def prepare(image: Any, settings: dict[str, Any]) -> Array:
    """Return an image (PIL or a path) upright, resized, cropped and normalized: (3, H, W)."""
    with image if isinstance(image, Image.Image) else Image.open(image) as opened:
        image = upright_rgb(opened)
    if settings["do_resize"]:
        image = image.resize(_target_size(image, settings["size"]), Image.Resampling(settings["resample"]))
    if settings["do_center_crop"]:
        height, width = settings["crop_size"]["height"], settings["crop_size"]["width"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values: Array = np.asarray(image, np.float32)
    if settings["do_rescale"]:
        values = values * np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        mean, std = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
        values = (values - mean) / std
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _target_size(image: Image.Image, size: dict[str, int]) -> tuple[int, int]:
    """Return the resized (width, height): fixed, or scaled to the given shortest edge."""
    if "height" in size:
        return size["width"], size["height"]
    shortest = size["shortest_edge"]
    # Multiply first, as transformers does: 224 / 277 * 277 is less than 224.
    if image.width <= image.height:
        return shortest, int(shortest * image.height / image.width)
    return int(shortest * image.width / image.height), shortest


def main() -> None:
    """Print a caption for each image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--text", default="", help="a style, a question or a request")
    arguments = parser.parse_args()
    try:
        captioner = OnnxCaptioner(Path(__file__).parent)
        captioner.prompt(arguments.text)
    except ValueError as error:
        parser.error(str(error))
    has_failed = False
    for image in arguments.images:
        try:
            print(f"{image}: {captioner.caption([image], arguments.text)[0]}")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"cannot read {image}: {error}", file=sys.stderr)
            has_failed = True
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
