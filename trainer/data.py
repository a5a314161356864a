"""Rows of a version to examples: each image once, with all its texts, in an order that only seed and step decide."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
from PIL import Image

from pipeline.dataset.version import Version
from pipeline.digests import hash_to_unit
from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from pipeline.tables import PIXELS
from trainer.image_index import map_images
from trainer.tokenizer import TargetText

HUMAN_STYLE = "brief"  # as people caption
UNNAMED = "any"  # whose words they are, where prompts do not say it
Mixture = Literal["synthetic", "human", "mixed"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image with the answers that count as right; several where several people were asked."""

    question: str
    answers: tuple[str, ...]
    answer_type: str


@dataclass(frozen=True, slots=True)
class Example:
    """One image (as its file's bytes) with the texts to learn, captions that people hold to be true, and questions."""

    sample_id: str
    image: bytes | memoryview
    texts: tuple[TargetText, ...]
    references: tuple[str, ...]
    questions: tuple[Question, ...] = ()

    def open(self) -> Image.Image:
        """Decode the image to RGB."""
        return prepare_image(self.image)


def examples_in(version: Version, split: str, mixture: Mixture = "synthetic", **how: Any) -> list[Example]:
    """Return the examples of a split of a version, whose images stay in their files; see `read_examples`.

    Raises:
        StoreError: the version has no rows in this split.
        TrainError: see `read_examples`.
    """
    columns = [name for name in version.manifest["columns"] if name not in PIXELS]
    images = map_images(version, split) if "image" in version.manifest["columns"] else None
    return read_examples(version.read(split, columns), images, mixture, **how)


def read_examples(
    table: pa.Table,
    images: Mapping[str, bytes | memoryview] | None,
    mixture: Mixture = "synthetic",
    *,
    questions: bool = True,
    styles: Sequence[str] = (),
    source_in_prompt: bool = True,
) -> list[Example]:
    """Return the rows of a version (tables.ROW) that have something to learn.

    Args:
        table: rows of one split, without pixels.
        images: their images by sample id; None where they are decks.
        mixture: whose texts to learn: the model's, people's, or both.
        questions: whether answers to questions are learned too.
        styles: of captions to learn; none means all.
        source_in_prompt: whether prompts tell people's texts from the model's.

    Raises:
        TrainError: the samples are decks, or no row has a text of that kind.
    """
    if images is None:
        raise TrainError("a captioner learns from single images, and these samples are decks", hint="train on another dataset")
    names = ["sample_id", "captions", "references", "qa", "reference_qa"]
    rows = table.select([name for name in names if name in table.column_names]).to_pylist()
    examples = [_example(row, images[row["sample_id"]], mixture, questions=questions) for row in rows]
    if styles:
        examples = [replace(e, texts=tuple(t for t in e.texts if not t.style or t.style in styles)) for e in examples]
    if not source_in_prompt:
        examples = [replace(e, texts=tuple(replace(t, source=UNNAMED) for t in e.texts)) for e in examples]
    if not any(text.style for example in examples for text in example.texts):
        raise TrainError(f"no {mixture} captions to learn from", hint="generate with --tasks caption,qa, or take other --texts")
    return [example for example in examples if example.texts]


def _example(row: dict[str, Any], image: bytes | memoryview, mixture: Mixture, *, questions: bool) -> Example:
    asked = [(pair["question"], (pair["answer"],), pair["answer_type"]) for pair in row.get("qa") or ()]
    human = [(pair["question"], tuple(pair["answers"]), pair["answer_type"]) for pair in row.get("reference_qa") or ()]
    texts: list[TargetText] = []
    if mixture != "human":
        texts += [TargetText("synthetic", caption["text"], style=caption["style"]) for caption in row["captions"]]
        texts += [TargetText("synthetic", answers[0], question=question) for question, answers, _ in asked if questions]
    if mixture != "synthetic":
        texts += [TargetText("human", reference, style=HUMAN_STYLE) for reference in row["references"]]
        texts += [
            TargetText("human", most_common(answers), question=question)
            for question, answers, _ in human
            if questions and answers
        ]
    return Example(
        sample_id=row["sample_id"],
        image=image,
        texts=tuple(texts),
        references=tuple(row["references"]),
        questions=tuple(Question(q, answers, kind or "other") for q, answers, kind in human or asked if answers),
    )


def limit_images(examples: list[Example], images: int) -> list[Example]:
    """Return so many of the examples in their order, chosen by their ids: a smaller choice lies within a larger one."""
    if not images or images >= len(examples):
        return examples
    chosen = sorted(examples, key=lambda example: hash_to_unit(example.sample_id))[:images]
    kept = {example.sample_id for example in chosen}
    return [example for example in examples if example.sample_id in kept]


def limit_captions(examples: list[Example], words: int) -> list[Example]:
    """Return the examples with captions of so many words in all: one of each image, then a second of each, while they fit.

    Each image keeps one, so that the images stay the same: the shortest, where others are too long. Which ones come first is
    else a function of image and text alone.
    """
    if not words:
        return examples
    captions = [[n for n, text in enumerate(example.texts) if text.style] for example in examples]
    for example, mine in zip(examples, captions, strict=True):
        mine.sort(key=lambda n: hash_to_unit(example.sample_id, example.texts[n].text))
    if sum(count_words(e.texts[mine[0]]) for e, mine in zip(examples, captions, strict=True) if mine) > words:
        for example, mine in zip(examples, captions, strict=True):
            mine.sort(key=lambda n: count_words(example.texts[n]))
    kept = [set(mine[:1]) for mine in captions]
    left = words - sum(count_words(e.texts[n]) for e, chosen in zip(examples, kept, strict=True) for n in chosen)
    for turn in range(1, max(map(len, captions), default=0)):
        for example, mine, chosen in zip(examples, captions, kept, strict=True):
            if turn < len(mine) and (count := count_words(example.texts[mine[turn]])) <= left:
                chosen.add(mine[turn])
                left -= count
    return [
        replace(example, texts=tuple(text for n, text in enumerate(example.texts) if not text.style or n in chosen))
        for example, chosen in zip(examples, kept, strict=True)
    ]


def count_words(text: TargetText) -> int:
    """Return the words of a caption, which are counted alike for every decoder."""
    return len(text.text.split())


def most_common(answers: tuple[str, ...]) -> str:
    """Return the answer that most people gave, the first of several."""
    return max(answers, key=answers.count)


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
