"""Convert rows of a version to training examples. An example is one image with all its texts.

The order of batches depends only on the seed and the step.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.dataset.version import Version
from pipeline.errors import TrainError, did_you_mean
from pipeline.images.decode import prepare_image
from pipeline.tables import HUMAN, PIXELS, REVIEWED, SPLITS
from pipeline.text.vqa_answers import kind_of_answer
from trainer.config import Mixture, TrainConfig, keeps_human_texts
from trainer.image_index import StoredImage, map_images
from trainer.prompts import STYLES
from trainer.tokenizer import TargetText

REFERENCE_STYLE = "brief"


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image, with the accepted answers (one per annotator)."""

    question: str
    answers: tuple[str, ...]
    answer_type: str


@dataclass(frozen=True, slots=True)
class Example:
    """One image with training texts, reference captions and questions."""

    sample_id: str
    image: bytes | StoredImage
    texts: tuple[TargetText, ...]
    references: tuple[str, ...]
    questions: tuple[Question, ...] = ()

    def open(self) -> Image.Image:
        """Decode the image to RGB."""
        return prepare_image(self.image if isinstance(self.image, bytes) else self.image.read())


def choose_examples(version: Version, config: TrainConfig) -> tuple[dict[str, list[Example]], TrainConfig]:
    """Return the examples by split, and the settings with derived values filled in.

    Raises TrainError if there is nothing to learn.
    """
    mixture = config.text_source
    sets = {split: examples_in(version, split, mixture, to_score=split != "train") for split in SPLITS}
    sets["train"] = _weighted_examples(sets["train"], config)
    config = config.with_defaults(len(sets["train"]))
    # A few training images may lack a style. Validation must then not use this style.
    learned = {(text.source, text.style) for text in texts_of(sets["train"])}
    validation = sets["validation"][: config.evaluate_images]
    sets["validation"] = [_filter_texts(e, lambda t: (t.source, t.style) in learned) for e in validation]
    if not any((config.encoder_lr, config.connector_lr, config.decoder_lr)):
        raise TrainError("all learning rates are 0", hint="set connector_lr, decoder_lr or encoder_lr")
    return sets, config


def _weighted_examples(examples: list[Example], config: TrainConfig) -> list[Example]:
    """Remove texts of weight 0. Raises TrainError for an unknown style or source, or if no text is left."""
    known = {*STYLES, *(text.style for text in texts_of(examples)), "human", "synthetic", "answer"} - {""}
    if unknown := sorted({*config.text_weights} - known):
        hint = did_you_mean(unknown[0], sorted(known), f"set some of {', '.join(sorted(known))}")
        raise TrainError(f"text_weights: no text has the style or source {unknown[0]}", hint=hint)
    examples = [_filter_texts(e, lambda t: config.text_weight(t.source, t.style) > 0) for e in examples]
    if not texts_of(examples):
        raise TrainError("all texts have the weight 0", hint="change text_weights")
    return [example for example in examples if example.texts]


def examples_in(
    version: Version, split: str, mixture: Mixture = "synthetic", *, to_score: bool = False
) -> list[Example]:
    """Return the examples of a split, sorted by id, with memory-mapped images.

    Raises StoreError if the split is empty.
    """
    options = {"keeps_human": keeps_human_texts(version.manifest), "to_score": to_score}
    columns = [name for name in version.manifest["columns"] if name not in PIXELS]
    images = map_images(version, split) if "image" in version.manifest["columns"] else None
    examples = read_examples(version.read(split, columns), images, mixture, **options)
    return sorted(examples, key=lambda example: example.sample_id)


def read_examples(
    table: pa.Table,
    images: Mapping[str, bytes | StoredImage] | None,
    mixture: Mixture = "synthetic",
    *,
    keeps_human: bool = False,
    to_score: bool = False,
) -> list[Example]:
    """Return one example for each row that has a training text or, with `to_score`, a reference.

    `images` maps sample ids to images, or is None if each sample has several pages. With `keeps_human`, human
    texts are read from the caption and question columns, otherwise from the reference columns.

    Raises TrainError if `images` is None, or if no row has a caption to learn.
    """
    if images is None:
        problem = "captioners are trained on single images, but these samples are decks"
        raise TrainError(problem, hint="choose another dataset")
    names = ["sample_id", "captions", "references", "qa", "reference_qa"]
    rows = table.select([name for name in names if name in table.column_names]).to_pylist()
    examples = [_example(row, images[row["sample_id"]], mixture, keeps_human=keeps_human) for row in rows]
    examples = [example for example in examples if example.texts or (to_score and example.references)]
    if not any(text.style for text in texts_of(examples)) and not (to_score and examples):
        hint = "generate captions too: --tasks caption,qa"
        if mixture == "synthetic" and any(row["references"] for row in rows):
            hint = "use the human captions: --text-source human"
        raise TrainError(f"no {mixture} captions to train on", hint=hint)
    return examples


def _example(
    row: dict[str, Any], image: bytes | StoredImage, mixture: Mixture, *, keeps_human: bool
) -> Example:
    def is_human(item: dict[str, Any]) -> bool:
        # A later review may have changed a human caption or question.
        is_reviewed_question = "question" in item and item.get("prompt_id") == REVIEWED
        return keeps_human and (HUMAN in (item.get("style"), item.get("prompt_id")) or is_reviewed_question)

    captions, pairs = row.get("captions") or [], row.get("qa") or []
    synthetic_qa = [(p["question"], (p["answer"],), p["answer_type"]) for p in pairs if not is_human(p)]
    reference_pairs = row.get("reference_qa") or ()
    reference_qa = [(p["question"], tuple(p["answers"]), p["answer_type"]) for p in reference_pairs]
    texts: list[TargetText] = []
    if mixture != "human":
        texts += [TargetText("synthetic", c["text"], style=c["style"]) for c in captions if not is_human(c)]
        texts += [TargetText("synthetic", answers[0], question=q) for q, answers, _ in synthetic_qa]
    if mixture != "synthetic":
        if keeps_human:
            human_captions = [caption["text"] for caption in captions if is_human(caption)]
            human_answers = [(pair["question"], pair["answer"]) for pair in pairs if is_human(pair)]
        else:
            human_captions = row["references"]
            human_answers = [(q, most_common(answers)) for q, answers, _ in reference_qa if answers]
        texts += [TargetText("human", caption, style=REFERENCE_STYLE) for caption in human_captions]
        texts += [TargetText("human", answer, question=question) for question, answer in human_answers]
    asked = tuple(
        Question(question, answers, kind or kind_of_answer(most_common(answers)))
        for question, answers, kind in reference_qa or synthetic_qa
        if answers
    )
    return Example(row["sample_id"], image, tuple(texts), tuple(row["references"]), asked)


def _filter_texts(example: Example, keep: Callable[[TargetText], bool]) -> Example:
    return replace(example, texts=tuple(filter(keep, example.texts)))


def texts_of(examples: list[Example]) -> list[TargetText]:
    """Return the texts of all examples in order."""
    return [text for example in examples for text in example.texts]


def most_common(answers: tuple[str, ...]) -> str:
    """Return the most frequent answer. On a tie, the first one wins."""
    return max(answers, key=answers.count)


def batches(count: int, size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Yield the example indices for each step from `first_step` on. The order changes with each epoch."""
    for step in itertools.count(first_step):
        positions = range(step * size, (step + 1) * size)
        places = [divmod(position, count) for position in positions]
        yield [_shuffled(count, seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)  # a batch may contain the end of an epoch and the start of the next
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
