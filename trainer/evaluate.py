"""Score a captioner on held-out images, and again with the images shuffled.

A captioner that ignores its image scores as well on another one. The second score shows that at once.
"""

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.answers import normalize_answer
from pipeline.errors import ImageError, TrainError
from pipeline.image import prepare_image
from pipeline.store import Version
from trainer.checkpoint import Checkpoint
from trainer.clipscore import clip_scores, is_same
from trainer.data import Example, Question, examples_in, most_common
from trainer.features import Look, States
from trainer.metrics import bootstrap, meteor, score, score_each, tokenize
from trainer.model.search import GREEDY, Search
from trainer.text import Text

BATCH_IMAGES = 64
SHOWN = 12


def write_captions(checkpoint: Checkpoint, states: Sequence[Tensor], prompt: Text, search: Search = GREEDY) -> list[str]:
    """Write one text after a prompt for each batch of hidden states (B, N, V), in order."""
    captioner, words = checkpoint.captioner.eval(), checkpoint.words
    prompt_T = torch.tensor(words.prompt(prompt))
    return [
        words.decode(ids)
        for states_BNV in states
        for ids in captioner.generate(states_BNV, prompt_T.expand(len(states_BNV), -1), search)
    ]


def answer_questions(
    checkpoint: Checkpoint, states_of: States, asked: Sequence[tuple[Example, str]], source: str, search: Search = GREEDY
) -> list[str]:
    """Answer a question about each image, in order; questions of one length go through the model together."""
    words = checkpoint.words
    prompts = [words.prompt(Text(source, "", question=question)) for _, question in asked]
    answers = [""] * len(asked)
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [at for at, prompt in enumerate(prompts) if len(prompt) == length]
        for first in range(0, len(places), BATCH_IMAGES):
            batch = places[first : first + BATCH_IMAGES]
            with torch.inference_mode():
                states_BNV = states_of([asked[at][0] for at in batch])
            prompt_BT = torch.tensor([prompts[at] for at in batch], device=states_BNV.device)
            for at, ids in zip(batch, checkpoint.captioner.eval().generate(states_BNV, prompt_BT, search), strict=True):
                answers[at] = words.decode(ids)
    return answers


def describe_files(
    checkpoint: Checkpoint, paths: list[Path], style: str | None = None, question: str = "", search: Search = GREEDY
) -> list[str]:
    """Write a caption for each image file, or the answer to a question about it, in their order.

    Raises:
        TrainError: a file cannot be read, or nothing of the kind was learned.
    """
    prompts, encoder = checkpoint.captioner.config.prompts, checkpoint.captioner.encoder
    source, wanted = answering_prompt(prompts) if question else scored_prompt(prompts, style)
    prompt = Text(source, "", style=wanted, question=question)
    device = next(encoder.parameters()).device
    written = []
    for first in range(0, len(paths), BATCH_IMAGES):
        images = []
        for path in paths[first : first + BATCH_IMAGES]:
            try:
                images.append(prepare_image(path.read_bytes()))
            except (OSError, ImageError) as error:
                raise TrainError(f"cannot read {path}: {error}", hint="pass image files") from None
        with torch.inference_mode():
            states_BNV = encoder(encoder.pixels(images).to(device))
        written += write_captions(checkpoint, [states_BNV], prompt, search)
    return written


def scored_prompt(prompts: list[tuple[str, str]], style: str | None = None) -> tuple[str, str]:
    """Return source and style that are asked for: brief as people caption, unless told; people's words where some were learned.

    Raises:
        TrainError: nothing of that style was learned.
    """
    styles = list(dict.fromkeys(known for _, known in prompts if known))
    wanted = style or ("brief" if "brief" in styles else styles[0])
    sources = [source for source, known in prompts if known == wanted]
    if not sources:
        raise TrainError(f"the captioner knows no style {wanted}", hint=f"it was trained on: {', '.join(styles)}")
    return ("human" if "human" in sources else sources[0]), wanted


def answering_prompt(prompts: list[tuple[str, str]]) -> tuple[str, str]:
    """Return whose answers are asked for, with an empty style. Raises TrainError where none were learned."""
    sources = [source for source, style in prompts if not style]
    if not sources:
        raise TrainError("the captioner has learned no answers", hint="train on a version with questions")
    return ("human" if "human" in sources else sources[0]), ""


