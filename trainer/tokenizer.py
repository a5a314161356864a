"""Convert texts to token ids and back: the decoder's prompt, and the target that it learns to generate.

trainer/prompts.py chooses and builds prompts.
"""

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from trainer.prompts import ANSWER, preferred_source, preferred_style, prompt_ids, prompt_parts
from trainer.runtime.checkpoint_folder import require_learned

PAD, EOS = "<pad>", "<eos>"
PAD_ID, EOS_ID = 0, 1
ENCODED_TEXTS = 10_000
MAX_DEFAULT_TOKENS, TOKEN_STEP = 256, 16
SENTENCE_END = re.compile(r"[.!?](?=\s)|[\u3002\uff01\uff1f]")


@dataclass(frozen=True, slots=True)
class TargetText:
    """One text about an image: a caption in some style, or the answer to a question."""

    source: str
    text: str
    style: str = ""
    question: str = ""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The token ids of one text about an image. `target` ends with EOS, unless it was truncated."""

    prompt: "array[int]"
    target: "array[int]"
    weight: float = 1.0

    @classmethod
    def of(cls, prompt: Sequence[int], target: Sequence[int], weight: float = 1.0) -> "EncodedText":
        """Store token ids as arrays, which need less memory than lists."""
        return cls(array("i", prompt), array("i", target), weight)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """A right-padded batch of C texts with at most T tokens. Texts about one image are adjacent.

    `ids_CT` holds prompt, target and EOS. `prompt_C` is the number of prompt tokens, and `length_C` that of
    all tokens without padding. `weight_C` is the weight in the loss.
    """

    image_of_C: Tensor
    ids_CT: Tensor
    prompt_C: Tensor
    length_C: Tensor
    weight_C: Tensor

    @property
    def learned_CT(self) -> Tensor:
        """The loss mask for `ids_CT[:, 1:]`, False for prompt and padding: (C, T - 1)."""
        after_T = torch.arange(1, self.ids_CT.shape[1], device=self.ids_CT.device)
        return (after_T >= self.prompt_C[:, None]) & (after_T < self.length_C[:, None])

    @property
    def total_weight(self) -> float:
        """The sum of the weights of all target tokens."""
        return float((self.learned_CT.sum(1) * self.weight_C).sum())

    def to(self, device: torch.device) -> "TextBatch":
        """Move all tensors to a device."""
        return TextBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """The tokenizer of a language model, or one trained from scratch with tokens for sources and styles."""

    backend: Tokenizer
    kind: Literal["scratch", "pretrained"]
    eos_id: int

    def prompt(self, text: TargetText) -> list[int]:
        """Return the token ids of a text's prompt."""
        parts = prompt_parts(self.kind, text.source, text.style, text.question)
        return prompt_ids(parts, self._special_id, self._ids)

    def encode(self, text: TargetText, max_tokens: int | None, weight: float = 1.0) -> EncodedText:
        """Encode prompt and target.

        A target longer than `max_tokens` is cut after the last sentence that fits. If none fits, it is
        truncated and has no EOS.
        """
        whole = self._target_text(text)
        encoding = self.backend.encode(whole, add_special_tokens=False)
        target = [*encoding.ids, self.eos_id]
        if max_tokens is not None and len(target) > max_tokens:
            first_cut = encoding.offsets[max_tokens - 1][0]
            ends = [match.end() for match in SENTENCE_END.finditer(whole) if match.end() <= first_cut]
            shorter = ([*self._ids(whole[:end]), self.eos_id] for end in reversed(ends))
            target = next((ids for ids in shorter if len(ids) <= max_tokens), target[:max_tokens])
        return EncodedText.of(self.prompt(text), target, weight)

    def count_tokens(self, texts: Sequence[TargetText]) -> list[int]:
        """Return the number of target tokens of each text, including EOS."""
        counts: list[int] = []
        for start in range(0, len(texts), ENCODED_TEXTS):
            part = [self._target_text(text) for text in texts[start : start + ENCODED_TEXTS]]
            encodings = self.backend.encode_batch(part, add_special_tokens=False)
            counts += [len(encoding.ids) + 1 for encoding in encodings]
        return counts

    def choose_max_tokens(self, texts: Sequence[TargetText]) -> int:
        """Return the default of `max_caption_tokens` for training texts (see TrainConfig)."""
        by_style: dict[str, list[int]] = defaultdict(list)
        for text, count in zip(texts, self.count_tokens(texts), strict=True):
            by_style[text.style].append(count)
        longest = max(np.percentile(counts, 99) for counts in by_style.values())
        return min(MAX_DEFAULT_TOKENS, TOKEN_STEP * math.ceil(longest / TOKEN_STEP))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self.backend.decode(list(ids))).strip()

    def with_prompts(self, texts: Iterable[TargetText]) -> "CaptionTokenizer":
        """Return a tokenizer with a token for each source and style of `texts`. Existing ids stay."""
        # The prompts of a language model are plain text.
        if self.kind == "pretrained":
            return self
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens(_prompt_tokens(texts))
        backend.encode_special_tokens = True
        return CaptionTokenizer(backend, self.kind, self.eos_id)

    def _target_text(self, text: TargetText) -> str:
        return f" {text.text}" if self.kind == "pretrained" else text.text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _special_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        assert token_id is not None, f"the tokenizer was not trained on {token}"
        return int(token_id)


