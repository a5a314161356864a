"""What a captioner looks at: the attention of each word over the image, and other texts that it might have written."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.errors import ImageError, TrainError
from trainer.captioning import Captioner, Picture
from trainer.model.states import patch_grid
from trainer.tokenizer import CaptionTokenizer

TILE_PX, LABEL_PX, TILES_IN_ROW = 224, 26, 5
BEAMS = 4  # alternatives
PART_OF_CHARACTER = "\ufffd"  # to which the bytes of a character that has not ended are decoded
GLOW = (255, 120, 0)  # over what is attended to
MAX_GLOW = 0.75  # of the color of a pixel
DARK = 0.45  # of the brightness that is left where nothing is attended to


@dataclass(frozen=True, slots=True)
class LookedAt:
    """A word, and how much of its attention goes to each cell of the image: (rows, columns), which sum to at most 1."""

    word: str
    shares: np.ndarray


@dataclass(frozen=True, slots=True)
class Look:
    """A text about an image: what each word looks at, the image as the encoder sees it, and the likeliest texts, best first.

    The likelihood of a text is the mean log-probability of its tokens.
    """

    text: str
    words: list[LookedAt]
    seen: Image.Image
    alternatives: list[tuple[str, float]]

    def values(self) -> dict[str, Any]:
        """Return all but the image as JSON holds it."""
        return {
            "text": self.text,
            "words": [{"word": one.word, "shares": one.shares.round(4).tolist()} for one in self.words],
            "alternatives": [{"text": text, "likelihood": round(score, 4)} for text, score in self.alternatives],
        }


@torch.inference_mode()
def look(captioner: Captioner, picture: Picture, style: str | None = None, question: str = "", beams: int = BEAMS) -> Look:
    """Return what a captioner writes about an image, greedily, and what it looks at for each word.

    Raises TrainError if the image cannot be read, or the encoder has no grid of states.
    """
    pixels_CHW = captioner.prepare(picture)
    if isinstance(pixels_CHW, ImageError):
        raise TrainError(f"cannot read the image: {pixels_CHW}", hint="pass an image file")
    model, tokenizer = captioner.checkpoint.captioner, captioner.checkpoint.tokenizer
    device = next(model.connector.parameters()).device
    memory_1ND = model.connector(model.encoder(pixels_CHW[None].to(device)))
    prompt = captioner.prompt(style, question)
    prompt_1T = torch.tensor([prompt], device=device)
    (written,) = captioner.write(pixels_CHW[None], [prompt])
    ids_1T = torch.tensor([[*prompt, *written]], device=device)
    shares_TN = model.decoder.attention_to_image(ids_1T, memory_1ND)[len(prompt) - 1 : -1]  # of what predicts each token
    texts: dict[str, float] = {}
    most, eos_id = model.config.max_caption_tokens, model.config.eos_id
    for score, ids in model.decoder.alternatives(memory_1ND, prompt_1T, beams, most, eos_id):
        texts.setdefault(tokenizer.decode(ids), score)
    return Look(
        text=tokenizer.decode(written),
        words=[LookedAt(word, _grid(shares_TN[first:last].mean(0))) for word, first, last in spans(tokenizer, written)],
        seen=_image_of(pixels_CHW, captioner),
        alternatives=list(texts.items())[:beams],
    )


def spans(tokenizer: CaptionTokenizer, ids: list[int]) -> list[tuple[str, int, int]]:
    """Return the words of a text with the first and the last token (exclusive) of each."""
    words: list[tuple[str, int, int]] = []
    before, begin = "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.backend.decode(ids[:end]).lstrip()
        if text.endswith(PART_OF_CHARACTER) and end < len(ids):
            continue  # the next token has the rest
        piece, before = text[len(before) :], text
        if not words or piece[:1].isspace():
            words.append((piece.strip(), begin, end))
        else:
            word, first, _ = words[-1]
            words[-1] = word + piece, first, end
        begin = end
    return words


def draw(shown: Look) -> Image.Image:
    """Return a picture of a look: the image, then a tile for each word in which what it looks at glows."""
    tiles = [("", None), *((looked.word, looked.shares) for looked in shown.words)]
    rows = math.ceil(len(tiles) / TILES_IN_ROW)
    sheet = Image.new("RGB", (TILES_IN_ROW * TILE_PX, rows * (TILE_PX + LABEL_PX)), "white")
    pen, font, image = ImageDraw.Draw(sheet), ImageFont.load_default(16), shown.seen.resize((TILE_PX, TILE_PX))
    for number, (word, shares) in enumerate(tiles):
        x, y = number % TILES_IN_ROW * TILE_PX, number // TILES_IN_ROW * (TILE_PX + LABEL_PX)
        sheet.paste(image if shares is None else glowing(image, shares), (x, y))
        pen.text((x + 4, y + TILE_PX + 3), word, fill="black", font=font)
    return sheet


def glowing(image: Image.Image, shares: np.ndarray) -> Image.Image:
    """Return an image that is dark but where attention lies."""
    strength = Image.fromarray((255 * shares / max(shares.max(), 1e-9)).astype(np.uint8)).resize(
        image.size, Image.Resampling.BICUBIC
    )
    weight = np.asarray(strength, dtype=np.float32)[..., None] / 255
    pixels = np.asarray(image, dtype=np.float32) * (DARK + (1 - DARK) * weight)
    glow = MAX_GLOW * weight**2
    return Image.fromarray((pixels * (1 - glow * 0.5) + np.array(GLOW, np.float32) * glow * 0.5).clip(0, 255).astype(np.uint8))


def _grid(shares_N: Tensor) -> np.ndarray:
    """Return the shares of the patches as a grid, without those of tokens before them. Raises TrainError if there is none."""
    try:
        before, side = patch_grid(len(shares_N))
    except ValueError as error:
        raise TrainError(str(error), hint="look needs all states of a ViT or CLIP, or 2x2") from None
    grid: np.ndarray = shares_N[before:].view(side, side).float().cpu().numpy()
    return grid


def _image_of(pixels_CHW: Tensor, captioner: Captioner) -> Image.Image:
    """Return the image that an encoder sees, after it was resized, cropped and normalized."""
    processor: Any = captioner.checkpoint.captioner.encoder.processor
    is_normalized = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if is_normalized else ([0.0] * 3, [1.0] * 3)
    pixels_HWC = (pixels_CHW.cpu().permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)
    return Image.fromarray((pixels_HWC * 255).round().byte().numpy())
