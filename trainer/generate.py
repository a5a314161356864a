"""Captions and answers from a trained captioner."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import ImageError, TrainError
from pipeline.images.decode import prepare_image
from trainer.checkpoint import Checkpoint
from trainer.data import Example
from trainer.features import FeatureSource
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.tokenizer import TargetText

BATCH_IMAGES = 64


def write_captions(
    checkpoint: Checkpoint, states: Sequence[Tensor], prompt: TargetText, search: DecodingConfig = GREEDY
) -> list[str]:
    """Write one text after a prompt for each batch of hidden states (B, N, V), in order."""
    captioner, words = checkpoint.captioner.eval(), checkpoint.words
    prompt_T = torch.tensor(words.prompt(prompt))
    return [
        words.decode(ids)
        for states_BNV in states
        for ids in captioner.generate(states_BNV, prompt_T.expand(len(states_BNV), -1), search)
    ]


def answer_questions(
    checkpoint: Checkpoint,
    states_of: FeatureSource,
    asked: Sequence[tuple[Example, str]],
    source: str,
    search: DecodingConfig = GREEDY,
) -> list[str]:
    """Answer a question about each image, in order; questions of one length go through the model together."""
    words = checkpoint.words
    prompts = [words.prompt(TargetText(source, "", question=question)) for _, question in asked]
    answers = [""] * len(asked)
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [at for at, prompt in enumerate(prompts) if len(prompt) == length]
        for first in range(0, len(places), BATCH_IMAGES):
            batch = places[first : first + BATCH_IMAGES]
            with torch.inference_mode():
                states_BNV = states_of([asked[at][0] for at in batch])
            prompt_BT = torch.tensor([prompts[at] for at in batch], device=states_BNV.device)
            for at, ids in zip(batch, checkpoint.captioner.eval().generate(states_BNV, prompt_BT, search), strict=True):
                answers[at] = words.decode(ids)
    return answers


def describe_files(
    checkpoint: Checkpoint, paths: list[Path], style: str | None = None, question: str = "", search: DecodingConfig = GREEDY
) -> list[str]:
    """Write a caption for each image file, or the answer to a question about it, in their order.

    Raises:
        TrainError: a file cannot be read, or nothing of the kind was learned.
    """
    prompts, encoder = checkpoint.captioner.config.prompts, checkpoint.captioner.encoder
    source, wanted = answering_prompt(prompts) if question else scored_prompt(prompts, style)
    prompt = TargetText(source, "", style=wanted, question=question)
    device = next(encoder.parameters()).device
    written = []
    for first in range(0, len(paths), BATCH_IMAGES):
        images = []
        for path in paths[first : first + BATCH_IMAGES]:
            try:
                images.append(prepare_image(path.read_bytes()))
            except (OSError, ImageError) as error:
                raise TrainError(f"cannot read {path}: {error}", hint="pass image files") from None
        with torch.inference_mode():
            states_BNV = encoder(encoder.pixels(images).to(device))
        written += write_captions(checkpoint, [states_BNV], prompt, search)
    return written


def scored_prompt(prompts: list[tuple[str, str]], style: str | None = None) -> tuple[str, str]:
    """Return source and style that are asked for: brief as people caption, unless told; people's words where some were learned.

    Raises:
        TrainError: nothing of that style was learned.
    """
    styles = list(dict.fromkeys(known for _, known in prompts if known))
    wanted = style or ("brief" if "brief" in styles else styles[0])
    sources = [source for source, known in prompts if known == wanted]
    if not sources:
        raise TrainError(f"the captioner knows no style {wanted}", hint=f"it was trained on: {', '.join(styles)}")
    return ("human" if "human" in sources else sources[0]), wanted


def answering_prompt(prompts: list[tuple[str, str]]) -> tuple[str, str]:
    """Return whose answers are asked for, with an empty style. Raises TrainError where none were learned."""
    sources = [source for source, style in prompts if not style]
    if not sources:
        raise TrainError("the captioner has learned no answers", hint="train on a version with questions")
    return ("human" if "human" in sources else sources[0]), ""
