"""Generate captions and answers with a trained captioner."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer.checkpoint import Checkpoint
from trainer.data import Example
from trainer.features import BATCH_IMAGES, FeatureSource
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.tokenizer import TargetText


def generate_captions(
    checkpoint: Checkpoint, states: Iterable[Tensor], prompt: TargetText, decoding: DecodingConfig
) -> list[str]:
    """Generate one text per image after a shared prompt, for batches of hidden states (B, N, V), in order."""
    captioner, prompt_T = checkpoint.captioner.eval(), torch.tensor(checkpoint.tokenizer.prompt(prompt))
    batches = [captioner.generate(states_BNV, prompt_T.expand(len(states_BNV), -1), decoding) for states_BNV in states]
    return [checkpoint.tokenizer.decode(ids) for batch in batches for ids in batch]


def answer_questions(
    checkpoint: Checkpoint, features: FeatureSource, pairs: Sequence[tuple[Example, str]], source: str
) -> list[str]:
    """Answer one question per example, in order; prompts of the same length are batched together."""
    prompts = [checkpoint.tokenizer.prompt(TargetText(source, "", question=question)) for _, question in pairs]
    answers = [""] * len(pairs)
    for length in sorted({len(prompt) for prompt in prompts}):
        indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(indices), BATCH_IMAGES):
            batch = indices[start : start + BATCH_IMAGES]
            with torch.inference_mode():
                states_BNV = features([pairs[index][0] for index in batch])
            prompt_BT = torch.tensor([prompts[index] for index in batch], device=states_BNV.device)
            for index, ids in zip(batch, checkpoint.captioner.eval().generate(states_BNV, prompt_BT, GREEDY), strict=True):
                answers[index] = checkpoint.tokenizer.decode(ids)
    return answers
