"""Self-critical training (Rennie et al., 2017): captions that score above others of their image become likelier.

Some captions of each image are drawn; the reward of each is its CIDEr-D against the texts that are learned, and its baseline
the mean reward of the others (Luo, 2020). EOS counts as a word: else captions end in "with a", which no reference does.

Shapes: B images, V encoder width, C drawn captions, B times `samples`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data import Example
from trainer.metrics import Rarity, Tokens, cider_d, tokenize
from trainer.model.checkpoint import Checkpoint
from trainer.model.decoding import DecodingConfig
from trainer.tokenizer import EOS, EncodedText, TextBatch, collate, scored_prompt

DRAWN = DecodingConfig(temperature=1.0)


@dataclass(frozen=True, slots=True)
class SampledCaptions:
    """Captions that were drawn: as texts to learn, with what each is worth above the others of its image, and all rewards."""

    texts: TextBatch
    advantage_C: Tensor
    rewards: list[float]


class SelfCritic:
    """Draws captions of the style that is scored, and rewards them."""

    def __init__(self, checkpoint: Checkpoint, train: Sequence[Example], samples: int) -> None:
        self.checkpoint, self.samples = checkpoint, samples
        scored = scored_prompt(checkpoint.captioner.config.prompts)
        self.prompt = checkpoint.scored_prompt()
        self.references = {
            example.sample_id: [[*tokenize(text.text), EOS] for text in example.texts if (text.source, text.style) == scored]
            for example in train
        }
        self.rarity = Rarity([texts for texts in self.references.values() if texts])

    def draw(self, states_BNV: Tensor, examples: Sequence[Example]) -> SampledCaptions:
        """Draw captions of each image; those of an image without a text of this style are worth nothing."""
        captioner, tokenizer = self.checkpoint.captioner.eval(), self.checkpoint.tokenizer
        prompt_CT = torch.tensor(self.prompt).expand(len(examples) * self.samples, -1)
        ids = captioner.generate(states_BNV.repeat_interleave(self.samples, 0), prompt_CT, DRAWN)
        most, eos_id = captioner.most_tokens(states_BNV.shape[1], len(self.prompt)), captioner.config.eos_id
        has_ended = [len(one) < most for one in ids]
        hypotheses: list[Tokens] = [
            [*tokenize(tokenizer.decode(one)), *([EOS] if ended else [])] for one, ended in zip(ids, has_ended, strict=True)
        ]
        references = [self.references[example.sample_id] for example in examples for _ in range(self.samples)]
        rewards = cider_d(hypotheses, references, rarity=self.rarity)
        targets = [[*one, eos_id] if ended else one for one, ended in zip(ids, has_ended, strict=True)]
        texts = [EncodedText.of(self.prompt, target, is_caption=True) for target in targets]
        by_image = [texts[first : first + self.samples] for first in range(0, len(texts), self.samples)]
        return SampledCaptions(collate(by_image), torch.tensor(_advantages(rewards, self.samples)), rewards)


def _advantages(rewards: Sequence[float], samples: int) -> list[float]:
    """Return each reward less the mean of the others of its image."""
    advantages: list[float] = []
    for first in range(0, len(rewards), samples):
        own = rewards[first : first + samples]
        mean = statistics.fmean(own)
        advantages += [(reward - mean) * samples / (samples - 1) for reward in own]
    return advantages
