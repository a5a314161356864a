"""Score a captioner on held-out images, and again with the images shuffled.

A captioner that ignores its image scores the same on another image, which the second score reveals.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.images.clip import ClipScorer
from pipeline.text.vqa_answers import normalize_answer
from trainer.config import ENCODERS, usual_texts
from trainer.data import Example, Question, examples_in, most_common
from trainer.features import BATCH_IMAGES, FeatureSource, OnlineFeatures, hold_features
from trainer.metrics import bootstrap, derangement, score, score_each, tokenize
from trainer.model.checkpoint import Checkpoint
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.model.encoder import folder_name
from trainer.tokenizer import TargetText, answering_prompt, scored_prompt


def generate_captions(
    checkpoint: Checkpoint, states: Iterable[Tensor], prompt: TargetText, decoding: DecodingConfig
) -> list[str]:
    """Generate one text per image after a shared prompt, for batches of hidden states (B, N, V), in order."""
    captioner, prompt_T = checkpoint.captioner.eval(), torch.tensor(checkpoint.tokenizer.prompt(prompt))
    batches = [captioner.generate(states_BNV, prompt_T.expand(len(states_BNV), -1), decoding) for states_BNV in states]
    return [checkpoint.tokenizer.decode(ids) for batch in batches for ids in batch]


def answer_questions(
    checkpoint: Checkpoint, features: FeatureSource, pairs: Sequence[tuple[Example, str]], source: str
) -> list[str]:
    """Answer one question per example, in order; prompts of the same length are batched together."""
    prompts = [checkpoint.tokenizer.prompt(TargetText(source, "", question=question)) for _, question in pairs]
    answers = [""] * len(pairs)
    for length in sorted({len(prompt) for prompt in prompts}):
        indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(indices), BATCH_IMAGES):
            batch = indices[start : start + BATCH_IMAGES]
            with torch.inference_mode():
                states_BNV = features([pairs[index][0] for index in batch])
            prompt_BT = torch.tensor([prompts[index] for index in batch], device=states_BNV.device)
            for index, ids in zip(batch, checkpoint.captioner.eval().generate(states_BNV, prompt_BT, GREEDY), strict=True):
                answers[index] = checkpoint.tokenizer.decode(ids)
    return answers


@dataclass(frozen=True, slots=True)
class VqaEvaluation:
    """The questions about some examples, each asked about its own image and about another one."""

    examples: Sequence[Example]
    source: str  # in the prompts of answers
    position: dict[str, int]  # of each example, by sample id
    asked_with: list[int]  # by example: that whose questions are asked about its image, too
    answers: dict[tuple[int, int, bool], str] = field(default_factory=dict)  # by example, question, and whether shuffled

    @classmethod
    def of(cls, checkpoint: Checkpoint, examples: Sequence[Example]) -> "VqaEvaluation | None":
        """Return the questions; None if the captioner learned no answers."""
        prompts = checkpoint.captioner.config.prompts
        if all(style for _, style in prompts):
            return None
        asked_with = [0] * len(examples)
        for index, image in enumerate(derangement([example.sample_id for example in examples])):
            asked_with[image] = index
        position = {example.sample_id: index for index, example in enumerate(examples)}
        return cls(examples, answering_prompt(prompts)[0], position, asked_with)

    def ask(self, checkpoint: Checkpoint, features: FeatureSource, shown: Sequence[Example]) -> None:
        """Ask all that is to be asked about the images of these examples, so that each image is encoded once."""
        keys, pairs = [], []
        for image in shown:
            own = self.position[image.sample_id]
            for index, is_shuffled in ((own, False), (self.asked_with[own], True)):
                for number, question in enumerate(self.examples[index].questions):
                    keys.append((index, number, is_shuffled))
                    pairs.append((image, question.question))
        self.answers.update(zip(keys, answer_questions(checkpoint, features, pairs, self.source), strict=True))

    def scores(self) -> dict[str, dict[str, float]]:
        """Return VQA accuracy by answer type, that with shuffled images, and that of always the most frequent answer."""
        scores = {}
        asked = [(i, n, q) for i, example in enumerate(self.examples) for n, q in enumerate(example.questions)]
        for kind in sorted({question.answer_type for _, _, question in asked}):
            of_kind = [(i, n, question) for i, n, question in asked if question.answer_type == kind]
            counts = Counter(normalize_answer(most_common(question.answers)) for _, _, question in of_kind)
            majority = counts.most_common(1)[0][0]
            scores[kind] = {
                "count": len(of_kind),
                "accuracy": statistics.fmean(vqa_accuracy(self.answers[i, n, False], q) for i, n, q in of_kind),
                "shuffled": statistics.fmean(vqa_accuracy(self.answers[i, n, True], q) for i, n, q in of_kind),
                "majority": statistics.fmean(vqa_accuracy(majority, question) for _, _, question in of_kind),
            }
        return scores

    def rows(self) -> list[list[dict[str, Any]]]:
        """Return the questions of each example with what was said."""
        return [
            [
                {"question": question.question, "type": question.answer_type, "said": self.answers[index, number, False]}
                | {"answers": list(question.answers), "accuracy": vqa_accuracy(self.answers[index, number, False], question)}
                for number, question in enumerate(example.questions)
            ]
            for index, example in enumerate(self.examples)
        ]


def vqa_accuracy(answer: str, truth: Question) -> float:
    """Return VQA accuracy (Antol et al., 2015): min(1, matching annotators / 3), leaving out each annotator in turn.

    All answers are normalised first; the official program compares verbatim if all annotators agree. With fewer than four
    annotators, an answer is right if it equals one of theirs.
    """
    given = normalize_answer(answer)
    truths = [normalize_answer(reference) for reference in truth.answers]
    if len(truths) < 4:
        return float(given in truths)
    return statistics.fmean(
        min(1.0, sum(reference == given for i, reference in enumerate(truths) if i != j) / 3) for j in range(len(truths))
    )


CLIPSCORE_WEIGHT = 2.5  # scales typical scores to between 0 and 1


def clip_scores(name: str, images: Iterable[Image.Image], captions: Sequence[str], *orders: Sequence[int]) -> list[list[float]]:
    """Return CLIPScore (Hessel et al., 2021) for each order: 2.5 x max(cosine, 0) of image i (RGB) and caption order[i]."""
    clip = ClipScorer(name)
    image_states, text_states = clip.image_states(images), clip.text_states(captions)
    cosines = (clip.compare(image_states, [text_states[index] for index in order]) for order in orders)
    return [[CLIPSCORE_WEIGHT * max(cosine, 0.0) for cosine in order_cosines] for order_cosines in cosines]


def is_own_encoder(name: str, made_from: dict[str, str]) -> bool:
    """Return whether a CLIP is the captioner's own encoder, whose score would be biased."""
    own_name, model_id = made_from.get("name", ""), ENCODERS.get(name, name)
    return ENCODERS.get(own_name, own_name) in (model_id, folder_name(Path(name)) if Path(name).is_dir() else model_id)


