"""Choose what a captioner learns from, what it is scored on while it learns, and what at the end."""

from collections.abc import Container
from dataclasses import replace
from typing import Any

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.tables import SPLITS
from trainer.config import TrainConfig
from trainer.data import Example, examples_in, limit_captions, limit_images
from trainer.tokenizer import TargetText

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