def require_known_tokens(backend: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer can produce tokens without an embedding in the decoder.

    Special tokens are ignored, because they never occur in an encoded text.
    """
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    largest = max((number for number in backend.get_vocab().values() if number not in special), default=-1)
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer has {largest + 1:,} tokens, but the decoder has {vocab_size:,}")


def collate(texts: Sequence[Sequence[EncodedText]]) -> TextBatch:
    """Build one batch from the texts of each image."""
    pairs = [(image, text) for image, image_texts in enumerate(texts) for text in image_texts]
    rows = [text.prompt + text.target for _, text in pairs]
    ids_CT = np.full((len(rows), max(map(len, rows), default=1)), PAD_ID, dtype=np.int64)
    for row, ids in zip(ids_CT, rows, strict=True):
        row[: len(ids)] = ids
    return TextBatch(
        torch.tensor([image for image, _ in pairs], dtype=torch.long),
        torch.from_numpy(ids_CT),
        torch.tensor([len(text.prompt) for _, text in pairs]),
        torch.tensor([len(row) for row in rows]),
        torch.tensor([text.weight for _, text in pairs]),
    )


def train_tokenizer(texts: Iterable[TargetText], vocab_size: int) -> CaptionTokenizer:
    """Train a byte-level BPE tokenizer with special tokens for sources and styles."""
    texts = list(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, ANSWER, *_prompt_tokens(texts)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for part in (text.question, text.text) if part)
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.encode_special_tokens = True  # "<eos>" in a caption must not become EOS
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)) == (PAD_ID, EOS_ID)
    return CaptionTokenizer(tokenizer, "scratch", EOS_ID)


def _prompt_tokens(texts: Iterable[TargetText]) -> list[str]:
    """Return the tokens for sources and styles, sources first."""
    pairs = {(text.source, text.style) for text in texts}
    sources, styles = ({pair[index] for pair in pairs} for index in (0, 1))
    return [f"<{name}>" for name in (*sorted(sources), *sorted(styles - {""}))]


def scored_prompt(prompts: list[tuple[str, str]], style: str | None = None) -> tuple[str, str]:
    """Return source and style for a caption prompt. Without `style`, the preferred style is used.

    Raises TrainError if the captioner has not learned the style.
    """
    require_learned(prompts, style)
    chosen = style or preferred_style(prompts) or ""
    return preferred_source(prompts, chosen) or "", chosen