BY_PEOPLE = "references of the source"
SHOWN = 12
HELD_IMAGES = 256  # whose states are in memory at once: 155 MB of a ViT-B/16


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options of an evaluation: the prompt (source, style), the decoding, and what else to measure."""

    prompt: tuple[str, str]
    decoding: DecodingConfig = GREEDY
    questions: bool = False  # also score answers and compute intervals


def evaluate(
    checkpoint: Checkpoint, examples: list[Example], options: EvalOptions, features: FeatureSource, clip: str | None = None
) -> dict[str, Any]:
    """Return scores against the references of the source or, if there are none, against the teacher's captions.

    `scores` use each image's own caption, `shuffled_scores` the caption of another image; `intervals` are 95 % bootstrap
    intervals over images, and `gain` that of CIDEr-D over the caption of another image: a captioner whose gain may be 0 may
    ignore its images. `questions` is there if answers were learned. `each` holds the caption and scores of every image.
    `num_beams` is the number of candidates that the search had.
    """
    checkpoint.captioner.eval()  # before any states are computed: an encoder that is trained along may have dropout
    source, style = options.prompt
    against, examples, texts = choose_references(examples, style)
    quiz = VqaEvaluation.of(checkpoint, examples) if options.questions else None
    hypotheses = _write(checkpoint, examples, options, features, quiz)
    tokens, references = [tokenize(text) for text in hypotheses], [[tokenize(text) for text in group] for group in texts]
    # Greedy captions depend on the image alone: shuffling the images is shuffling the captions.
    order = derangement([example.sample_id for example in examples])
    shuffled = [tokens[index] for index in order]
    own_scores, shuffled_scores = score_each(tokens, references), score_each(shuffled, references)
    each = _rows(examples, hypotheses, references, own_scores | {"shuffled_cider_d": shuffled_scores["cider_d"]})
    result: dict[str, Any] = {
        "images": len(examples),
        "style": style,
        "source": source,
        "against": against,
        "num_beams": options.decoding.num_beams,
        "scores": score(tokens, references, own_scores),
        "shuffled_scores": score(shuffled, references, shuffled_scores),
        "intervals": bootstrap(own_scores) if options.questions else {},
        "gain": bootstrap(_gains(own_scores, shuffled_scores)) if options.questions else {},
        "words": _count_words(tokens, references),
        "shown": _best_and_worst(each),
        "each": each,
    }
    if clip:
        scored = clip_scores(clip, (example.open() for example in examples), hypotheses, range(len(examples)), order)
        result["scores"]["clip_score"], result["shuffled_scores"]["clip_score"] = map(statistics.fmean, scored)
    if quiz:
        result["questions"] = quiz.scores()
        for row, items in zip(each, quiz.rows(), strict=True):
            row["questions"] = items
    return result


def _write(
    checkpoint: Checkpoint, examples: list[Example], options: EvalOptions, features: FeatureSource, quiz: VqaEvaluation | None
) -> list[str]:
    """Return the caption of each example; `quiz` is asked about them while their states are in memory."""
    source, style = options.prompt
    prompt, captions = TargetText(source, "", style=style), list[str]()
    for start in range(0, len(examples), HELD_IMAGES):
        part = examples[start : start + HELD_IMAGES]
        held = hold_features(features, part)
        batches = (held(part[index : index + BATCH_IMAGES]) for index in range(0, len(part), BATCH_IMAGES))
        captions += generate_captions(checkpoint, batches, prompt, options.decoding)
        if quiz:
            quiz.ask(checkpoint, held, part)
    return captions


def _rows(
    examples: list[Example], captions: list[str], references: list[list[list[str]]], scores: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Return the caption, references and scores of each image; references are given by their words."""
    return [
        {"sample_id": example.sample_id, "caption": captions[index], "references": [" ".join(r) for r in references[index]]}
        | {name: round(scores[name][index], 4) for name in ("cider_d", "shuffled_cider_d", "rouge_l")}
        for index, example in enumerate(examples)
    ]