@dataclass(frozen=True, slots=True)
class Asked:
    """How an evaluation asks: for whose captions of which style, by which search, and what else it measures."""

    prompt: tuple[str, str]
    search: Search = GREEDY
    questions: bool = False  # and intervals
    thorough: bool = False  # with METEOR, where Java and pycocoevalcap are there: it takes seconds


def evaluate(
    checkpoint: Checkpoint, examples: list[Example], asked: Asked, states_of: States, clip: str | None = None
) -> dict[str, Any]:
    """Return scores against the references of the source, or, where it has none, against the captions it was given.

    `scores` are of each image's own caption, `shuffled_scores` of the caption of another image, `intervals` the 95 % of a
    bootstrap over images. `questions` are scored where answers were learned. `each` has all of that for every image.
    """
    source, style = asked.prompt
    against, examples, references = _references(examples, style)
    with torch.inference_mode():
        states = [states_of(examples[at : at + BATCH_IMAGES]) for at in range(0, len(examples), BATCH_IMAGES)]
    hypotheses = write_captions(checkpoint, states, Text(source, "", style=style), asked.search)
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
    look = Look(checkpoint.captioner.encoder, next(checkpoint.captioner.parameters()).device)
    asked = Asked(scored_prompt(config.prompts, style), Search(beams=beams), questions=True, thorough=True)
    return {"split": split, **evaluate(checkpoint, examples, asked, look, clip)}


def evaluate_questions(
    checkpoint: Checkpoint, examples: list[Example], states_of: States
) -> tuple[dict[str, dict[str, float]], list[list[dict[str, Any]]]] | None:
    """Return VQA accuracy by type of answer, with shuffled images and of always giving the most frequent answer beside it.

    And what was said about each image. None where the captioner has learned no answers.
    """
    if not any(not style for _, style in checkpoint.captioner.config.prompts):
        return None
    source, _ = answering_prompt(checkpoint.captioner.config.prompts)
    asked = [(example, question) for example in examples for question in example.questions]
    other = {example.sample_id: examples[at] for example, at in zip(examples, derangement(len(examples)), strict=True)}
    own = answer_questions(checkpoint, states_of, [(example, q.question) for example, q in asked], source)
    blind = answer_questions(checkpoint, states_of, [(other[example.sample_id], q.question) for example, q in asked], source)
    right = [vqa_accuracy(said, question) for said, (_, question) in zip(own, asked, strict=True)]
    found = {}
    for kind in sorted({question.answer_type for _, question in asked}):
        places = [at for at, (_, question) in enumerate(asked) if question.answer_type == kind]
        truths = [asked[at][1] for at in places]
        most = Counter(normalize_answer(most_common(truth.answers)) for truth in truths).most_common(1)[0][0]
        found[kind] = {
            "count": len(places),
            "accuracy": statistics.fmean(right[at] for at in places),
            "shuffled": statistics.fmean(vqa_accuracy(blind[at], asked[at][1]) for at in places),
            "majority": statistics.fmean(vqa_accuracy(most, truth) for truth in truths),
        }
    said_of: dict[str, list[dict[str, Any]]] = {example.sample_id: [] for example in examples}
    for (example, question), said, accuracy in zip(asked, own, right, strict=True):
        about = {"question": question.question, "type": question.answer_type, "said": said, "answers": list(question.answers)}
        said_of[example.sample_id].append(about | {"accuracy": accuracy})
    return found, [said_of[example.sample_id] for example in examples]


def vqa_accuracy(answer: str, truth: Question) -> float:
    """Return VQA accuracy by the rule of Antol et al. (2015): right when three of the other people say so.

    Each person is left out in turn. All answers are normalised first; the official program compares letter by letter where
    all people said the same. With answers of fewer than four people, right is what equals one of them.
    """
    given = normalize_answer(answer)
    right = [normalize_answer(other) for other in truth.answers]
    if len(right) < 4:
        return float(given in right)
    return statistics.fmean(
        min(1.0, sum(other == given for at, other in enumerate(right) if at != left) / 3) for left in range(len(right))
    )


def derangement(count: int) -> list[int]:
    """Return an order, always the same, in which nothing is at its own place (for `count` above 1)."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    return [after[place] for place in range(count)]


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
