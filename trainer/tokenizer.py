"""Convert texts to token ids and back: the prompt of a decoder, and the target that it learns to write.

A prompt names a source, human or synthetic, and either a style of captions or a question. `prompts` are the pairs of source and
style that a captioner has learned; the style of answers is "". A published captioner has a copy of the functions that choose
and write a prompt (trainer/publish/captioner_package.py): they need no package.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from pipeline.errors import TrainError

PAD, EOS = "<pad>", "<eos>"
COUNTED_TEXTS = 10_000  # encoded at once
PAD_ID, EOS_ID = 0, 1  # fixed in every tokenizer that is trained here


@dataclass(frozen=True, slots=True)
class TargetText:
    """One text about an image: a caption of a style, or the answer to a question."""

    source: str
    text: str
    style: str = ""
    question: str = ""


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The token ids of one text about an image."""

    prompt: "array[int]"
    target: "array[int]"  # with EOS at its end, unless it was cut
    is_caption: bool

    @classmethod
    def of(cls, prompt: Sequence[int], target: Sequence[int], *, is_caption: bool) -> "EncodedText":
        """Return the text of these tokens."""
        return cls(array("i", prompt), array("i", target), is_caption)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """A batch of C texts of at most T tokens, padded on the right; texts of one image are adjacent."""

    image_of_C: Tensor
    ids_CT: Tensor  # prompt, target, EOS
    prompt_C: Tensor  # tokens of the prompt
    length_C: Tensor  # tokens of prompt, target and EOS
    caption_C: Tensor  # True for a caption, False for an answer

    @property
    def learned_CT(self) -> Tensor:
        """Return the loss mask of `ids_CT[:, 1:]`, which excludes prompt and padding: (C, T - 1)."""
        after_T = torch.arange(1, self.ids_CT.shape[1], device=self.ids_CT.device)
        return (after_T >= self.prompt_C[:, None]) & (after_T < self.length_C[:, None])

    def only(self, chosen_C: Tensor) -> "TextBatch":
        """Return the chosen texts."""
        return TextBatch(*(getattr(self, field.name)[chosen_C] for field in fields(self)))

    def last_token(self, states_CTD: Tensor) -> Tensor:
        """Return the state of the last token of each text: (C, D)."""
        return states_CTD[torch.arange(len(states_CTD), device=states_CTD.device), self.length_C - 1]

    def to(self, device: torch.device) -> "TextBatch":
        """Move all tensors to a device."""
        return TextBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """Tokenizer of a decoder: our own with special tokens for sources and styles, or that of a language model."""

    backend: Tokenizer
    kind: Literal["scratch", "pretrained"]
    eos_id: int

    def prompt(self, text: TargetText) -> list[int]:
        """Return the token ids of the prompt."""
        return prompt_ids(prompt_parts(self.kind, text.source, text.style, text.question), self._special, self._ids)

    def target(self, text: TargetText) -> list[int]:
        """Return the token ids of the text, and EOS."""
        return [*self._ids(f" {text.text}" if self.kind == "pretrained" else text.text), self.eos_id]

    def encode(self, text: TargetText, max_tokens: int) -> EncodedText:
        """Return the token ids of a text; a target longer than `max_tokens` is cut and has no EOS."""
        return EncodedText.of(self.prompt(text), self.target(text)[:max_tokens], is_caption=not text.question)

    def count_cut(self, texts: Sequence[TargetText], max_tokens: int) -> int:
        """Return how many targets are longer than `max_tokens`, EOS included."""
        space, cut = " " if self.kind == "pretrained" else "", 0
        for start in range(0, len(texts), COUNTED_TEXTS):
            part = [f"{space}{text.text}" for text in texts[start : start + COUNTED_TEXTS]]
            cut += sum(len(one.ids) + 1 > max_tokens for one in self.backend.encode_batch(part, add_special_tokens=False))
        return cut

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self.backend.decode(list(ids))).strip()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _special(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        assert token_id is not None, f"the tokenizer was not trained on {token}"
        return int(token_id)


def require_known_tokens(backend: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError if a text may have tokens that a decoder has not.

    Special tokens may, since no text has them (encode_special_tokens): Gemma has one for images behind the last word.
    """
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    largest = max((number for number in backend.get_vocab().values() if number not in special), default=-1)
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer has {largest + 1:,} tokens, and the decoder {vocab_size:,}")


def collate(texts: Sequence[Sequence[EncodedText]]) -> TextBatch:
    """Return one batch of the texts of each image."""
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
        torch.tensor([text.is_caption for _, text in pairs]),
    )


def train_tokenizer(texts: Iterable[TargetText], vocab_size: int) -> CaptionTokenizer:
    """Train a byte-level BPE on the texts of the training split only."""
    texts = list(texts)
    names = [*sorted({text.source for text in texts}), *sorted({text.style for text in texts if text.style})]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = [PAD, EOS, ANSWER, *(f"<{name}>" for name in names)], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((part for text in texts for part in (text.question, text.text) if part), trainer)
    tokenizer.encode_special_tokens = True  # the text "<eos>" in a caption is not the EOS token
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)) == (PAD_ID, EOS_ID)
    return CaptionTokenizer(tokenizer, "scratch", EOS_ID)


ANSWER = "<answer>"  # the token behind a question
STYLES = ("plain", "detailed", "brief", "alt", "tags", "ocr", "human")  # usual ones, whose names are no questions
Prompts = list[tuple[str, str]]


def preferred_style(prompts: list[tuple[str, str]]) -> str | None:
    """Return the usual style of captions: brief, else plain, else the first; None if only answers were learned."""
    styles = [style for _, style in prompts if style]
    return next((usual for usual in ("brief", "plain") if usual in styles), next(iter(styles), None))


def preferred_source(prompts: list[tuple[str, str]], style: str) -> str | None:
    """Return the source to name with a style: human if it was learned with it; None if the style was not learned."""
    sources = [source for source, learned in prompts if learned == style]
    return "human" if "human" in sources else next(iter(sources), None)


def choose_prompt(prompts: list[tuple[str, str]], text: str = "") -> tuple[str, str, str]:
    """Return the source, style and question of a prompt for nothing (the usual style), the name of a style, or a question.

    Raises ValueError for what was not learned.
    """
    styles = list(dict.fromkeys(style for _, style in prompts if style))
    if text in STYLES and text not in styles:
        raise ValueError(f"this captioner knows no style {text}; it was trained on {', '.join(styles) or 'answers alone'}")
    question = text if text and text not in styles else ""
    style = "" if question else text or preferred_style(prompts)
    source = None if style is None else preferred_source(prompts, style)
    if style is None:
        raise ValueError("this captioner has learned answers alone: ask it a question")
    if source is None:
        raise ValueError(f"this captioner answers no questions; it knows the styles {', '.join(styles)}")
    return source, style, question


def prompt_parts(kind: str, source: str, style: str, question: str) -> list[tuple[str, bool]]:
    """Return the parts of a prompt in order, each with whether it is the name of a token, and not a text.

    `kind` is "pretrained" for a language model, which reads words, and "scratch" for a decoder with tokens of its own.
    """
    if kind == "pretrained":
        return [(f" Question: {question} Answer:" if question else f" A {style} caption ({source}):", False)]
    if question:
        return [(f"<{source}>", True), (question, False), (ANSWER, True)]
    return [(f"<{source}>", True), (f"<{style}>", True)]


def prompt_ids(parts: list[tuple[str, bool]], token_id: Callable[[str], int], ids_of: Callable[[str], list[int]]) -> list[int]:
    """Return the token ids of the parts of a prompt, by the id of a token's name and the ids of a text."""
    return [token for part, is_token in parts for token in ([token_id(part)] if is_token else ids_of(part))]


def scored_prompt(prompts: Prompts, style: str | None = None) -> tuple[str, str]:
    """Return the (source, style) to prompt with: `style` or the usual one, human if learned.

    Raises TrainError if it is not learned.
    """
    chosen = style or preferred_style(prompts)
    source = preferred_source(prompts, chosen) if chosen else None
    if chosen is None or source is None:
        styles = dict.fromkeys(learned for _, learned in prompts if learned)
        problem = f"the captioner knows no style {chosen}" if styles else "the captioner has learned answers alone"
        raise TrainError(problem, hint=f"it was trained on: {', '.join(styles)}" if styles else "ask it something: --question")
    return source, chosen


def answering_prompt(prompts: Prompts) -> tuple[str, str]:
    """Return the source of answers, with an empty style. Raises TrainError if no answers were learned."""
    source = preferred_source(prompts, "")
    if source is None:
        raise TrainError("the captioner has learned no answers", hint="train on a version with questions")
    return source, ""
