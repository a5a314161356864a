"""Self-critical sequence training (Rennie et al., 2017): raise the likelihood of captions with a high reward.

Several captions are sampled per image. A caption's reward is its CIDEr-D against the training captions of the
image. The baseline is the mean reward of the image's other samples (Luo, 2020). EOS counts as a word, because
otherwise the captioner learns to end captions in "with a".

Shapes: B images, N hidden states, V encoder width, C sampled captions, C = B * num_samples.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.data import Example
from trainer.metrics import Rarity, Tokens, cider_d, tokenize
from trainer.model.checkpoint import Checkpoint
from trainer.model.decoding import DecodingConfig
from trainer.tokenizer import EOS, EncodedText, TargetText, TextBatch, collate, scored_prompt

SAMPLING = DecodingConfig(temperature=1.0)


class SelfCritic:
    """Samples captions, and computes their rewards."""

    def __init__(self, checkpoint: Checkpoint, train_set: Sequence[Example], num_samples: int) -> None:
        self.checkpoint, self.num_samples = checkpoint, num_samples
        source, style = scored_prompt(checkpoint.captioner.config.prompts)
        self.prompt = checkpoint.tokenizer.prompt(TargetText(source, "", style=style))
        self.references: dict[str, list[Tokens]] = {}
        for example in train_set:
            scored = [text for text in example.texts if (text.source, text.style) == (source, style)]
            self.references[example.sample_id] = [[*tokenize(text.text), EOS] for text in scored]
        self.rarity = Rarity([texts for texts in self.references.values() if texts])

    def sample(self, states_BNV: Tensor, examples: Sequence[Example]) -> tuple[TextBatch, list[float]]:
        """Sample captions in evaluation mode. Returns the captions and their rewards.

        Captions are weighted by their advantages. The reward is 0 if an image has no references.
        """
        captioner, tokenizer = self.checkpoint.captioner.eval(), self.checkpoint.tokenizer
        prompt_CT = torch.tensor(self.prompt).expand(len(examples) * self.num_samples, -1)
        captions = captioner.generate(states_BNV.repeat_interleave(self.num_samples, 0), prompt_CT, SAMPLING)
        max_tokens = captioner.max_new_tokens(states_BNV.shape[1], len(self.prompt))
        hypotheses: list[Tokens] = []
        texts: list[EncodedText] = []
        for ids in captions:
            has_ended = len(ids) < max_tokens
            hypotheses.append([*tokenize(tokenizer.decode(ids)), *([EOS] if has_ended else [])])
            target = [*ids, captioner.config.eos_id] if has_ended else ids
            texts.append(EncodedText.of(self.prompt, target))
        references = [self.references[e.sample_id] for e in examples for _ in range(self.num_samples)]
        rewards = cider_d(hypotheses, references, rarity=self.rarity)
        starts = range(0, len(texts), self.num_samples)
        by_image = [texts[start : start + self.num_samples] for start in starts]
        # The advantage is the reward minus the mean reward of the other samples for the same image.
        rewards_BS = torch.tensor(rewards).view(-1, self.num_samples)
        gaps_BS = rewards_BS - rewards_BS.mean(1, keepdim=True)
        advantages_BS = gaps_BS * self.num_samples / (self.num_samples - 1)
        return replace(collate(by_image), weight_C=advantages_BS.flatten()), rewards
