"""Score a captioner on held-out images, and again with shuffled images.

A captioner that ignores its images gets the same scores on shuffled images.

Shapes: B images, N hidden states, V encoder width, T tokens.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.images.clip import ClipScorer
from pipeline.text.vqa_answers import normalize_answer
from trainer.config import ENCODERS, default_texts
from trainer.data import Example, Question, examples_in, most_common
from trainer.features import BATCH_IMAGES, FeatureSource, OnlineFeatures, hold_features
from trainer.metrics import Rarity, bootstrap, derangement, score, score_each, tokenize
from trainer.model.checkpoint import Checkpoint
from trainer.model.decoder import ScratchDecoder
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.model.encoder import folder_name
from trainer.prompts import preferred_source
from trainer.runtime.devices import gather_slices, own_slice
from trainer.tokenizer import TargetText, scored_prompt

# As in the paper, so that typical scores are between 0 and 1.
CLIPSCORE_WEIGHT = 2.5
SHOWN_IMAGES = 12
HELD_IMAGES = 256  # images whose hidden states are in memory at the same time


def score_answers(
    examples: Sequence[Example], order: Sequence[int], answers: dict[tuple[int, int], list[str]]
) -> dict[str, dict[str, float]]:
    """Return VQA accuracy by answer type, also for shuffled images and for the most common answer.

    `answers[i, j]` holds the answers about image i to the questions of example j.
    """
    by_type: dict[str, list[tuple[Question, str, str]]] = defaultdict(list)
    for index, example in enumerate(examples):
        answered = zip(example.questions, answers[index, index], answers[order[index], index], strict=True)
        for question, own, shuffled in answered:
            by_type[question.answer_type].append((question, own, shuffled))
    scores = {}
    for kind, rows in sorted(by_type.items()):
        counts = Counter(normalize_answer(most_common(question.answers)) for question, *_ in rows)
        majority = counts.most_common(1)[0][0]
        scores[kind] = {
            "count": len(rows),
            "accuracy": statistics.fmean(vqa_accuracy(own, question) for question, own, _ in rows),
            "shuffled": statistics.fmean(vqa_accuracy(shuffled, question) for question, _, shuffled in rows),
            "majority": statistics.fmean(vqa_accuracy(majority, question) for question, *_ in rows),
        }
    return scores


def evaluate(
    checkpoint: Checkpoint,
    examples: list[Example],
    features: FeatureSource,
    prompt: tuple[str, str],
    decoding: DecodingConfig = GREEDY,
    *,
    questions: bool = False,
    clip: str | None = None,
) -> dict[str, Any]:
    """Score captions against the source's references or, if there are none, the teacher's captions.

    `prompt` is (source, style). With `questions`, answers are scored too, and 95 % bootstrap intervals are
    computed. With `clip`, CLIPScore is added.

    In the result, `shuffled_scores` are the scores of the same captions for other images. `gain` is the
    interval of the difference in CIDEr-D between `scores` and `shuffled_scores`. If it includes 0, the
    captioner may ignore its images. `intervals` holds the intervals of `scores`, and `questions` the
    scores of answers. `each` holds the caption and the scores of every image.
    """
    checkpoint.captioner.eval()
    source, style = prompt
    against, examples, texts = choose_references(examples, style)
    # A caption depends only on its image, so captions are shuffled instead of images.
    order = derangement([example.sample_id for example in examples])
    # The questions of an example are also asked about another example's image, as a control.
    asked: list[list[int]] = [[] for _ in examples]
    if questions and any(not style for _, style in checkpoint.captioner.config.prompts):
        for index, shuffled_image in enumerate(order):
            asked[index].append(index)
            asked[shuffled_image].append(index)
    captions, answers = _generate(checkpoint, examples, features, prompt, decoding, asked)
    hypotheses = [tokenize(caption) for caption in captions]
    references = [[tokenize(text) for text in group] for group in texts]
    shuffled = [hypotheses[index] for index in order]
    rarity = Rarity(references)
    own_scores, shuffled_scores = (score_each(texts, references, rarity) for texts in (hypotheses, shuffled))
    gains = [a - b for a, b in zip(own_scores["cider_d"], shuffled_scores["cider_d"], strict=True)]
    each: list[dict[str, Any]] = [
        {
            "sample_id": example.sample_id,
            "caption": caption,
            "references": [" ".join(words) for words in references[index]],
            "cider_d": round(own_scores["cider_d"][index], 4),
            "shuffled_cider_d": round(shuffled_scores["cider_d"][index], 4),
            "rouge_l": round(own_scores["rouge_l"][index], 4),
            **({"questions": _answer_results(example, answers[index, index])} if answers else {}),
        }
        for index, (example, caption) in enumerate(zip(examples, captions, strict=True))
    ]
    ranked, half = sorted(each, key=lambda image: -image["cider_d"]), SHOWN_IMAGES // 2
    result: dict[str, Any] = {
        "images": len(examples),
        "style": style,
        "source": source,
        "against": against,
        "num_beams": decoding.num_beams,
        "scores": score(hypotheses, references, own_scores),
        "shuffled_scores": score(shuffled, references, shuffled_scores),
        "intervals": bootstrap(own_scores) if questions else {},
        "gain": bootstrap({"cider_d": gains}) if questions else {},
        "shown": [*ranked[:half], *ranked[half:][-half:]],
        "each": each,
    }
    if clip:
        images = (example.open() for example in examples)
        own_clip, shuffled_clip = clip_scores(clip, images, captions, range(len(examples)), order)
        result["scores"]["clip_score"] = statistics.fmean(own_clip)
        result["shuffled_scores"]["clip_score"] = statistics.fmean(shuffled_clip)
    if answers:
        result["questions"] = score_answers(examples, order, answers)
    return result


def _answer_results(example: Example, answers: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "question": question.question,
            "type": question.answer_type,
            "said": answer,
            "answers": list(question.answers),
            "accuracy": vqa_accuracy(answer, question),
        }
        for question, answer in zip(example.questions, answers, strict=True)
    ]


def evaluate_version(
    checkpoint: Checkpoint,
    version: Version,
    split: str,
    style: str | None = None,
    beams: int | None = None,
    clip: str | None = None,
) -> dict[str, Any]:
    """Score a captioner on a split of a version (see `evaluate`).

    `beams` defaults to the captioner's beam width. `clip` names the model for CLIPScore. Raises TrainError if
    it is the captioner's own encoder, and EngineError if it cannot be loaded.
    """
    config = checkpoint.captioner.config
    if clip and is_own_encoder(clip, config.encoder["made_from"]):
        problem = f"{clip} is the encoder of this captioner, which would bias the CLIP score"
        raise TrainError(problem, hint="choose another CLIP: --clip-score")
    try:
        examples = examples_in(version, split, config.data.get("texts", "synthetic"), to_score=True)
    except TrainError:  # the version lacks the kind of texts (human or synthetic) that was learned
        examples = examples_in(version, split, default_texts(version.manifest), to_score=True)
    features = OnlineFeatures(checkpoint.captioner.encoder, checkpoint.captioner.device)
    prompt, decoding = scored_prompt(config.prompts, style), config.decoding(beams)
    scores = evaluate(checkpoint, examples, features, prompt, decoding, questions=True, clip=clip)
    return {"split": split, **scores}


def choose_references(examples: list[Example], style: str) -> tuple[str, list[Example], list[list[str]]]:
    """Return the kind of references, the examples that have references, and these references.

    Raises TrainError if no example has a reference or a caption in the style.
    """
    against = "references of the source"
    pairs = [(example, list(example.references)) for example in examples if example.references]
    if not pairs:
        against = "captions of the teacher"
        captions = ((e, [text.text for text in e.texts if text.style == style]) for e in examples)
        pairs = [(example, texts) for example, texts in captions if texts]
    if not pairs:
        styles = sorted({text.style for example in examples for text in example.texts if text.style})
        hint = f"choose --style from {', '.join(styles)}" if styles else "evaluate on another dataset"
        raise TrainError(f"no held-out image has a reference or a {style} caption", hint=hint)
    return against, [example for example, _ in pairs], [texts for _, texts in pairs]


def _generate(
    checkpoint: Checkpoint,
    examples: list[Example],
    features: FeatureSource,
    prompt: tuple[str, str],
    decoding: DecodingConfig,
    asked: list[list[int]],
) -> tuple[list[str], dict[tuple[int, int], list[str]]]:
    """Return the caption of each image, and the answers to the questions of the examples in `asked`."""
    source, style = prompt
    prompt_T = torch.tensor(checkpoint.tokenizer.prompt(TargetText(source, "", style=style)))
    captioner = checkpoint.captioner
    is_large = captioner.device.type == "cuda" and isinstance(captioner.decoder, ScratchDecoder)
    size = (HELD_IMAGES if is_large else BATCH_IMAGES) // decoding.num_beams
    answer_source = preferred_source(captioner.config.prompts, "") or ""
    captions: list[str] = []
    answers: dict[tuple[int, int], list[str]] = {}
    images = range(len(examples))[own_slice()]
    for start in range(0, len(images), HELD_IMAGES):
        part_images = images[start : start + HELD_IMAGES]
        part = [examples[image] for image in part_images]
        held = hold_features(features, part)
        for first in range(0, len(part), size):
            states_BNV = held(part[first : first + size])
            prompt_BT = prompt_T.expand(len(states_BNV), -1)
            texts = captioner.generate(states_BNV, prompt_BT, decoding)
            captions += [checkpoint.tokenizer.decode(ids) for ids in texts]
        keys = [(image, index) for image in part_images for index in asked[image]]
        pairs = [
            (examples[i], question.question) for i, index in keys for question in examples[index].questions
        ]
        remaining = iter(answer_questions(checkpoint, held, pairs, answer_source))
        answers |= {key: list(islice(remaining, len(examples[key[1]].questions))) for key in keys}
    return gather_slices(captions), dict(gather_slices(list(answers.items())))


def answer_questions(
    checkpoint: Checkpoint, features: FeatureSource, pairs: Sequence[tuple[Example, str]], source: str
) -> list[str]:
    """Answer one question per (example, question) pair. Prompts of equal length share a batch."""
    asked = [TargetText(source, "", question=question) for _, question in pairs]
    prompts = [checkpoint.tokenizer.prompt(text) for text in asked]
    answers = [""] * len(pairs)
    for length in sorted({len(prompt) for prompt in prompts}):
        indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(indices), BATCH_IMAGES):
            batch = indices[start : start + BATCH_IMAGES]
            with torch.inference_mode():
                states_BNV = features([pairs[index][0] for index in batch])
            prompt_BT = torch.tensor([prompts[index] for index in batch], device=states_BNV.device)
            texts = checkpoint.captioner.eval().generate(states_BNV, prompt_BT, GREEDY)
            for index, ids in zip(batch, texts, strict=True):
                answers[index] = checkpoint.tokenizer.decode(ids)
    return answers


def vqa_accuracy(answer: str, truth: Question) -> float:
    """Return VQA accuracy (Antol et al., 2015): min(1, matches / 3), averaged over leave-one-out subsets.

    With fewer than four annotators, an answer is correct if it equals one of theirs. All answers are
    normalized first. The official script does not normalize them if all annotators agree.
    """
    given = normalize_answer(answer)
    truths = [normalize_answer(reference) for reference in truth.answers]
    if len(truths) < 4:
        return float(given in truths)
    num_matches = truths.count(given)
    return statistics.fmean(min(1.0, (num_matches - (reference == given)) / 3) for reference in truths)


def clip_scores(
    name: str, images: Iterable[Image.Image], captions: Sequence[str], *orders: Sequence[int]
) -> list[list[float]]:
    """Return, for each order, the CLIPScore (Hessel et al., 2021) of each image i with caption order[i]."""
    clip = ClipScorer(name)
    image_states, text_states = clip.image_states(images), clip.text_states(captions)
    cosines = (clip.compare(image_states, [text_states[index] for index in order]) for order in orders)
    return [[CLIPSCORE_WEIGHT * max(cosine, 0.0) for cosine in order_cosines] for order_cosines in cosines]


def is_own_encoder(name: str, made_from: dict[str, str]) -> bool:
    """Return whether `name` is the model that the captioner's encoder was made from."""
    own_name, model_id = made_from.get("name", ""), ENCODERS.get(name, name)
    shown = folder_name(Path(name)) if Path(name).is_dir() else model_id
    return ENCODERS.get(own_name, own_name) in (model_id, shown)
