"""Convert texts to token ids and back: the prompt of a decoder, and the target that it learns to write.

A prompt names a source (human or synthetic), and a caption style or a question. `prompts` are the pairs of
source and style that a captioner has learned; the style of answers is "". Published captioners have a copy of
the functions that choose and write a prompt (trainer/publish/captioner_package.py).
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
PAD_ID, EOS_ID = 0, 1  # in every tokenizer that is trained here
ENCODED_TEXTS = 10_000  # per batch of `count_cut`


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
    target: "array[int]"  # ends with EOS, unless it was cut
    is_caption: bool

    @classmethod
    def of(cls, prompt: Sequence[int], target: Sequence[int], *, is_caption: bool) -> "EncodedText":
        """Store token ids compactly."""
        return cls(array("i", prompt), array("i", target), is_caption)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """A batch of C texts of at most T tokens, padded on the right. Texts of one image are adjacent."""

    image_of_C: Tensor
    ids_CT: Tensor  # prompt, target, EOS
    prompt_C: Tensor  # prompt tokens
    length_C: Tensor  # all tokens
    caption_C: Tensor  # True for captions, False for answers

    @property
    def learned_CT(self) -> Tensor:
        """The loss mask of `ids_CT[:, 1:]`, without prompt and padding: (C, T - 1)."""
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
    """The tokenizer of a decoder: that of a language model, or one with tokens for sources and styles."""

    backend: Tokenizer
    kind: Literal["scratch", "pretrained"]
    eos_id: int

    def prompt(self, text: TargetText) -> list[int]:
        """Return the token ids of the prompt."""
        parts = prompt_parts(self.kind, text.source, text.style, text.question)
        return prompt_ids(parts, self._special_id, self._ids)

    def target(self, text: TargetText) -> list[int]:
        """Return the token ids of the text, and EOS."""
        return [*self._ids(self._target_text(text)), self.eos_id]

    def encode(self, text: TargetText, max_tokens: int) -> EncodedText:
        """Return the token ids of a text. A target longer than `max_tokens` is cut and has no EOS."""
        return EncodedText.of(self.prompt(text), self.target(text)[:max_tokens], is_caption=not text.question)

    def count_cut(self, texts: Sequence[TargetText], max_tokens: int) -> int:
        """Return the number of targets longer than `max_tokens`, with EOS."""
        num_cut = 0
        for start in range(0, len(texts), ENCODED_TEXTS):
            part = [self._target_text(text) for text in texts[start : start + ENCODED_TEXTS]]
            encodings = self.backend.encode_batch(part, add_special_tokens=False)
            num_cut += sum(len(encoding.ids) + 1 > max_tokens for encoding in encodings)
        return num_cut

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self.backend.decode(list(ids))).strip()

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
    """Raise ValueError if a text can have tokens that a decoder lacks.

    Special tokens may be missing, since `encode_special_tokens` keeps them out of texts: Gemma has one for
    images.
    """
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    largest = max((number for number in backend.get_vocab().values() if number not in special), default=-1)
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer has {largest + 1:,} tokens, but the decoder has {vocab_size:,}")


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
    """Train a byte-level BPE on the texts of the training split."""
    texts = list(texts)
    names = [*sorted({text.source for text in texts}), *sorted({text.style for text in texts if text.style})]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, ANSWER, *(f"<{name}>" for name in names)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for part in (text.question, text.text) if part)
    tokenizer.train_from_iterator(parts, trainer)
    tokenizer.encode_special_tokens = True  # the text "<eos>" in a caption is not the EOS token
    assert (tokenizer.token_to_id(PAD), tokenizer.token_to_id(EOS)) == (PAD_ID, EOS_ID)
    return CaptionTokenizer(tokenizer, "scratch", EOS_ID)


ANSWER = "<answer>"  # ends the prompt of a question
STYLES = ("plain", "detailed", "brief", "alt", "tags", "ocr", "human")  # never taken for questions
Prompts = list[tuple[str, str]]


def preferred_style(prompts: list[tuple[str, str]]) -> str | None:
    """Return the default style: brief, else plain, else the first, or None without captions."""
    styles = [style for _, style in prompts if style]
    return next((style for style in ("brief", "plain") if style in styles), next(iter(styles), None))


def preferred_source(prompts: list[tuple[str, str]], style: str) -> str | None:
    """Return the source to name with a style, human if possible, or None if the style was not learned."""
    sources = [source for source, learned in prompts if learned == style]
    return "human" if "human" in sources else next(iter(sources), None)


def choose_prompt(prompts: list[tuple[str, str]], text: str = "") -> tuple[str, str, str]:
    """Return source, style and question of a prompt. `text` is a style or a question; "" is the default
    style.

    Raises ValueError if the style or answers were not learned.
    """
    styles = list(dict.fromkeys(style for _, style in prompts if style))
    if text in STYLES and text not in styles:
        learned = ", ".join(styles) or "questions"
        raise ValueError(f"this captioner was not trained on the style {text}, only on {learned}")
    question = text if text and text not in styles else ""
    style = "" if question else text or preferred_style(prompts)
    if style is None:
        raise ValueError("this captioner was trained only on questions. Ask it a question")
    source = preferred_source(prompts, style)
    if source is None:
        raise ValueError(
            f"this captioner was not trained to answer questions. Its styles are {', '.join(styles)}"
        )
    return source, style, question


def prompt_parts(kind: str, source: str, style: str, question: str) -> list[tuple[str, bool]]:
    """Return the parts of a prompt, each with True if it is the name of a token and False if it is a text.

    `kind` is "pretrained" for a language model and "scratch" for a decoder with tokens for sources and
    styles.
    """
    if kind == "pretrained":
        return [(f" Question: {question} Answer:" if question else f" A {style} caption ({source}):", False)]
    if question:
        return [(f"<{source}>", True), (question, False), (ANSWER, True)]
    return [(f"<{source}>", True), (f"<{style}>", True)]


def prompt_ids(
    parts: list[tuple[str, bool]], token_id: Callable[[str], int], ids_of: Callable[[str], list[int]]
) -> list[int]:
    """Return the token ids of the parts of a prompt. `token_id` maps token names, `ids_of` texts."""
    return [token for part, is_token in parts for token in ([token_id(part)] if is_token else ids_of(part))]


def scored_prompt(prompts: Prompts, style: str | None = None) -> tuple[str, str]:
    """Return the source and the style (default: the preferred one) of a caption prompt.

    Raises TrainError if the style was not learned.
    """
    chosen = style or preferred_style(prompts)
    source = preferred_source(prompts, chosen) if chosen else None
    if chosen is None or source is None:
        styles = dict.fromkeys(learned for _, learned in prompts if learned)
        if not styles:
            raise TrainError("the captioner was trained only on questions", hint="ask a question: --question")
        problem = f"the captioner was not trained on the style {chosen}"
        raise TrainError(problem, hint=f"choose one of {', '.join(styles)}")
    return source, chosen


def answering_prompt(prompts: Prompts) -> tuple[str, str]:
    """Return the source of answers and an empty style. Raises TrainError if no answers were learned."""
    source = preferred_source(prompts, "")
    if source is None:
        raise TrainError(
            "the captioner was not trained to answer questions", hint="train on a version that has questions"
        )
    return source, ""
