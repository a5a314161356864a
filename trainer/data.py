"""Turn rows of a version into examples, one per image with all its texts; batch order depends on seed and step only."""

import itertools
import random
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.dataset.version import Version
from pipeline.digests import hash_to_unit
from pipeline.errors import TrainError
from pipeline.images.decode import prepare_image
from pipeline.tables import HUMAN, PIXELS, REVIEWED, SPLITS
from pipeline.text.vqa_answers import kind_of_answer
from trainer.config import Mixture, TrainConfig, keeps_human_texts
from trainer.image_index import StoredImage, map_images
from trainer.tokenizer import TargetText

REFERENCE_STYLE = "brief"  # as which a caption by people is learned
ANY_SOURCE = "any"  # source in prompts that do not name one


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image with its accepted answers, one per annotator."""

    question: str
    answers: tuple[str, ...]
    answer_type: str


@dataclass(frozen=True, slots=True)
class Example:
    """One image (its file) with the texts to learn, reference captions and questions."""

    sample_id: str
    image: bytes | StoredImage
    texts: tuple[TargetText, ...]
    references: tuple[str, ...]
    questions: tuple[Question, ...] = ()

    def open(self) -> Image.Image:
        """Decode the image to RGB."""
        return prepare_image(self.image if isinstance(self.image, bytes) else self.image.read())


def examples_in(version: Version, split: str, mixture: Mixture = "synthetic", **options: Any) -> list[Example]:
    """Return the examples of a split, images in memory-mapped files. Raises StoreError for an empty split."""
    options |= {"keeps_human": keeps_human_texts(version.manifest)}
    columns = [name for name in version.manifest["columns"] if name not in PIXELS]
    images = map_images(version, split) if "image" in version.manifest["columns"] else None
    return read_examples(version.read(split, columns), images, mixture, **options)


def read_examples(
    table: pa.Table,
    images: Mapping[str, bytes | StoredImage] | None,
    mixture: Mixture = "synthetic",
    *,
    questions: bool = True,
    styles: Sequence[str] = (),
    source_in_prompt: bool = True,
    keeps_human: bool = False,
    to_score: bool = False,
) -> list[Example]:
    """Return one example per row of a version (tables.ROW, one split, without pixels) that has a text to learn.

    `images` are image bytes by sample id; None if the samples are decks. `keeps_human`: people's texts are among the captions,
    where they went through all stages, and not references alone. `to_score`: images that have references alone are kept, too.
    Other options are those of TrainConfig; styles are of captions by the model.
    Raises TrainError if the samples are decks, or if no row has a text of that kind.
    """
    if images is None:
        raise decks_error()
    names = ["sample_id", "captions", "references", "qa", "reference_qa"]
    rows = table.select([name for name in names if name in table.column_names]).to_pylist()
    options = {"questions": questions, "keeps_human": keeps_human}
    examples = [_example(row, images[row["sample_id"]], mixture, **options) for row in rows]
    if styles:
        there = sorted({text.style for example in examples for text in example.texts if text.style})
        has_references = to_score and any(example.references for example in examples)
        if there and not set(there).intersection(styles) and not has_references:
            raise TrainError(
                f"no caption of the styles {', '.join(styles)}",
                hint=f"set styles to some of those that there are: {', '.join(there)}",
            )
        wanted = [tuple(t for t in e.texts if not t.style or t.style in styles or t.source == "human") for e in examples]
        examples = [replace(e, texts=texts) for e, texts in zip(examples, wanted, strict=True)]
    if not source_in_prompt:
        examples = [replace(e, texts=tuple(replace(t, source=ANY_SOURCE) for t in e.texts)) for e in examples]
    examples = [example for example in examples if example.texts or (to_score and example.references)]
    if not any(text.style for example in examples for text in example.texts) and not (to_score and examples):
        hint = "a captioner learns captions, and answers beside them: generate with --tasks caption,qa"
        if mixture == "synthetic" and any(row["references"] for row in rows):
            hint = "there are captions of people: --text-source human"
        raise TrainError(f"no {mixture} captions to learn from", hint=hint)
    return examples


def decks_error() -> TrainError:
    """Return the error that samples have several images."""
    return TrainError("a captioner learns from single images, and these samples are decks", hint="name another dataset")


def is_by_people(item: dict[str, Any]) -> bool:
    """Return True if a person wrote a caption or a question of a version that keeps such; also if a review has changed it."""
    return (
        item.get("style") == HUMAN
        or item.get("prompt_id") == HUMAN
        or ("question" in item and item.get("prompt_id") == REVIEWED)
    )


def _example(
    row: dict[str, Any], image: bytes | StoredImage, mixture: Mixture, *, questions: bool, keeps_human: bool
) -> Example:
    by_people, by_model = (
        [
            [item for item in row.get(name) or () if (keeps_human and is_by_people(item)) == wanted]
            for name in ("captions", "qa")
        ]
        for wanted in (True, False)
    )
    synthetic = [(pair["question"], (pair["answer"],), pair["answer_type"]) for pair in by_model[1]]
    human = [(pair["question"], tuple(pair["answers"]), pair["answer_type"]) for pair in row.get("reference_qa") or ()]
    texts: list[TargetText] = []
    if mixture != "human":
        texts += [TargetText("synthetic", caption["text"], style=caption["style"]) for caption in by_model[0]]
        texts += [TargetText("synthetic", answers[0], question=question) for question, answers, _ in synthetic if questions]
    if mixture != "synthetic" and keeps_human:  # those that went through all stages
        texts += [TargetText("human", caption["text"], style=REFERENCE_STYLE) for caption in by_people[0]]
        texts += [TargetText("human", pair["answer"], question=pair["question"]) for pair in by_people[1] if questions]
    elif mixture != "synthetic":
        texts += [TargetText("human", reference, style=REFERENCE_STYLE) for reference in row["references"]]
        answered = [(question, answers) for question, answers, _ in human if questions and answers]
        texts += [TargetText("human", most_common(answers), question=question) for question, answers in answered]
    asked = tuple(
        Question(question, answers, kind or kind_of_answer(most_common(answers)))
        for question, answers, kind in human or synthetic
        if answers
    )
    return Example(row["sample_id"], image, tuple(texts), tuple(row["references"]), asked)


def limit_images(examples: list[Example], images: int) -> list[Example]:
    """Return `images` examples in their order, chosen by a hash of their ids: a smaller choice is part of a larger one."""
    if not images or images >= len(examples):
        return examples
    kept = {e.sample_id for e in sorted(examples, key=lambda example: hash_to_unit(example.sample_id))[:images]}
    return [example for example in examples if example.sample_id in kept]


def limit_captions(examples: list[Example], words: int) -> list[Example]:
    """Return the examples with at most `words` caption words in total: one caption per image, then a second, while they fit.

    Every image keeps one caption, so the images stay the same; the shortest, if the budget is too small for others. Otherwise
    captions are ordered by a hash of image and text.
    """
    if not words:
        return examples
    captions = [[(n, count_words(text)) for n, text in enumerate(example.texts) if text.style] for example in examples]
    for example, counts in zip(examples, captions, strict=True):
        counts.sort(key=lambda item: hash_to_unit(example.sample_id, example.texts[item[0]].text))
    if sum(counts[0][1] for counts in captions if counts) > words:
        for counts in captions:
            counts.sort(key=lambda item: item[1])
    kept: list[set[int]] = [set() for _ in examples]
    for turn in range(max(map(len, captions), default=0)):
        for counts, chosen in zip(captions, kept, strict=True):
            if turn < len(counts) and (turn == 0 or counts[turn][1] <= words):
                chosen.add(counts[turn][0])
                words -= counts[turn][1]
    pairs = zip(examples, kept, strict=True)
    return [replace(e, texts=tuple(t for n, t in enumerate(e.texts) if not t.style or n in chosen)) for e, chosen in pairs]


def count_words(text: TargetText) -> int:
    """Return the number of words of a caption, independent of the tokenizer."""
    return len(text.text.split())


def most_common(answers: tuple[str, ...]) -> str:
    """Return the most frequent answer, the first one on a tie."""
    return max(answers, key=answers.count)


def batches(count: int, size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Yield the example indices of each step from `first_step` on, without end. The order of an epoch depends on the seed."""
    for step in itertools.count(first_step):
        positions = range(step * size, (step + 1) * size)
        places = [divmod(position, count) for position in positions]
        yield [_order(count, seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


Sets = dict[str, list[Example]]  # by split


def choose_examples(version: Version, config: TrainConfig, only: Container[str] | None) -> tuple[Sets, TrainConfig]:
    """Return what is learned from, what is scored while training and what at its end; and the settings that follow."""
    sets = {split: read_split_examples(version, split, config, only) for split in SPLITS}
    sets["train"] = limit_captions(limit_images(sets["train"], config.train_images), config.caption_word_budget)
    config = config.with_defaults(len(sets["train"]))
    sets["validation"] = _of_learned_prompts(sets["validation"][: config.evaluate_images], sets["train"])
    if not any((config.encoder_lr, config.connector_lr, config.decoder_lr)):
        raise TrainError("nothing would learn: all rates are 0", hint="give connector_lr, decoder_lr or encoder_lr")
    return sets, config


def read_split_examples(version: Version, split: str, config: TrainConfig, only: Container[str] | None = None) -> list[Example]:
    """Return the examples of a split under these settings, before budgets, sorted by id since a version has no order."""
    options: dict[str, Any] = {"questions": config.questions, "styles": config.styles}
    options |= {"source_in_prompt": config.source_in_prompt, "to_score": split != "train"}
    examples = examples_in(version, split, config.text_source, **options)
    chosen = (example for example in examples if only is None or example.sample_id in only)
    return sorted(chosen, key=lambda example: example.sample_id)


def texts_of(examples: list[Example]) -> list[TargetText]:
    """Return all texts of examples, in their order."""
    return [text for example in examples for text in example.texts]


def _of_learned_prompts(examples: list[Example], train_set: list[Example]) -> list[Example]:
    """Drop texts whose source and style are not in the training set: a word budget may remove a whole style."""
    learned = {(text.source, text.style) for example in train_set for text in example.texts}
    return [replace(e, texts=tuple(text for text in e.texts if (text.source, text.style) in learned)) for e in examples]
