"""Generate captions and answers with a trained captioner."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import ImageError, TrainError
from pipeline.images.decode import MAX_IMAGE_BYTES, prepare_image
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from trainer.checkpoint import Checkpoint
from trainer.data import Example
from trainer.features import BATCH_IMAGES, FeatureSource
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.tokenizer import TargetText


def write_captions(checkpoint: Checkpoint, states: Iterable[Tensor], prompt: TargetText, search: DecodingConfig) -> list[str]:
    """Generate one text per image after a shared prompt, for batches of hidden states (B, N, V), in order."""
    captioner, prompt_T = checkpoint.captioner.eval(), torch.tensor(checkpoint.words.prompt(prompt))
    batches = [captioner.generate(states_BNV, prompt_T.expand(len(states_BNV), -1), search) for states_BNV in states]
    return [checkpoint.words.decode(ids) for batch in batches for ids in batch]


def answer_questions(
    checkpoint: Checkpoint, features: FeatureSource, pairs: Sequence[tuple[Example, str]], source: str
) -> list[str]:
    """Answer one question per example, in order; prompts of the same length are batched together."""
    prompts = [checkpoint.words.prompt(TargetText(source, "", question=question)) for _, question in pairs]
    answers = [""] * len(pairs)
    for length in sorted({len(prompt) for prompt in prompts}):
        indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(indices), BATCH_IMAGES):
            batch = indices[start : start + BATCH_IMAGES]
            with torch.inference_mode():
                states_BNV = features([pairs[index][0] for index in batch])
            prompt_BT = torch.tensor([prompts[index] for index in batch], device=states_BNV.device)
            for index, ids in zip(batch, checkpoint.captioner.eval().generate(states_BNV, prompt_BT, GREEDY), strict=True):
                answers[index] = checkpoint.words.decode(ids)
    return answers


def describe_files(
    checkpoint: Checkpoint, paths: list[Path], style: str | None = None, question: str = "", search: DecodingConfig = GREEDY
) -> list[str]:
    """Return a caption or answer for each file. Raises TrainError if a file is unreadable, or style or answers unknown."""
    prompts, encoder = checkpoint.captioner.config.prompts, checkpoint.captioner.encoder
    source, prompt_style = answering_prompt(prompts) if question else scored_prompt(prompts, style)
    prompt = TargetText(source, "", style=prompt_style, question=question)
    device = next(encoder.parameters()).device
    descriptions = []
    for start in range(0, len(paths), BATCH_IMAGES):
        images = []
        for path in paths[start : start + BATCH_IMAGES]:
            try:
                images.append(prepare_image(read_regular(path, max_bytes=MAX_IMAGE_BYTES)))
            except (OSError, ImageError, UnsafeFileError) as error:
                raise TrainError(f"cannot read {path}: {error}", hint="pass image files") from None
        with torch.inference_mode():
            states_BNV = encoder(encoder.pixels(images).to(device))
        descriptions += write_captions(checkpoint, [states_BNV], prompt, search)
    return descriptions


def scored_prompt(prompts: list[tuple[str, str]], style: str | None = None) -> tuple[str, str]:
    """Return the (source, style) to prompt with: `style` or brief, human if learned. Raises TrainError if it is not learned."""
    styles = list(dict.fromkeys(learned for _, learned in prompts if learned))
    chosen = style or ("brief" if "brief" in styles else styles[0])
    sources = [source for source, learned in prompts if learned == chosen]
    if not sources:
        raise TrainError(f"the captioner knows no style {chosen}", hint=f"it was trained on: {', '.join(styles)}")
    return ("human" if "human" in sources else sources[0]), chosen


def answering_prompt(prompts: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the source of answers, with an empty style. Raises TrainError if no answers were learned."""
    sources = [source for source, style in prompts if not style]
    if not sources:
        raise TrainError("the captioner has learned no answers", hint="train on a version with questions")
    return ("human" if "human" in sources else sources[0]), ""
