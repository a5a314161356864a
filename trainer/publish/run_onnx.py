"""Caption images with onnxruntime, tokenizers, NumPy and Pillow alone: `python caption.py [--int8] IMAGE...`

This file lies beside the exported captioner, in the folder that holds `onnx/`.
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
from trainer.tokenizer import choose_prompt, prompt_ids, prompt_parts

Array = np.ndarray[Any, Any]


class OnnxCaptioner:
    """An exported captioner; `int8` takes the parts with weights of 8 bits, if they were exported."""

    def __init__(self, folder: Path, *, int8: bool = False) -> None:
        suffix = "_quantized" if int8 else ""
        parts = ("encoder_model", "decoder_model", "decoder_with_past_model")
        if int8 and not (folder / "onnx" / f"encoder_model{suffix}.onnx").exists():
            raise ValueError("there are no parts with weights of 8 bits: export the captioner with --int8")
        options = {"providers": ["CPUExecutionProvider"]}
        self.encoder, self.first, self.following = (
            onnxruntime.InferenceSession(str(folder / "onnx" / f"{part}{suffix}.onnx"), **options) for part in parts
        )
        self.config, self.pixels, processor = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "preprocessor_config.json", "processor_config.json")
        )
        self.prompts, self.kind = [tuple(prompt) for prompt in processor["prompts"]], processor["kind"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # the name of a token in a question is not the token

    def caption(self, images: list[Any], text: str = "") -> list[str]:
        """Return a caption of each image (PIL, or paths), of the usual style or that of a name; of a question, its answer."""
        return [self.tokenizer.decode(ids).strip() for ids in self.tokens(self.prepare(images), self.prompt(text))]

    def tokens(self, pixels: Array, prompt: list[int]) -> list[list[int]]:
        """Return the likeliest tokens after a prompt, one after the other, for prepared images (B, 3, H, W)."""
        eos, written = self.config["eos_id"], np.zeros((len(pixels), 0), np.int64)
        (states,) = self.encoder.run(None, {"pixel_values": pixels})
        ids = np.tile(np.array(prompt, np.int64), (len(pixels), 1))
        names = [output.name for output in self.first.get_outputs()]
        found = dict(zip(names, self.first.run(None, {"input_ids": ids, "encoder_hidden_states": states}), strict=True))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
        grown = [output.name for output in self.following.get_outputs()]
        logits, ended = found["logits"], np.zeros(len(pixels), bool)
        most, positions = self.config["max_caption_tokens"], self.config.get("text_positions")
        if positions is not None and len(prompt) >= positions:
            raise ValueError(f"the prompt has {len(prompt)} tokens, and behind an image there is room for {positions}")
        for _ in range(most if positions is None else min(most, positions - len(prompt))):
            chosen = np.where(ended, eos, logits[:, -1].argmax(-1)).astype(np.int64)
            ended |= chosen == eos
            written = np.concatenate([written, chosen[:, None]], 1)
            if ended.all():
                break
            values = self.following.run(None, {"input_ids": chosen[:, None], **past})
            found = dict(zip(grown, values, strict=True))
            logits = found.pop("logits")
            past |= {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return [[token for token in row if token != eos] for row in written.tolist()]

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt. Raises ValueError for a question to a captioner that answers none."""
        return prompt_ids(prompt_parts(self.kind, *choose_prompt(self.prompts, text)), self._special, self._ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token}")
        return int(token_id)

    def prepare(self, images: list[Any]) -> Array:
        """Return images upright, resized, cropped and normalized as the encoder wants them: (B, 3, H, W)."""
        return np.stack([prepare(image, self.pixels) for image in images])


def prepare(given: Any, settings: dict[str, Any]) -> Array:
    """Return an image (PIL, or a path) upright, resized, cropped and normalized: (3, H, W)."""
    with Image.open(given) if not isinstance(given, Image.Image) else given as opened:
        image = upright_rgb(opened)
    if settings["do_resize"]:
        image = image.resize(_size(image, settings["size"]), Image.Resampling(settings["resample"]))
    if settings["do_center_crop"]:
        height, width = settings["crop_size"]["height"], settings["crop_size"]["width"]
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values: Array = np.asarray(image, np.float32)
    if settings["do_rescale"]:
        values = values * np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        values = (values - np.array(settings["image_mean"], np.float32)) / np.array(settings["image_std"], np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _size(image: Image.Image, size: dict[str, int]) -> tuple[int, int]:
    """Return width and height in pixels: those of a size, or in proportion to its shortest edge."""
    if "height" in size:
        return size["width"], size["height"]
    shortest = size["shortest_edge"]
    if image.width <= image.height:  # multiplied first, as transformers does: 224 / 277 * 277 is below 224
        return shortest, int(shortest * image.height / image.width)
    return int(shortest * image.width / image.height), shortest


def main() -> None:
    """Print a caption of each image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--text", default="", help="the name of a style, or a question")
    parser.add_argument("--int8", action="store_true", help="take the parts with weights of 8 bits")
    arguments = parser.parse_args()
    try:
        captioner = OnnxCaptioner(Path(__file__).parent, int8=arguments.int8)
        captioner.prompt(arguments.text)
    except ValueError as error:
        parser.error(str(error))
    unread = 0
    for image in arguments.images:
        try:
            print(f"{image}: {captioner.caption([image], arguments.text)[0]}")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"{image} cannot be read: {error}", file=sys.stderr)
            unread += 1
    sys.exit(unread > 0)


if __name__ == "__main__":
    main()
