"""Score a captioner on held-out images, and again with the images shuffled.

A captioner that ignores its image scores as well on another one. The second score shows that at once.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from pipeline.errors import ImageError, TrainError
from pipeline.image import prepare_image
from trainer.checkpoint import Checkpoint
from trainer.data import Example, start_token
from trainer.metrics import score, tokenize

BATCH_IMAGES = 64
SHOWN = 12


def write_captions(checkpoint: Checkpoint, images: Sequence[Callable[[], Image]], style: str) -> list[str]:
    """Write one caption of a style for each image, greedily; images are opened when they are needed.

    Raises:
        TrainError: the captioner was not trained on that style.
    """
    start_id = checkpoint.tokenizer.token_to_id(start_token(style))
    if start_id is None:
        known = ", ".join(checkpoint.captioner.config.styles)
        raise TrainError(f"the captioner knows no style {style}", hint=f"it was trained on: {known}")
    captioner, captions = checkpoint.captioner, []
    captioner.eval()
    for at in range(0, len(images), BATCH_IMAGES):
        pixels_BCHW = captioner.encoder.pixels([open_image() for open_image in images[at : at + BATCH_IMAGES]])
        captions += [checkpoint.tokenizer.decode(ids).strip() for ids in captioner.generate(pixels_BCHW, start_id)]
    return captions


def caption_files(checkpoint: Checkpoint, paths: list[Path], style: str | None = None) -> list[str]:
    """Write a caption for each image file, in their order.

    Raises:
        TrainError: a file cannot be read, or the style is unknown.
    """

    def open_file(path: Path) -> Image:
        try:
            return prepare_image(path.read_bytes())
        except (OSError, ImageError) as error:
            raise TrainError(f"cannot read {path}: {error}", hint="pass image files") from None

    style = style or scored_style(checkpoint.captioner.config.styles)
    return write_captions(checkpoint, [partial(open_file, path) for path in paths], style)


def scored_style(styles: list[str]) -> str:
    """Return the style that is written and scored unless another is asked for: brief, as people caption."""
    return "brief" if "brief" in styles else styles[0]


def evaluate(checkpoint: Checkpoint, examples: list[Example], style: str) -> dict[str, Any]:
    """Return scores against the references of the source, or, where it has none, against the captions it was given.

    `scores` are of each image's own caption, `shuffled_scores` of the caption of another image.
    """
    against, examples, references = _references(examples, style)
    hypotheses = write_captions(checkpoint, [example.open for example in examples], style)
    tokens = [tokenize(text) for text in hypotheses]
    return {
        "images": len(examples),
        "style": style,
        "against": against,
        "scores": score(tokens, references),
        # Greedy captions depend on the image alone: shuffling the images is shuffling the captions.
        "shuffled_scores": score([tokens[other] for other in derangement(len(tokens))], references),
        "shown": [
            {"sample_id": example.sample_id, "caption": text, "references": [" ".join(r) for r in mine[:5]]}
            for example, text, mine in list(zip(examples, hypotheses, references, strict=True))[:SHOWN]
        ],
    }


def derangement(count: int) -> list[int]:
    """Return an order, always the same, in which nothing is at its own place (for `count` above 1)."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[place] for place in range(count)]


def _references(examples: list[Example], style: str) -> tuple[str, list[Example], list[list[list[str]]]]:
    """Return what is scored against, and the examples that have it: a caption may have been rejected on the way."""
    against = "references of the source"
    mine = [(example, list(example.references)) for example in examples if example.references]
    if not mine:
        against = "captions of the teacher"
        mine = [(example, [text for kind, text in example.captions if kind == style]) for example in examples]
    mine = [(example, texts) for example, texts in mine if texts]
    if not mine:
        raise TrainError(f"no held-out image has a reference or a {style} caption", hint="choose another style")
    return against, [example for example, _ in mine], [[tokenize(text) for text in texts] for _, texts in mine]


@torch.no_grad()
def validation_loss(checkpoint: Checkpoint, batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> float:
    """Return the mean loss over prepared batches of (pixels, image of each caption, ids)."""
    checkpoint.captioner.eval()
    losses = [checkpoint.captioner.loss(*batch).item() for batch in batches]
    return sum(losses) / len(losses)