def _best_and_worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ranked = sorted(rows, key=lambda row: -row["cider_d"])
    shown = [*ranked[: SHOWN // 2], *ranked[SHOWN // 2 :][-(SHOWN // 2) :]]
    return [row | {"references": row["references"][:5]} for row in shown]


def _count_words(captions: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(map(len, captions)), 2),
        "different": len({word for words in captions for word in words}),
        "of_references": round(statistics.fmean(len(words) for of_one in references for words in of_one), 2),
    }


def evaluate_version(
    checkpoint: Checkpoint,
    version: Version,
    split: str,
    style: str | None = None,
    beams: int | None = None,
    clip: str | None = None,
) -> dict[str, Any]:
    """Score a captioner on a split of a version; see `evaluate`. `clip` names a CLIP for CLIPScore.

    Without `beams`, there are as many as when it was scored after its training; 1 if it does not say.

    Raises TrainError if the CLIP is the captioner's own encoder, EngineError if there is no such CLIP.
    """
    config = checkpoint.captioner.config
    if clip and is_own_encoder(clip, config.encoder["made_from"]):
        raise TrainError(f"{clip} is the encoder of this captioner, and no judge of it", hint="name another CLIP: --clip-score")
    mixture = config.data.get("texts", "synthetic")
    try:
        examples = examples_in(version, split, mixture, to_score=True)
    except TrainError:
        if (there := usual_texts(version.manifest)) == mixture:
            raise
        examples = examples_in(version, split, there, to_score=True)
    examples = sorted(examples, key=lambda example: example.sample_id)  # as after its training: intervals are drawn by place
    features = OnlineFeatures(checkpoint.captioner.encoder, next(checkpoint.captioner.parameters()).device)
    decoding = DecodingConfig(num_beams=beams or config.num_beams)
    prompt = scored_prompt(config.prompts, style)
    return {"split": split, **evaluate(checkpoint, examples, EvalOptions(prompt, decoding, questions=True), features, clip)}


def _gains(own: dict[str, list[float]], shuffled: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return by how much CIDEr-D of each image is above that with the caption of another image."""
    return {"cider_d": [one - other for one, other in zip(own["cider_d"], shuffled["cider_d"], strict=True)]}


def choose_references(examples: list[Example], style: str) -> tuple[str, list[Example], list[list[str]]]:
    """Return the kind of reference, the examples that have one, and their references. Raises TrainError if none has one."""
    against = BY_PEOPLE
    pairs = [(example, list(example.references)) for example in examples if example.references]
    if not pairs:
        against = "captions of the teacher"
        captions = ((example, [text.text for text in example.texts if text.style == style]) for example in examples)
        pairs = [(example, texts) for example, texts in captions if texts]
    if not pairs:
        styles = sorted({text.style for example in examples for text in example.texts if text.style})
        hint = f"there are captions of the styles {', '.join(styles)}: --style" if styles else "evaluate on another dataset"
        raise TrainError(f"no held-out image has a reference or a {style} caption", hint=hint)
    return against, [example for example, _ in pairs], [texts for _, texts in pairs]
