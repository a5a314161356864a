"""Texts to token ids and back: what a decoder is given (the prompt) and what it is to write (the target).

A prompt says whose words are wanted (of people or of a model), and either a style of caption, or a question.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PAD, EOS, ANSWER = "<pad>", "<eos>", "<answer>"
PAD_ID, EOS_ID = 0, 1  # fixed in every tokenizer that is trained here


@dataclass(frozen=True, slots=True)
class TargetText:
    """One text about an image: a caption of a style, or the answer to a question."""

    source: str
    text: str
    style: str = ""
    question: str = ""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Texts of a batch: C texts, of T tokens at most, padded on the right; those of an image stand together."""

    image_of_C: Tensor
    ids_CT: Tensor  # prompt, target, EOS
    prompt_C: Tensor  # how many tokens the prompt has
    length_C: Tensor  # how many tokens all have
    caption_C: Tensor  # whether it is a caption, and not an answer

    @property
    def learned_CT(self) -> Tensor:
        """Whether the token after each of `ids_CT[:, :-1]` is to be learned: (C, T - 1)."""
        after_T = torch.arange(1, self.ids_CT.shape[1], device=self.ids_CT.device)
        return (after_T >= self.prompt_C[:, None]) & (after_T < self.length_C[:, None])

    def only(self, chosen_C: Tensor) -> "TextBatch":
        """Return some of the texts."""
        return TextBatch(*(getattr(self, each.name)[chosen_C] for each in fields(self)))

    def by_length(self, groups: int) -> "list[TextBatch]":
        """Return the same texts in groups of about one length, each with no more padding than it needs."""
        order_C = self.length_C.argsort()
        found = [self.only(chosen) for chosen in order_C.chunk(groups)]
        return [replace(group, ids_CT=group.ids_CT[:, : int(group.length_C.max())]) for group in found]

    def to(self, device: torch.device) -> "TextBatch":
        """Move all to a device."""
        return TextBatch(*(getattr(self, each.name).to(device) for each in fields(self)))


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """How one decoder reads and writes: a tokenizer of our own, with a token for each kind, or that of a language model."""

    tokenizer: Tokenizer
    kind: Literal["scratch", "pretrained"]
    eos_id: int

    def prompt(self, text: TargetText) -> list[int]:
        """Return what stands before the words that are to be written."""
        if self.kind == "pretrained":
            said = f" Question: {text.question} Answer:" if text.question else f" A {text.style} caption ({text.source}):"
            return self._ids(said)
        if text.question:
            return [self._special(text.source), *self._ids(text.question), self._special(None)]
        return [self._special(text.source), self._special(text.style)]

    def target(self, text: TargetText) -> list[int]:
        """Return the words and EOS."""
        return [*self._ids(f" {text.text}" if self.kind == "pretrained" else text.text), self.eos_id]

    def collate(self, texts: Sequence[Sequence[TargetText]], max_tokens: int) -> TextBatch:
        """Return the batch of the texts of each image; a target that is too long loses its end, and then has no EOS."""
        owned = [(at, text) for at, mine in enumerate(texts) for text in mine]
        prompts = [self.prompt(text) for _, text in owned]
        rows = [[*p, *self.target(text)[:max_tokens]] for p, (_, text) in zip(prompts, owned, strict=True)]
        return TextBatch(
            torch.tensor([at for at, _ in owned], dtype=torch.long),
            torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD_ID),
            torch.tensor([len(prompt) for prompt in prompts]),
            torch.tensor([len(row) for row in rows]),
            torch.tensor([not text.question for _, text in owned]),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of written tokens."""
        decoded: str = self.tokenizer.decode(list(ids))
        return decoded.strip()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _special(self, name: str | None) -> int:
        found = self.tokenizer.token_to_id(_token(name))
        assert found is not None, f"the tokenizer was not trained on {name}"
        return int(found)


def train_words(texts: Iterable[TargetText], vocab_size: int) -> CaptionTokenizer:
    """Learn a byte-level BPE from the texts of the training split, and from nothing else."""
    texts = list(texts)
    names = [*sorted({text.source for text in texts}), *sorted({text.style for text in texts if text.style})]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, ANSWER, *map(_token, names)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in (text.question, text.text) if part), trainer)
    tokenizer.encode_special_tokens = True  # a caption that holds the text "<eos>" does not end there
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)) == (PAD_ID, EOS_ID)
    return CaptionTokenizer(tokenizer, "scratch", EOS_ID)


def _token(name: str | None) -> str:
    return ANSWER if name is None else f"<{name}>"
