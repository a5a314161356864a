"""Rows of a version to batches: each image once, with all its captions, in an order that only seed and step decide."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from pipeline.errors import TrainError
from pipeline.image import prepare_image
from trainer.model.captioner import EOS_ID, PAD_ID


@dataclass(frozen=True, slots=True)
class Example:
    """One image (as its file's bytes) with its captions as (style, text), and captions that people hold to be true."""

    sample_id: str
    image: bytes
    captions: tuple[tuple[str, str], ...]
    references: tuple[str, ...]

    def open(self) -> Image.Image:
        """Decode the image to RGB."""
        return prepare_image(self.image)


def read_examples(table: pa.Table) -> list[Example]:
    """Return the rows of a version (tables.ROW) that have a caption.

    Raises:
        TrainError: no row has one.
    """
    if "image" not in table.column_names:
        raise TrainError("a captioner learns from single images, and these samples are decks", hint="train on another dataset")
    columns = ["sample_id", "image", "captions", "references"]
    rows: list[dict[str, Any]] = table.select(columns).to_pylist()
    examples = [
        Example(
            sample_id=row["sample_id"],
            image=row["image"]["bytes"],
            captions=tuple((caption["style"], caption["text"]) for caption in row["captions"]),
            references=tuple(row["references"]),
        )
        for row in rows
        if row["captions"]
    ]
    if not examples:
        raise TrainError("no captions to learn from", hint="generate with --tasks caption,qa")
    return examples


def start_token(style: str) -> str:
    """Return the token that begins a caption of a style, and so asks for one."""
    return f"<{style}>"


def train_tokenizer(examples: list[Example], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE from the captions of the training split, and from nothing else."""
    styles = sorted({style for example in examples for style, _ in example.captions})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", *map(start_token, styles)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for example in examples for _, text in example.captions), trainer)
    tokenizer.encode_special_tokens = True  # a caption that holds the text "<eos>" does not end there
    assert (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("<eos>")) == (PAD_ID, EOS_ID)
    return tokenizer


def caption_ids(tokenizer: Tokenizer, style: str, text: str, max_tokens: int) -> list[int]:
    """Return start token, words and EOS; a text that is too long loses its end, and then has no EOS."""
    start_id = tokenizer.token_to_id(start_token(style))
    assert start_id is not None, f"the tokenizer was not trained on {style}"
    return [start_id, *tokenizer.encode(text).ids, EOS_ID][: max_tokens + 1]


def collate(rows: list[list[int]]) -> Tensor:
    """Pad token ids on the right: -> (C, T)."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD_ID)


def batches(count: int, size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Yield indices of examples for each step from `first_step` on, for ever: a pure function of seed and step.

    Every example comes once an epoch, in an order that differs from epoch to epoch.
    """
    step = first_step
    while True:
        places = range(step * size, (step + 1) * size)
        yield [_order(count, seed, place // count)[place % count] for place in places]
        step += 1


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
