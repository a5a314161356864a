"""Score a captioner on held-out images, and again with the images shuffled.

A captioner that ignores its image scores as well on another one. The second score shows that at once.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from trainer.checkpoint import Checkpoint
from trainer.clipscore import clip_scores, is_same
from trainer.data import Example, examples_in
from trainer.features import FeatureSource, OnlineFeatures
from trainer.generate import BATCH_IMAGES, scored_prompt, write_captions
from trainer.metrics import bootstrap, derangement, meteor, score, score_each, tokenize
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.tokenizer import TargetText
from trainer.vqa import evaluate_questions

SHOWN = 12


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How an evaluation asks: for whose captions of which style, by which search, and what else it measures."""

    prompt: tuple[str, str]
    search: DecodingConfig = GREEDY
    questions: bool = False  # and intervals
    thorough: bool = False  # with METEOR, where Java and pycocoevalcap are there: it takes seconds


def evaluate(
    checkpoint: Checkpoint, examples: list[Example], asked: EvalOptions, states_of: FeatureSource, clip: str | None = None
) -> dict[str, Any]:
    """Return scores against the references of the source, or, where it has none, against the captions it was given.

    `scores` are of each image's own caption, `shuffled_scores` of the caption of another image, `intervals` the 95 % of a
    bootstrap over images. `questions` are scored where answers were learned. `each` has all of that for every image.
    """
    source, style = asked.prompt
    against, examples, references = _references(examples, style)
    with torch.inference_mode():
        states = [states_of(examples[at : at + BATCH_IMAGES]) for at in range(0, len(examples), BATCH_IMAGES)]
    hypotheses = write_captions(checkpoint, states, TargetText(source, "", style=style), asked.search)
    tokens = [tokenize(text) for text in hypotheses]
    # Greedy captions depend on the image alone: shuffling the images is shuffling the captions.
    shuffled = [tokens[other] for other in derangement(len(tokens))]
    own, blind = score_each(tokens, references), score_each(shuffled, references)
    each: list[dict[str, Any]] = [
        {
            "sample_id": example.sample_id,
            "caption": hypotheses[at],
            "references": [" ".join(reference) for reference in references[at]],
            "cider_d": round(own["cider_d"][at], 4),
            "shuffled_cider_d": round(blind["cider_d"][at], 4),
            "rouge_l": round(own["rouge_l"][at], 4),
        }
        for at, example in enumerate(examples)
    ]
    ranked = sorted(range(len(each)), key=lambda at: -each[at]["cider_d"])
    shown = [*ranked[: SHOWN // 2], *ranked[SHOWN // 2 :][-(SHOWN // 2) :]]
    lengths = [len(words) for words in tokens]
    found: dict[str, Any] = {
        "images": len(examples),
        "style": style,
        "source": source,
        "against": against,
        "scores": score(tokens, references, own),
        "shuffled_scores": score(shuffled, references, blind),
        "intervals": bootstrap(own) if asked.questions else {},
        "words": {
            "mean": round(statistics.fmean(lengths), 2),
            "different": len({word for words in tokens for word in words}),
            "of_references": round(statistics.fmean(len(r) for mine in references for r in mine), 2),
        },
        # The best, then the worst.
        "shown": [{**each[at], "references": each[at]["references"][:5]} for at in shown],
        "each": each,
    }
    if asked.thorough:
        for name, value in zip(("scores", "shuffled_scores"), meteor([tokens, shuffled], references), strict=False):
            found[name]["meteor"] = value
    if clip:
        opened, orders = (example.open() for example in examples), (range(len(examples)), derangement(len(examples)))
        for name, values in zip(("scores", "shuffled_scores"), clip_scores(clip, opened, hypotheses, *orders), strict=True):
            found[name]["clip_score"] = statistics.fmean(values)
    if asked.questions and (answered := evaluate_questions(checkpoint, examples, states_of)):
        found["questions"], of_images = answered
        for about, mine in zip(each, of_images, strict=True):
            about["questions"] = mine
    return found


def evaluate_version(
    checkpoint: Checkpoint, version: Version, split: str, style: str | None = None, beams: int = 1, clip: str | None = None
) -> dict[str, Any]:
    """Score a captioner on a split of a version; see `evaluate`. `clip` names a CLIP for CLIPScore.

    Raises:
        TrainError: the CLIP is the captioner's own encoder.
        EngineError: the CLIP is not there.
    """
    config = checkpoint.captioner.config
    if clip and is_same(clip, config.encoder["made_from"]):
        raise TrainError(f"{clip} is the encoder of this captioner, and no judge of it", hint="name another CLIP: --clip-score")
    examples = examples_in(version, split, config.data.get("texts", "synthetic"))
    look = OnlineFeatures(checkpoint.captioner.encoder, next(checkpoint.captioner.parameters()).device)
    asked = EvalOptions(scored_prompt(config.prompts, style), DecodingConfig(beams=beams), questions=True, thorough=True)
    return {"split": split, **evaluate(checkpoint, examples, asked, look, clip)}


def _references(examples: list[Example], style: str) -> tuple[str, list[Example], list[list[list[str]]]]:
    """Return what is scored against, and the examples that have it: a caption may have been rejected on the way."""
    against = "references of the source"
    mine = [(example, list(example.references)) for example in examples if example.references]
    if not mine:
        against = "captions of the teacher"
        mine = [(example, [text.text for text in example.texts if text.style == style]) for example in examples]
    mine = [(example, texts) for example, texts in mine if texts]
    if not mine:
        raise TrainError(f"no held-out image has a reference or a {style} caption", hint="choose another style")
    return against, [example for example, _ in mine], [[tokenize(text) for text in texts] for _, texts in mine]
